"""The variational autoencoder with two latents that takes the place of A."""

import itertools
import math
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fvae import masking
from keras_fvae import objective
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.config import resolve_config
from keras_fvae.layout import REFERENCE_SCALE
from keras_fvae.layout import layout
from keras_fvae.layout import reference_views

LOG_VARIANCE_LIMITS = (-20.0, 20.0)
# The smallest standard deviation of the decoder, as in the authors' code.
SCALE_FLOOR = 1e-5


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


class Posterior(NamedTuple):
    """q(z | x), a diagonal Gaussian for each token."""

    mean: Any
    log_variance: Any


class NotRematerialized:
    """A layer that `keras.RematScope` does not compute a second time.

    It would draw other noise then, and its losses would count twice, or on JAX
    be out of reach.
    """

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call


class ObjectiveWeights:
    """The weights of the objective that may change while a model trains.

    They are state that a compiled step reads, and no weights of the model:
    neither trained nor saved. At first they are those of the config.
    """

    def __init__(self, config):
        self.variable = keras.Variable(
            self._values(config),
            dtype="float32",
            trainable=False,
            autocast=False,
            name="objective_weights",
        )

    def set(self, config):
        """Sets them to those of a config."""
        self.variable.assign(self._values(config))

    @property
    def elbo_weight(self):
        """Scalar tensor, the weight of all."""
        return self.variable[0]

    @property
    def kl_weight(self):
        """Scalar tensor, b."""
        return self.variable[1]

    @property
    def gamma_weights(self):
        """Pair of scalar tensors, c for z1 and for z2."""
        return self.variable[2], self.variable[3]

    def _values(self, config):
        return [config.elbo_weight, config.kl_weight, *config.gamma_weights]


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAE(NotRematerialized, keras.Layer):
    """Variational autoencoder with two latents: z1 for the task, z2 the rest.

    Two encoders give each token x its posteriors q1(z1 | x) and q2(z2 | x),
    and one decoder reconstructs x from both latents. `FVAELoRADense` and
    `FVAELoRAEinsumDense` hold one each and take their update from z1.

    Args:
        config: `keras_fvae.FVAELoRAConfig`. `None` (default) means one with
            the default values.
        finalized: Boolean. Whether to hold only what the mean of q1 needs, as
            `keras_fvae.finalize_fvae_lora` leaves it. Defaults to `False`.
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
        A `keras_fvae.fvae.FVAEOutput`.

    Example:

    >>> fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=4))
    >>> out = fvae(np.random.normal(size=(2, 10, 32)), training=True)
    >>> tuple(out.z1.shape)
    (2, 10, 4)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(self, config=None, finalized=False, **kwargs):
        super().__init__(**kwargs)
        self.config = resolve_config(config=config)
        self.finalized = finalized
        self.seed_generator = keras.random.SeedGenerator(self.config.seed)
        self.objective_weights = None
        # `TermTotals`, while `keras_fvae.FVAELoRAMonitor` counts.
        self.totals = None

    def build(self, input_shape):
        self._feature_packing, self._latent_packing = layout(
            self.config, input_shape[-1], self.finalized
        )
        # A row for each feature of the input.
        self.feature_weights = self._add_packed_weight(
            "feature_weights", self._feature_packing
        )
        # All that does not grow with the input.
        self.latent_weights = self._add_packed_weight(
            "latent_weights", self._latent_packing
        )
        if not self.finalized:
            self.objective_weights = ObjectiveWeights(self.config)

    def call(self, x, training=None, mask=None, noise=None):
        token_shape = ops.shape(x)[:-1]
        _check_mask(mask, x)
        mask = masking.flatten_mask(mask, token_shape)
        rank = self.config.rank
        if noise is not None:
            noise = [
                ops.reshape(eps, self._draws_shape((-1,))) for eps in noise
            ]
        q1, q2, z1, z2, negative_log_likelihood, loss = self.encode_and_score(
            ops.reshape(x, (-1, x.shape[-1])), training, mask, noise
        )
        terms = {
            "negative_log_likelihood": negative_log_likelihood,
            **self._terms(q1, q2, z1, z2, mask),
            **self._further_terms(q1, q2, mask),
        }

        def restore(rows):
            draws = tuple(rows.shape[:-2])
            return ops.reshape(rows, (*draws, *token_shape, rank))

        return FVAEOutput(
            restore(z1),
            *map(restore, q1),
            restore(z2),
            *map(restore, q2),
            terms,
            loss,
        )

    def compute_mask(self, inputs, previous_mask):
        return None

    @property
    def num_inference_parameters(self):
        """Integer, the parameters that the mean of q1 depends on."""
        widths = self.feature_weights.shape[0], *self._z1_mean_widths()
        return sum(
            (before + 1) * after for before, after in itertools.pairwise(widths)
        )

    def posterior_mean(self, x):
        """The mean of q1 alone: all that an update needs at inference.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Float32 tensor of shape `(..., rank)`.
        """
        weights = self._weights("encoder")
        for level, width in enumerate(self._z1_mean_widths()):
            if level > 0:
                x = ops.relu(x)
            # The first trunk's first head is the mean of q1.
            kernel = weights[f"encoder_kernel_{level}"][:, 0, :width]
            bias = weights[f"encoder_bias_{level}"][0, :width]
            x = _affine(x, kernel, bias)
        return ops.cast(x, "float32")

    def sample_z1(self, x):
        """A draw from q1 alone, for `config.sample_at_inference`.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Float32 tensor of shape `(..., rank)`, or with several draws
            `(num_samples, ..., rank)`.
        """
        q1, _ = self.posteriors(x)
        (z1,) = self._sample(q1)
        return z1

    def posteriors(self, x):
        """q1 and q2 at inference.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Pair of `Posterior`, each a pair of float32 tensors of shape
            `(..., rank)`: the mean and the log variance.
        """
        self.refuse_if_finalized()
        return self._encode(x, self._weights("encoder"), training=False)

    def encode_and_score(self, x, training=None, mask=None, noise=None):
        """The latents and the loss: `call` without the diagnostics.

        Args:
            x: Tensor of shape `(tokens, d)`.
            training: Boolean, as in `call`.
            mask: Optional tensor of shape `(tokens,)`.
            noise: Optional pair of tensors shaped like `z1` and `z2`.

        Returns:
            Tuple `(q1, q2, z1, z2, negative_log_likelihood, loss)`.
        """
        self.refuse_if_finalized()
        weights = self._weights()
        q1, q2 = self._encode(x, weights, training)
        if noise is not None:
            z1 = _reparameterize(q1, noise[0])
            z2 = _reparameterize(q2, noise[1])
        elif training or self.config.sample_at_inference:
            z1, z2 = self._sample(q1, q2)
        else:
            z1, z2 = q1.mean, q2.mean
        residual = x - self._decode(z1, z2, weights, x.dtype, training)
        # The scale is the same for every token, so the squared error is
        # averaged over the tokens before it is divided by the scale.
        squared_error = objective.token_mean(
            ops.square(ops.cast(residual, "float32")), mask, feature_axes=1
        )
        negative_log_likelihood = objective.negative_log_likelihood(
            squared_error, ops.exp(weights["log_scale"]) + SCALE_FLOOR
        )
        loss = -self._objective(negative_log_likelihood, q1, q2, z1, z2, mask)
        if training and self.totals is not None:
            parts = loss, negative_log_likelihood, squared_error, x
            self._add_to_totals(
                *keras.tree.map_structure(
                    ops.stop_gradient, (*parts, q1, q2, z1, z2)
                ),
                mask,
            )
        return q1, q2, z1, z2, negative_log_likelihood, loss

    @property
    def variables(self):
        """List of all state: the weights, the seed, and what steps keep."""
        kept = [self.objective_weights, self.totals]
        # On PyTorch they would count as parameters, and need not be known.
        if keras.config.backend() == "torch":
            kept = []
        return super().variables + [k.variable for k in kept if k is not None]

    @property
    def decoder_scale(self):
        """NumPy array of shape `(d,)`, the decoder's standard deviation."""
        return np.exp(self.get_arrays()["log_scale"]) + SCALE_FLOOR

    def quantize(self, *args, **kwargs):
        # Keras would pass an adapted layer over, without a word.
        self.refuse_quantization()

    @property
    def array_shapes(self):
        """Dict of name to shape, of the arrays that the variables hold."""
        return {**self._feature_packing.shapes, **self._latent_packing.shapes}

    def get_arrays(self, finalized=False):
        """What the variables hold.

        Args:
            finalized: Boolean. Whether to return only what the mean of q1
                needs: the arrays of a finalized FVAE.

        Returns:
            Dict of name to NumPy array.
        """
        arrays = self._unpack(*self._packed_values())
        if not finalized:
            return arrays
        selected = {}
        for level, width in enumerate(self._z1_mean_widths()):
            kernel, bias = f"encoder_kernel_{level}", f"encoder_bias_{level}"
            selected[kernel] = arrays[kernel][:, :1, :width]
            selected[bias] = arrays[bias][:1, :width]
        return selected

    def set_arrays(self, arrays):
        """Sets the variables from what `get_arrays` returned."""
        self.feature_weights.assign(self._feature_packing.pack(arrays))
        self.latent_weights.assign(self._latent_packing.pack(arrays))

    def get_reference_weights(self):
        """The weights, by the names and in the layout of the authors' code.

        Returns:
            Dict of name to NumPy array. As in PyTorch, the weight of a linear
            layer is of shape `(out, in)`.

        Raises:
            ValueError: If the layer is not built.
        """
        self.refuse_if_finalized()
        views = reference_views(
            self.config, self._unpack(*self._packed_values())
        )
        weights = {name: view.copy() for name, view in views.items()}
        # The standard deviation is `scale_tril + 1e-5` there, and
        # `exp(log_scale) + SCALE_FLOOR` here.
        # In float64, so that no rounding is left after going there and back.
        log_scale = weights[REFERENCE_SCALE].astype("float64")
        weights[REFERENCE_SCALE] = np.exp(log_scale).astype("float32")
        return weights

    def set_reference_weights(self, weights):
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
        views = reference_views(self.config, self._unpack(*packed))
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
        scale_tril = views[REFERENCE_SCALE].astype("float64")
        mirrored = np.abs(scale_tril + SCALE_FLOOR) - SCALE_FLOOR
        positive = np.where(scale_tril > 0, scale_tril, mirrored)
        views[REFERENCE_SCALE][...] = np.log(np.maximum(positive, 1e-12))
        self.feature_weights.assign(packed[0])
        self.latent_weights.assign(packed[1])

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Keras does not, and a resumed run would draw the same noise again.
        state = ops.convert_to_numpy(self.seed_generator.state)
        store["seed_generator_state"] = state

    def load_own_variables(self, store):
        own = {name: store[name] for name in [*store.keys()]}
        state = own.pop("seed_generator_state", None)
        super().load_own_variables(own)
        if state is not None:
            self.seed_generator.state.assign(state)

    def get_config(self):
        return {
            **super().get_config(),
            "config": self.config.get_config(),
            "finalized": self.finalized,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "config": FVAELoRAConfig(**config["config"])})

    def _add_packed_weight(self, name, packing):
        def initializer(shape, dtype=None):
            return packing.pack(
                {
                    name: self._initial_value(name, shape)
                    for name, shape in packing.shapes.items()
                }
            )

        return self.add_weight(
            name=name,
            shape=packing.shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
        )

    def _initial_value(self, name, shape):
        if name == "log_scale":
            return ops.full(shape, math.log1p(-SCALE_FLOOR), dtype="float32")
        is_head = name == f"encoder_kernel_{len(self.config.hidden_units)}"
        if "bias" in name or is_head:
            # With heads of zero, the update is zero and q1 is p1.
            return ops.zeros(shape, dtype="float32")
        glorot_uniform = keras.initializers.GlorotUniform(
            seed=self.seed_generator
        )
        if name.startswith("encoder"):
            width, num_trunks, units = shape
            kernels = [
                glorot_uniform((width, units)) for _ in range(num_trunks)
            ]
            return ops.stack(kernels, axis=1)
        return glorot_uniform(shape)

    def _weights(self, prefix=""):
        """The weights by name, all or those of the encoders or decoder."""
        return self._unpack(
            ops.convert_to_tensor(self.feature_weights),
            ops.convert_to_tensor(self.latent_weights),
            prefix,
        )

    def _encode(self, x, weights, training):
        """The posteriors q1 and q2; their trunks run side by side."""
        for level in range(len(self.config.hidden_units) + 1):
            kernel = weights[f"encoder_kernel_{level}"]
            if level == 0:
                # Every trunk reads x.
                kernel = ops.reshape(kernel, (kernel.shape[0], -1))
            else:
                x = self._activate(x, training)
                kernel = _block_diagonal(kernel)
            bias = ops.reshape(weights[f"encoder_bias_{level}"], (-1,))
            x = _affine(x, kernel, bias)
        z1_mean, z1_log_variance, z2_mean, z2_log_variance = ops.split(
            ops.cast(x, "float32"), 4, axis=-1
        )
        return (
            Posterior(z1_mean, ops.clip(z1_log_variance, *LOG_VARIANCE_LIMITS)),
            Posterior(z2_mean, ops.clip(z2_log_variance, *LOG_VARIANCE_LIMITS)),
        )

    def _decode(self, z1, z2, weights, dtype, training):
        """The mean of p(x | z1, z2)."""
        if self.config.latent_fusion == "concat":
            x = ops.concatenate([z1, z2], axis=-1)
        else:
            x = (z1 + z2) / 2
        x = ops.cast(x, dtype)
        for level in range(len(self.config.decoder_units)):
            kernel = weights[f"decoder_kernel_{level}"]
            x = _affine(x, kernel, weights[f"decoder_bias_{level}"])
            x = self._activate(x, training)
        kernel = ops.transpose(weights["decoder_output_kernel"])
        return _affine(x, kernel, weights["decoder_output_bias"])

    def _activate(self, x, training):
        x = ops.relu(x)
        if training and self.config.dropout > 0:
            x = keras.random.dropout(
                x, self.config.dropout, seed=self.seed_generator
            )
        return x

    def _sample(self, *posteriors):
        """Draws from each posterior."""
        token_shape = ops.shape(posteriors[0].mean)[:-1]
        # One call to the generator: it costs more than the numbers do.
        noise = keras.random.normal(
            self._draws_shape(token_shape, len(posteriors)),
            dtype="float32",
            seed=self.seed_generator,
        )
        noise = ops.split(noise, len(posteriors), axis=-1)
        return [_reparameterize(q, eps) for q, eps in zip(posteriors, noise)]

    def _draws_shape(self, token_shape, num_latents=1):
        shape = (*token_shape, num_latents * self.config.rank)
        if self.config.num_samples > 1:
            shape = (self.config.num_samples, *shape)
        return shape

    def _objective(self, negative_log_likelihood, q1, q2, z1, z2, mask):
        config = self.config
        log_likelihood = -negative_log_likelihood
        kl_z1 = objective.token_mean(objective.kl_divergence(*q1), mask)
        if config.objective == "fvae":
            log_p1, log_p2 = self._log_priors(q1, q2, z1, z2)
            return objective.fvae(
                log_likelihood,
                kl_z1,
                objective.token_mean(log_p1, mask),
                objective.token_mean(log_p2, mask),
                config.reconstruction_weight,
                self.objective_weights.kl_weight,
                self.objective_weights.gamma_weights,
            )
        kl_z2 = objective.kl_divergence(*q2, *config.prior)
        kl_z2 = objective.token_mean(kl_z2, mask)
        if config.objective == "vae2lat":
            return objective.vae2lat(log_likelihood, kl_z1, kl_z2)
        return objective.beta_vae2lat(
            log_likelihood, kl_z1, kl_z2, self.objective_weights.kl_weight
        )

    def _log_priors(self, q1, q2, z1, z2):
        """log p1(z1) and log p2(z2): their expectations, or of the draws."""
        prior = self.config.prior
        if self.config.gamma_estimator == "closed_form":
            return (
                objective.expected_log_density(*q1),
                objective.expected_log_density(*q2, *prior),
            )
        return objective.log_density(z1), objective.log_density(z2, *prior)

    def _terms(self, q1, q2, z1, z2, mask):
        """The terms of the latents, means over the tokens that count."""
        log_p1, log_p2 = self._log_priors(q1, q2, z1, z2)
        return {
            "kl_z1": objective.token_mean(objective.kl_divergence(*q1), mask),
            "gamma": objective.token_mean(log_p2 - log_p1, mask),
            "wasserstein": objective.token_mean(
                objective.wasserstein(*q1, *q2), mask
            ),
        }

    def _further_terms(self, q1, q2, mask):
        """Those that only `call` returns."""
        kl_z2 = objective.kl_divergence(*q2, *self.config.prior)
        lambda_mismatch = objective.kl_divergence(*q2) - kl_z2
        delta_divergence = objective.expected_log_density(
            *q2
        ) - objective.expected_log_density(*q1)
        return {
            "kl_z2": objective.token_mean(kl_z2, mask),
            "lambda_mismatch": objective.token_mean(lambda_mismatch, mask),
            "delta_divergence": objective.token_mean(delta_divergence, mask),
        }

    def _add_to_totals(
        self,
        loss,
        negative_log_likelihood,
        squared_error,
        x,
        q1,
        q2,
        z1,
        z2,
        mask,
    ):
        """Adds a step to what `keras_fvae.FVAELoRAMonitor` counts."""
        terms = {
            "fvae_loss": loss,
            "negative_log_likelihood": negative_log_likelihood,
            **self._terms(q1, q2, z1, z2, mask),
        }
        self.totals.add(terms, x, squared_error, q1.mean, mask)

    def _z1_mean_widths(self):
        """The widths of the layers that lead from x to the mean of q1."""
        return (*self.config.hidden_units, self.config.rank)

    def refuse_quantization(self):
        """Raises a `ValueError` that says in which order to go."""
        raise ValueError(
            "A model must be quantized before FVAE-LoRA is enabled. To "
            "quantize the base of a trained model: save the adapters by "
            "`save_fvae_lora_weights`, quantize a base model without them, "
            "and load them by `load_fvae_lora_weights`."
        )

    def refuse_if_finalized(self):
        """Raises a `ValueError` if only what inference needs is left."""
        if self.finalized:
            raise ValueError(
                "This model is finalized: its adapters kept only what "
                "inference needs, and can neither be trained nor sampled. To "
                "go on, load the adapters as they were before, from a file "
                "that `save_fvae_lora_weights` or `model.save` wrote."
            )

    def _packed_values(self):
        if not self.built:
            raise ValueError(
                f"FVAE '{self.name}' has no weights yet. Call it on data, or "
                "call `build(input_shape)`, before you exchange its weights."
            )
        return (
            np.array(ops.convert_to_numpy(self.feature_weights)),
            np.array(ops.convert_to_numpy(self.latent_weights)),
        )

    def _unpack(self, feature_weights, latent_weights, prefix=""):
        return {
            **self._feature_packing.unpack(feature_weights, prefix),
            **self._latent_packing.unpack(latent_weights, prefix),
        }


def _affine(x, kernel, bias):
    kernel, bias = ops.cast(kernel, x.dtype), ops.cast(bias, x.dtype)
    return ops.add(ops.matmul(x, kernel), bias)


def _block_diagonal(kernels):
    """One matrix from kernels `(in, n, out)`, for n inputs side by side.

    Half or more of it is zeros, but these products are small, and one runs
    faster than n.
    """
    width, count, units = kernels.shape
    blocks = ops.reshape(ops.eye(count), (count, 1, count, 1)) * kernels
    return ops.reshape(blocks, (count * width, count * units))


def _reparameterize(q, noise):
    """z = mean + standard deviation * noise."""
    noise = ops.cast(noise, "float32")
    return q.mean + ops.exp(0.5 * q.log_variance) * noise


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
