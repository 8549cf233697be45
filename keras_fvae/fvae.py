"""The variational autoencoder with two latents that takes the place of A."""

import itertools
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fvae import objective
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.config import resolve_config

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


class Affine(NamedTuple):
    """The variables of `x @ kernel + bias`."""

    kernel: keras.Variable
    bias: keras.Variable


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAE(keras.Layer):
    """Variational autoencoder with two latents: z1 for the task, z2 the rest.

    Two encoders give each token x its posteriors q1(z1 | x) and q2(z2 | x),
    and one decoder reconstructs x from both latents. `FVAELoRADense` and
    `FVAELoRAEinsumDense` hold one each and take their update from z1.

    Args:
        config: `keras_fvae.FVAELoRAConfig`. `None` (default) means one with
            the default values.
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

    def __init__(self, config=None, **kwargs):
        super().__init__(**kwargs)
        self.config = resolve_config(config=config)
        self.seed_generator = keras.random.SeedGenerator(self.config.seed)
        options = {"seed": self.seed_generator, "dtype": self.dtype_policy}
        self.z1_encoder = _Encoder(self.config, name="z1_encoder", **options)
        self.z2_encoder = _Encoder(self.config, name="z2_encoder", **options)
        self.decoder = _Decoder(self.config, name="decoder", **options)

    def build(self, input_shape):
        self.z1_encoder.build(input_shape)
        self.z2_encoder.build(input_shape)
        self.decoder.build(input_shape)

    def call(self, x, training=None, mask=None, noise=None):
        q1, q2, z1, z2, negative_log_likelihood, loss = self.encode_and_score(
            x, training=training, mask=mask, noise=noise
        )
        mask = _expand_mask(mask, x)
        terms = {"negative_log_likelihood": negative_log_likelihood}
        for name, values in self._latent_terms(q1, q2, z1, z2).items():
            terms[name] = objective.token_mean(values, mask)
        return FVAEOutput(z1, *q1, z2, *q2, terms, loss)

    def compute_mask(self, inputs, previous_mask):
        return None

    def posterior_mean(self, x):
        """The mean of q1 alone: all that an update needs at inference.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Float32 tensor of shape `(..., rank)`.
        """
        for layer in self.z1_encoder.trunks[0]:
            x = ops.relu(_affine(x, layer))
        return ops.cast(_affine(x, self.z1_encoder.mean), "float32")

    def sample_z1(self, x):
        """A draw from q1 alone, for `config.sample_at_inference`.

        Args:
            x: Tensor of shape `(..., d)`.

        Returns:
            Float32 tensor shaped like `z1`.
        """
        (q1,) = self._encode(x, [self.z1_encoder], training=False)
        (z1,) = self._sample(q1)
        return z1

    def encode_and_score(self, x, training=None, mask=None, noise=None):
        """The latents and the loss: `call` without the diagnostics.

        Args:
            x: Tensor of shape `(..., d)`.
            training: Boolean, as in `call`.
            mask: Optional tensor, as in `call`.
            noise: Optional pair of tensors, as in `call`.

        Returns:
            Tuple `(q1, q2, z1, z2, negative_log_likelihood, loss)`.
        """
        mask = _expand_mask(mask, x)
        q1, q2 = self._encode(
            x, [self.z1_encoder, self.z2_encoder], training=training
        )
        if noise is not None:
            z1 = _reparameterize(q1, noise[0])
            z2 = _reparameterize(q2, noise[1])
        elif training or self.config.sample_at_inference:
            z1, z2 = self._sample(q1, q2)
        else:
            z1, z2 = q1.mean, q2.mean
        residual = x - self._decode(z1, z2, x.dtype, training)
        # The scale is the same for every token, so the squared error is
        # averaged over the tokens before it is divided by the scale.
        negative_log_likelihood = objective.negative_log_likelihood(
            objective.token_mean(
                ops.square(ops.cast(residual, "float32")), mask, feature_axes=1
            ),
            self.decoder.scale,
        )
        value = self._objective(negative_log_likelihood, q1, q2, z1, z2, mask)
        return q1, q2, z1, z2, negative_log_likelihood, -value

    def get_reference_weights(self):
        """The weights, by the names and in the layout of the authors' code.

        Returns:
            Dict of name to NumPy array. As in PyTorch, the weight of a linear
            layer is of shape `(out, in)`.

        Raises:
            ValueError: If the layer is not built.
        """
        if not self.built:
            raise ValueError(
                f"FVAE '{self.name}' has no weights yet. Call it on data, or "
                "call `build(input_shape)`, before you exchange its weights."
            )
        weights = {}
        for name, layer in self._reference_layers():
            weights[f"{name}.weight"] = ops.convert_to_numpy(layer.kernel).T
            weights[f"{name}.bias"] = ops.convert_to_numpy(layer.bias)
        # The standard deviation is `scale_tril + 1e-5` there, and
        # `exp(log_scale) + SCALE_FLOOR` here.
        log_scale = ops.convert_to_numpy(self.decoder.log_scale)
        weights[_REFERENCE_SCALE] = np.exp(log_scale)
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
        current = self.get_reference_weights()
        for name in [*current, *weights]:
            if name not in weights or name not in current:
                problem = "Missing" if name in current else "Unknown"
                raise ValueError(
                    f"{problem} weight: '{name}'. This FVAE's config calls "
                    f"for these names: {list(current)}."
                )
            if np.shape(weights[name]) != current[name].shape:
                raise ValueError(
                    f"Weight '{name}' must have shape {current[name].shape} "
                    "in an FVAE with this config and input width. "
                    f"Received: {np.shape(weights[name])}."
                )
        for name, layer in self._reference_layers():
            layer.kernel.assign(np.transpose(weights[f"{name}.weight"]))
            layer.bias.assign(weights[f"{name}.bias"])
        # Nothing keeps theirs positive, and the density sees only its size.
        scale_tril = np.asarray(weights[_REFERENCE_SCALE])
        mirrored = np.abs(scale_tril + SCALE_FLOOR) - SCALE_FLOOR
        positive = np.where(scale_tril > 0, scale_tril, mirrored)
        self.decoder.log_scale.assign(np.log(np.maximum(positive, 1e-12)))

    def get_config(self):
        return {**super().get_config(), "config": self.config.get_config()}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "config": FVAELoRAConfig(**config["config"])})

    def _encode(self, x, encoders, training):
        """The posteriors of x, one from each encoder."""
        trunks = [trunk for encoder in encoders for trunk in encoder.trunks]
        heads = [head for encoder in encoders for head in encoder.heads]
        states = [x] * len(trunks)
        for layers in zip(*trunks):
            states = _apply_affine(
                layers, states, lambda h: self._activate(h, training)
            )
        # A shared trunk serves two heads.
        states = [s for s in states for _ in range(len(heads) // len(states))]
        outputs = _apply_affine(heads, states, lambda h: ops.cast(h, "float32"))
        return [
            Posterior(mean, ops.clip(log_variance, *LOG_VARIANCE_LIMITS))
            for mean, log_variance in zip(outputs[::2], outputs[1::2])
        ]

    def _decode(self, z1, z2, dtype, training):
        """The mean of p(x | z1, z2)."""
        if self.config.latent_fusion == "concat":
            state = ops.concatenate([z1, z2], axis=-1)
        else:
            state = (z1 + z2) / 2
        state = ops.cast(state, dtype)
        for layer in self.decoder.hidden:
            state = self._activate(_affine(state, layer), training)
        return _affine(state, self.decoder.output_layer)

    def _activate(self, x, training):
        x = ops.relu(x)
        if training and self.config.dropout > 0:
            x = keras.random.dropout(
                x, self.config.dropout, seed=self.seed_generator
            )
        return x

    def _sample(self, *posteriors):
        """One draw, or `num_samples` of them, from each posterior."""
        rank = self.config.rank
        shape = (*ops.shape(posteriors[0].mean)[:-1], rank * len(posteriors))
        if self.config.num_samples > 1:
            shape = (self.config.num_samples, *shape)
        # A single call to the generator: it costs more than the numbers do.
        noise = keras.random.normal(
            shape, dtype="float32", seed=self.seed_generator
        )
        noise = ops.split(noise, len(posteriors), axis=-1)
        return [_reparameterize(q, eps) for q, eps in zip(posteriors, noise)]

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
                config.kl_weight,
                config.gamma_weights,
            )
        kl_z2 = objective.kl_divergence(*q2, *config.prior)
        kl_z2 = objective.token_mean(kl_z2, mask)
        if config.objective == "vae2lat":
            return objective.vae2lat(log_likelihood, kl_z1, kl_z2)
        return objective.beta_vae2lat(
            log_likelihood, kl_z1, kl_z2, config.kl_weight
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

    def _latent_terms(self, q1, q2, z1, z2):
        """The terms of the latents, a value for each token."""
        log_p1, log_p2 = self._log_priors(q1, q2, z1, z2)
        kl_z2 = objective.kl_divergence(*q2, *self.config.prior)
        return {
            "kl_z1": objective.kl_divergence(*q1),
            "kl_z2": kl_z2,
            "gamma": log_p2 - log_p1,
            "lambda_mismatch": objective.kl_divergence(*q2) - kl_z2,
            "delta_divergence": objective.expected_log_density(*q2)
            - objective.expected_log_density(*q1),
            "wasserstein": objective.wasserstein(*q1, *q2),
        }

    def _reference_layers(self):
        """Pairs of the authors' name and our layer, in their order."""
        for index, encoder in enumerate([self.z1_encoder, self.z2_encoder]):
            prefix = f"views_conditionalGaussianEncoders_list.{index}"
            trunk_names = ["layers"]
            if not self.config.encoder_shared_trunk:
                trunk_names = ["layers_mean", "layers_logvar"]
            for trunk_name, trunk in zip(trunk_names, encoder.trunks):
                for depth, layer in enumerate(trunk):
                    yield f"{prefix}.{trunk_name}.{depth}", layer
            yield f"{prefix}.mean", encoder.mean
            yield f"{prefix}.logvar", encoder.log_variance
        prefix = "views_conditionalGaussianDecoders"
        for depth, layer in enumerate(self.decoder.hidden):
            yield f"{prefix}.layers.{depth}", layer
        yield f"{prefix}.output_layer", self.decoder.output_layer


_REFERENCE_SCALE = "views_conditionalGaussianDecoders.scale_tril"


class _Network(keras.Layer):
    """Holds the weights of one of the FVAE's networks; the FVAE runs them."""

    def __init__(self, config, seed, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self._initializer = keras.initializers.GlorotUniform(seed=seed)

    def add_affine(self, name, input_width, width, initializer=None):
        """Adds a kernel of shape `(input_width, width)` and its bias."""
        return Affine(
            self.add_weight(
                name=f"{name}_kernel",
                shape=(input_width, width),
                initializer=initializer or self._initializer,
                dtype="float32",
            ),
            self.add_weight(
                name=f"{name}_bias",
                shape=(width,),
                initializer="zeros",
                dtype="float32",
            ),
        )

    def add_hidden(self, name, input_width, units):
        """Adds the affine layers of an MLP's hidden layers."""
        widths = [input_width, *units]
        return [
            self.add_affine(f"{name}_{depth}", *widths[depth : depth + 2])
            for depth in range(len(units))
        ]


class _Encoder(_Network):
    """q(z | x): one or two trunks of hidden layers, and the two heads."""

    def build(self, input_shape):
        width, units = input_shape[-1], self.config.hidden_units
        names = ["hidden"]
        if not self.config.encoder_shared_trunk:
            names = ["mean_hidden", "log_variance_hidden"]
        self.trunks = [self.add_hidden(name, width, units) for name in names]
        head_width = units[-1] if units else width
        self.mean, self.log_variance = (
            # Zero at the start, so that adapted and base model agree.
            self.add_affine(name, head_width, self.config.rank, "zeros")
            for name in ("mean", "log_variance")
        )

    @property
    def heads(self):
        return [self.mean, self.log_variance]

    @property
    def mean_weights(self):
        """The weights that the mean depends on."""
        return [v for layer in (*self.trunks[0], self.mean) for v in layer]


class _Decoder(_Network):
    """p(x | z1, z2): hidden layers, the reconstruction, one scale a feature."""

    def build(self, input_shape):
        width, units = input_shape[-1], self.config.decoder_units
        latent_width = self.config.rank
        if self.config.latent_fusion == "concat":
            latent_width *= 2
        self.hidden = self.add_hidden("hidden", latent_width, units)
        self.output_layer = self.add_affine(
            "output", units[-1] if units else latent_width, width
        )
        self.log_scale = self.add_weight(
            name="log_scale",
            shape=(width,),
            initializer=keras.initializers.Constant(np.log1p(-SCALE_FLOOR)),
            dtype="float32",
            autocast=False,
        )

    @property
    def scale(self):
        return ops.exp(self.log_scale) + SCALE_FLOOR


def _affine(x, *layers):
    """`x @ kernel + bias`; several layers side by side, as one product."""
    kernels, biases = zip(*layers)
    kernel = kernels[0] if len(layers) == 1 else ops.concatenate(kernels, -1)
    bias = biases[0] if len(layers) == 1 else ops.concatenate(biases, -1)
    return ops.add(
        ops.matmul(x, ops.cast(kernel, x.dtype)), ops.cast(bias, x.dtype)
    )


def _apply_affine(layers, states, function):
    """`function(affine(state))`; layers on one state run as one product."""
    outputs = []
    pairs = zip(layers, states)
    for _, group in itertools.groupby(pairs, key=lambda pair: id(pair[1])):
        group_layers, (state, *_) = zip(*group)
        output = function(_affine(state, *group_layers))
        outputs.extend(ops.split(output, len(group_layers), axis=-1))
    return outputs


def _reparameterize(q, noise):
    """z = mean + standard deviation * noise."""
    noise = ops.cast(noise, "float32")
    return q.mean + ops.exp(0.5 * q.log_variance) * noise


def _expand_mask(mask, x):
    """The mask with an axis for each token axis of x."""
    if mask is None:
        return None
    token_shape, mask_shape = x.shape[:-1], mask.shape
    if len(mask_shape) > len(token_shape) or any(
        None not in (given, needed) and given != needed
        for given, needed in zip(mask_shape, token_shape)
    ):
        raise ValueError(
            "`mask` must have the shape of the tokens, or of their first "
            f"axes: {tuple(token_shape)}. Received a mask of shape "
            f"{tuple(mask_shape)} for x of shape {tuple(x.shape)}."
        )
    missing = len(token_shape) - len(mask_shape)
    mask = ops.reshape(mask, ops.shape(mask) + (1,) * missing)
    return ops.broadcast_to(mask, ops.shape(x)[:-1])
