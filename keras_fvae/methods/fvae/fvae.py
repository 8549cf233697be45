"""The variational autoencoder with two latents that takes the place of A."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import NoReturn
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.backend.noise import choose_seed
from keras_fvae.backend.noise import initial_generator
from keras_fvae.backend.noise import load_seed
from keras_fvae.backend.noise import next_seed
from keras_fvae.backend.noise import noise_and_masks
from keras_fvae.backend.noise import save_seed
from keras_fvae.backend.token_mean import token_mean
from keras_fvae.backend.types import Tensor
from keras_fvae.layers import masking
from keras_fvae.layers.adapter import refuse_finalized
from keras_fvae.layers.adapter import refuse_quantization
from keras_fvae.methods.fvae import objective
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.config import resolve_config
from keras_fvae.methods.fvae.layout import REFERENCE_STD
from keras_fvae.methods.fvae.layout import head_place
from keras_fvae.methods.fvae.layout import reference_views
from keras_fvae.methods.fvae.networks import ELBO
from keras_fvae.methods.fvae.networks import STD_FLOOR
from keras_fvae.methods.fvae.networks import Networks
from keras_fvae.methods.fvae.networks import Posterior
from keras_fvae.methods.fvae.networks import networks_for
from keras_fvae.methods.fvae.networks import reparameterize


class FVAEOutput(NamedTuple):
    """What `FVAE` returns. Every tensor is float32.

    Args:
        z1: Tensor of shape `(..., rank)`, the latents; with
            `num_samples > 1`, drawn ones have shape
            `(num_samples, ..., rank)`.
        z1_mean: Tensor of shape `(..., rank)`, the mean of q1.
        z1_log_variance: Tensor of shape `(..., rank)`, its log variance.
        z2: As `z1`.
        z2_mean: Tensor of shape `(..., rank)`, the mean of q2.
        z2_log_variance: Tensor of shape `(..., rank)`, its log variance.
        terms: Dict of scalar tensors, means over the tokens that count:
            `negative_log_likelihood`, `kl_z1`, `kl_z2`, `gamma`,
            `lambda_mismatch`, `delta_divergence`, `wasserstein`.
        loss: Scalar tensor, the negated objective, unweighted.
    """

    z1: Any
    z1_mean: Any
    z1_log_variance: Any
    z2: Any
    z2_mean: Any
    z2_log_variance: Any
    terms: dict[str, Any]
    loss: Any


class ObjectiveCoefficients:
    """The weights of the objective that may change while a model trains.

    They are state that a compiled step reads, and no weights of the model:
    neither trained nor saved. At first they are those of the config.

    Attributes:
        config: `FVAELoRAConfig`, the one whose weights they are.
    """

    def __init__(self, config: FVAELoRAConfig) -> None:
        self.config: FVAELoRAConfig = config
        self.variable: keras.Variable = keras.Variable(
            lambda shape, dtype: ops.convert_to_tensor(
                np.array(self._values(config), dtype), dtype
            ),
            shape=(4,),
            dtype="float32",
            trainable=False,
            autocast=False,
            name="coefficients",
        )

    def set(self, config: FVAELoRAConfig) -> None:
        """Sets them to those of a config."""
        self.config = config
        self.variable.assign(self._values(config))

    @property
    def elbo_weight(self) -> Tensor:
        """Scalar tensor, the weight of all."""
        return self.variable[0]

    def _values(self, config):
        return [config.elbo_weight, config.kl_weight, *config.gamma_weights]


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAE(keras_internals.NotRematerialized, keras.Layer):  # type: ignore[misc]
    """Variational autoencoder with two latents: z1 for the task, z2 the rest.

    Two encoders give each token x its posteriors q1(z1 | x) and q2(z2 | x),
    and one decoder reconstructs x from both latents. `FVAELoRADense` and
    `FVAELoRAEinsumDense` hold one each and take their update from z1.

    Args:
        config: `keras_fvae.FVAELoRAConfig`. `None` (default) means one with
            the default values.
        finalized: Boolean. Whether to hold only what the mean of q1 needs, as
            `keras_fvae.finalize_adapter` leaves it. Defaults to `False`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.
            The weights are float32 whatever the `dtype`.

    Call arguments:
        x: Tensor of shape `(..., d)`, each vector along the last axis a token.
        training: Boolean. In training the latents are drawn and dropout is
            active; at inference the latents are the posteriors' means, unless
            `config.sample_at_inference`.
        mask: Optional tensor of shape `x.shape[:-1]`, or of its first axes
            only, 1 or `True` for the tokens that count.
        noise: Optional pair of tensors shaped like `z1` and `z2`, to draw the
            latents with instead of new standard normal noise.

    Returns:
        A `keras_fvae.methods.fvae.fvae.FVAEOutput`.

    Example:

    >>> fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=4))
    >>> out = fvae(np.random.normal(size=(2, 10, 32)), training=True)
    >>> tuple(out.z1.shape)
    (2, 10, 4)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(
        self,
        config: FVAELoRAConfig | None = None,
        finalized: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = resolve_config(config=config)
        self.finalized = finalized
        self._initial_seed = choose_seed(self.config.seed)
        self.seed_generator = keras.random.SeedGenerator(self._initial_seed)
        self.coefficients: Any = None
        # Among how many FVAEs of a model the weight of the ELBO is shared.
        self.num_sharing = 1
        # `TermTotals`, while `keras_fvae.FVAELoRAMonitor` counts.
        self.totals: Any = None

    def build(self, input_shape: tuple[Any, ...]) -> None:
        self.networks: Networks = networks_for(
            self.config, input_shape[-1], self.finalized
        )
        # A row for each feature of the input.
        self.feature_weights: keras.Variable = self._add_packed_weight(
            "feature_weights", self.networks.feature_packing
        )
        # All that does not grow with the input.
        self.latent_weights: keras.Variable = self._add_packed_weight(
            "latent_weights", self.networks.latent_packing
        )
        if not self.finalized:
            self.coefficients = ObjectiveCoefficients(self.config)

    def call(
        self,
        x: Tensor,
        training: bool | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> FVAEOutput:
        x = keras_internals.to_features(x, self.compute_dtype)
        token_shape = ops.shape(x)[:-1]
        _check_mask(mask, x)
        mask = masking.flatten_mask(mask, token_shape)
        rank = self.config.rank
        if noise is not None:
            noise = ops.stack(
                [
                    ops.reshape(eps, self.networks.draws_shape(-1, rank))
                    for eps in noise
                ],
                axis=-2,
            )
        x = ops.reshape(x, (-1, x.shape[-1]))
        elbo = self.elbo(x, training, mask, noise)
        token_weights = replicas.token_weights(mask, ops.shape(x)[0])
        q1, q2 = elbo.posteriors.split()
        z1, z2 = ops.unstack(elbo.z, 2, axis=-2)

        def restore(rows):
            draws_shape = tuple(rows.shape[:-2])
            return ops.reshape(rows, (*draws_shape, *token_shape, rank))

        return FVAEOutput(
            restore(z1),
            restore(q1.mean),
            restore(q1.log_variance),
            restore(z2),
            restore(q2.mean),
            restore(q2.log_variance),
            {
                **elbo.terms,
                **self._further_terms(q1, q2, token_weights),
            },
            elbo.loss,
        )

    def compute_mask(
        self, inputs: Tensor, previous_mask: Tensor | None
    ) -> None:
        return None

    @property
    def num_inference_parameters(self) -> int:
        """Integer, the parameters that the mean of q1 depends on."""
        widths = self.feature_weights.shape[0], *self.networks.z1_mean_widths
        return sum(
            (before + 1) * after for before, after in itertools.pairwise(widths)
        )

    def posterior_mean(self, x: Tensor) -> Tensor:
        """The mean of q1 alone: all that an update needs at inference.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Float32 tensor of shape `(..., rank)`.
        """
        return self.networks.posterior_mean(x, *self._weights())

    def sample_z1(self, x: Tensor) -> Tensor:
        """A draw from q1 alone, for `config.sample_at_inference`.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Float32 tensor of shape `(..., rank)`, or with several draws
            `(num_samples, ..., rank)`.
        """
        q1, _ = self.posteriors(x)
        *token_shape, rank = ops.shape(q1.mean)
        noise, _ = noise_and_masks(
            self.networks.draws_shape(*token_shape),
            next_seed(self.seed_generator),
            rank,
        )
        return reparameterize(q1, noise)

    def posteriors(self, x: Tensor) -> tuple[Posterior, Posterior]:
        """q1 and q2 at inference.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Pair of `Posterior`, each a pair of float32 tensors of shape
            `(..., rank)`: the mean and the log variance.
        """
        self.refuse_if_finalized()
        return self.networks.posteriors(x, *self._weights()).split()

    def elbo(
        self,
        x: Tensor,
        training: bool | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> ELBO:
        """The latents and the loss: `call` without the diagnostics.

        Args:
            x: Tensor of shape `(tokens, d)`.
            training: Boolean, as in `call`.
            mask: Optional tensor of shape `(tokens,)`.
            noise: Optional tensor shaped like the latents, `(..., tokens, 2,
                rank)`.

        Returns:
            An `ELBO`.
        """
        self.refuse_if_finalized()
        token_weights = replicas.token_weights(mask, ops.shape(x)[0])
        inputs = {
            "x": x,
            "feature_weights": self.feature_weights.value,
            "latent_weights": self.latent_weights.value,
            "coefficients": self.coefficients.variable.value,
            "token_weights": token_weights,
            "noise": noise,
        }
        inputs = {k: v for k, v in inputs.items() if v is not None}
        seed = None
        if self.networks.widths_to_draw(training, noise):
            seed = next_seed(self.seed_generator)
        if training and self.config.rematerialize:
            elbo = self.networks.rematerialized_elbo(inputs, seed)
        else:
            elbo = self.networks.elbo(inputs, seed, training=bool(training))
        if training and self.totals is not None:
            known_x, known_elbo = keras.tree.map_structure(
                ops.stop_gradient, (x, elbo)
            )
            self._add_to_totals(known_x, known_elbo, token_weights)
        return elbo

    @property
    def loss_weight(self) -> Tensor:
        """Scalar tensor, the FVAE's share of the weight of the ELBO."""
        return self.coefficients.elbo_weight / self.num_sharing

    @property
    def variables(self) -> list[keras.Variable]:
        """List of all state: the weights, the seed, and what steps keep."""
        kept = [self.coefficients, self.totals]
        # On PyTorch they would count as parameters, and need not be known.
        if keras_internals.lists_variables_as_parameters():
            kept = []
        return super().variables + [k.variable for k in kept if k is not None]

    @property
    def decoder_std(self) -> np.ndarray:
        """NumPy array of shape `(d,)`, the decoder's standard deviation."""
        return np.exp(self.get_arrays()["log_std"]) + STD_FLOOR

    def quantize(self, *args: Any, **kwargs: Any) -> NoReturn:
        # Keras would pass the layer that it is in over, without a word.
        refuse_quantization()

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Dict of name to shape, of the arrays that the variables hold."""
        packings = self.networks.feature_packing, self.networks.latent_packing
        return {**packings[0].shapes, **packings[1].shapes}

    def get_arrays(self, finalized: bool = False) -> dict[str, np.ndarray]:
        """What the variables hold.

        Args:
            finalized: Boolean. Whether to return only what the mean of q1
                needs: the arrays of a finalized FVAE.

        Returns:
            Dict of name to NumPy array.
        """
        arrays = self.networks.unpack(*self._packed_values())
        if not finalized:
            return arrays
        selected = {}
        for level, width in enumerate(self.networks.z1_mean_widths):
            kernel, bias = f"encoder_kernel_{level}", f"encoder_bias_{level}"
            selected[kernel] = arrays[kernel][:, :1, :width]
            selected[bias] = arrays[bias][:1, :width]
        return selected

    def set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the variables from what `get_arrays` returned."""
        networks = self.networks
        self.feature_weights.assign(networks.feature_packing.pack(arrays))
        self.latent_weights.assign(networks.latent_packing.pack(arrays))

    def get_reference_weights(self) -> dict[str, np.ndarray]:
        """The weights, by the names and in the layout of the authors' code.

        Returns:
            Dict of name to NumPy array. As in PyTorch, the weight of a linear
            layer is of shape `(out, in)`.

        Raises:
            ValueError: If the layer is not built.
        """
        self.refuse_if_finalized()
        packed = self._packed_values()
        views = reference_views(self.config, self.networks.unpack(*packed))
        weights = {name: view.copy() for name, view in views.items()}
        # The standard deviation is `scale_tril + 1e-5` there, and
        # `exp(log_std) + STD_FLOOR` here.
        # In float64, so that no rounding is left after going there and back.
        log_std = weights[REFERENCE_STD].astype("float64")
        weights[REFERENCE_STD] = np.exp(log_std).astype("float32")
        return weights

    def set_reference_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Sets the weights from those of the authors' code.

        Args:
            weights: Dict of name to NumPy array, with the names and shapes
                that `get_reference_weights` returns.

        Raises:
            ValueError: If the layer is not built, a name is missing or
                unknown, or a shape differs. No weight is changed then.
        """
        self.refuse_if_finalized()
        packed = self._packed_values()
        views = reference_views(self.config, self.networks.unpack(*packed))
        for name in [*views, *weights]:
            if name not in weights or name not in views:
                problem = "Missing" if name in views else "Unknown"
                raise ValueError(
                    f"{problem} weight: '{name}'. This FVAE's config calls "
                    f"for these names: {list(views)}."
                )
            if np.shape(weights[name]) != views[name].shape:
                raise ValueError(
                    f"Weight '{name}' must have shape {views[name].shape} in "
                    "an FVAE with this config and input width. "
                    f"Received: {np.shape(weights[name])}."
                )
            views[name][...] = weights[name]
        # Nothing keeps theirs positive, and the density sees only its size.
        scale_tril = views[REFERENCE_STD].astype("float64")
        mirrored = np.abs(scale_tril + STD_FLOOR) - STD_FLOOR
        positive = np.where(scale_tril > 0, scale_tril, mirrored)
        views[REFERENCE_STD][...] = np.log(np.maximum(positive, 1e-12))
        self.feature_weights.assign(packed[0])
        self.latent_weights.assign(packed[1])

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        save_seed(self, store)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(load_seed(self, store))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "config": self.config.get_config(),
            "finalized": self.finalized,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**{**config, "config": FVAELoRAConfig(**config["config"])})

    def _add_packed_weight(self, name, packing):
        def initializer(shape, dtype=None):
            generator = initial_generator(self._initial_seed, name)
            values = generator.uniform(-1.0, 1.0, shape)
            for array_name, array in packing.unpack(values).items():
                self._initialize(array_name, array)
            # Of its own dtype, an array takes no operation.
            return ops.convert_to_tensor(values.astype(dtype), dtype)

        return self.add_weight(
            name=name,
            shape=packing.shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
        )

    def _initialize(self, name, array):
        """Makes numbers from -1 to 1 the initial values of an array."""
        depth = len(self.config.hidden_units)
        # Glorot's uniform numbers, for each trunk by itself.
        array *= math.sqrt(6 / (array.shape[0] + array.shape[-1]))
        if name == "log_std":
            array[...] = math.log1p(-STD_FLOOR)
        elif name == f"encoder_kernel_{depth}":
            trunk, columns = head_place(self.config, 0)
            z1_mean = array[:, trunk, columns].copy()
            array[...] = 0.0
            if self.config.zero_at_start == "kernel_b":
                array[:, trunk, columns] = z1_mean
        elif "bias" in name:
            array[...] = 0.0
            if name == f"encoder_bias_{depth}" and not self.finalized:
                trunk, columns = head_place(self.config, 1)
                array[trunk, columns] = self.config.initial_log_variance

    def _weights(self):
        return (
            self.feature_weights.value,
            self.latent_weights.value,
        )

    def _further_terms(self, q1, q2, token_weights):
        """Those that training does without."""

        def terms(q, prior_mean=0.0, prior_std=1.0):
            distance = objective.squared_distance(*q, prior_mean)
            return (
                objective.kl_divergence(distance, q.log_variance, prior_std),
                objective.log_density(distance, prior_std),
            )

        _, log_p1_of_z1 = terms(q1)
        kl_z2_to_p1, log_p1_of_z2 = terms(q2)
        kl_z2, _ = terms(q2, *self.config.prior)
        each = {
            "lambda_mismatch": kl_z2_to_p1 - kl_z2,
            "delta_divergence": log_p1_of_z2 - log_p1_of_z1,
            "wasserstein": objective.wasserstein(*q1, *q2),
        }
        return {
            name: token_mean(values, token_weights)
            for name, values in each.items()
        }

    def _add_to_totals(self, x, elbo, token_weights):
        """Adds a step to what `keras_fvae.FVAELoRAMonitor` counts."""
        q1, q2 = elbo.posteriors.split()
        wasserstein = objective.wasserstein(*q1, *q2)
        terms = {
            **elbo.terms,
            "fvae_loss": elbo.loss,
            "added_loss": self.loss_weight * elbo.loss,
            "wasserstein": token_mean(wasserstein, token_weights),
        }
        self.totals.add(terms, x, elbo.squared_error, q1, token_weights)

    def refuse_if_finalized(self) -> None:
        """Raises a `ValueError` if only what inference needs is left."""
        if self.finalized:
            refuse_finalized()

    def _packed_values(self):
        if not self.built:
            raise ValueError(
                f"FVAE '{self.name}' has no weights yet. Call it on data, or "
                "call `build(input_shape)`, before you exchange its weights."
            )
        return (
            np.array(replicas.to_numpy(self.feature_weights)),
            np.array(replicas.to_numpy(self.latent_weights)),
        )


def _check_mask(mask, x):
    if mask is None:
        return
    token_shape, mask_shape = tuple(x.shape[:-1]), tuple(mask.shape)
    if len(mask_shape) > len(token_shape) or any(
        None not in (given, needed) and given != needed
        for given, needed in zip(mask_shape, token_shape)
    ):
        raise ValueError(
            "`mask` must have the shape of the tokens, or of their first "
            f"axes. Received: a mask of shape {mask_shape} for x of shape "
            f"{tuple(x.shape)}, whose tokens have shape {token_shape}."
        )
