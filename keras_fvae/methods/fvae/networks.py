"""The encoders and the decoder of an FVAE, and what they come to.

Functions of tensors alone: the weights, the seeds and which tokens count are
given. So layers with the same settings share them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras import ops

from keras_fvae.backend import lean_gradients
from keras_fvae.backend.fast_ops import affine
from keras_fvae.backend.fast_ops import pair
from keras_fvae.backend.fast_ops import reshape
from keras_fvae.backend.fast_ops import traced_once
from keras_fvae.backend.noise import noise_and_masks
from keras_fvae.backend.packing import Packing
from keras_fvae.backend.rematerialization import rematerialize
from keras_fvae.backend.token_mean import token_mean
from keras_fvae.backend.types import Tensor
from keras_fvae.methods.fvae import objective
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.layout import layout

LOG_VARIANCE_LIMITS = (-20.0, 20.0)
# The smallest standard deviation of the decoder, as in the authors' code.
STD_FLOOR = 1e-5


class Posterior(NamedTuple):
    """q(z | x), a diagonal Gaussian for each token."""

    mean: Any
    log_variance: Any


class Posteriors(NamedTuple):
    """q1(z1 | x) and q2(z2 | x), side by side: one operation serves both.

    Args:
        mean: Tensor of shape `(..., 2, rank)`.
        log_variance: Tensor of shape `(..., 2, rank)`.
    """

    mean: Any
    log_variance: Any

    def split(self) -> tuple[Posterior, Posterior]:
        """q1 and q2 by themselves, a pair of `Posterior`."""
        means = ops.unstack(self.mean, 2, axis=-2)
        log_variances = ops.unstack(self.log_variance, 2, axis=-2)
        q1, q2 = map(Posterior, means, log_variances)
        return q1, q2


class ELBO(NamedTuple):
    """What `FVAE.elbo` returns.

    Args:
        posteriors: `Posteriors` of the tokens.
        z: Tensor of shape `(..., tokens, 2, rank)`, the latents.
        squared_error: Tensor of shape `(d,)`, of the reconstruction, the mean
            over the tokens that count.
        terms: Dict of scalar tensors: `negative_log_likelihood`, `kl_z1`,
            `kl_z2`, `gamma`.
        loss: Scalar tensor, the negated objective, unweighted.
    """

    posteriors: Any
    z: Any
    squared_error: Any
    terms: dict[str, Any]
    loss: Any


def networks_for(
    config: FVAELoRAConfig, width: int, finalized: bool = False
) -> Networks:
    """The `Networks` for an FVAE with these settings, the same each time.

    Args:
        config: `FVAELoRAConfig`.
        width: Integer, the width d of the input.
        finalized: Boolean. Whether only what the mean of q1 needs is held.
    """
    # In these alone the layers of a model differ, and the networks do not.
    config = dataclasses.replace(config, seed=None, elbo_weight=0.0)
    return _networks_for(config, width, finalized)


class Networks:
    """The encoders and the decoder of an FVAE.

    Args:
        config: `FVAELoRAConfig`.
        width: Integer, the width d of the input.
        finalized: Boolean. Whether only what the mean of q1 needs is held.
    """

    feature_packing: Packing
    latent_packing: Packing

    def __init__(
        self, config: FVAELoRAConfig, width: int, finalized: bool
    ) -> None:
        self.config = config
        self.feature_packing, self.latent_packing = layout(
            config, width, finalized
        )
        self.elbo: Callable[..., Any] = traced_once(
            self._draw_and_elbo, "training"
        )
        self.rematerialized_elbo: Callable[..., Any] = traced_once(
            self._rematerialized_elbo
        )

    def unpack(
        self, feature_weights: Tensor, latent_weights: Tensor, prefix: str = ""
    ) -> dict[str, Tensor]:
        """The weights by name: those whose names begin with `prefix`."""
        return {
            **self.feature_packing.unpack(feature_weights, prefix),
            **self.latent_packing.unpack(latent_weights, prefix),
        }

    @property
    def z1_mean_widths(self) -> tuple[int, ...]:
        """The widths of the layers that lead from x to the mean of q1."""
        return (*self.config.hidden_units, self.config.rank)

    def posterior_mean(
        self, x: Tensor, feature_weights: Tensor, latent_weights: Tensor
    ) -> Tensor:
        """The mean of q1 alone: all that an update needs at inference.

        Args:
            x: Tensor of shape `(..., d)`.
            feature_weights: Tensor, as `feature_packing` packs it.
            latent_weights: Tensor, as `latent_packing` packs it.

        Returns:
            Float32 tensor of shape `(..., rank)`.
        """
        packing, packed = self.feature_packing, feature_weights
        for level, width in enumerate(self.z1_mean_widths):
            kernel = packing.unpack_one(packed, f"encoder_kernel_{level}")
            if level > 0:
                x = ops.relu(x)
                kernel = reshape(kernel, (x.shape[-1], -1))
            packing, packed = self.latent_packing, latent_weights
            bias = packing.unpack_one(packed, f"encoder_bias_{level}")
            # The first trunk's first head is the mean of q1.
            x = affine(x, kernel[:, :width], bias[:width])
        return ops.cast(x, "float32")

    def posteriors(
        self, x: Tensor, feature_weights: Tensor, latent_weights: Tensor
    ) -> Posteriors:
        """q1 and q2, without dropout.

        Args:
            x: Tensor of shape `(..., d)`.
            feature_weights: Tensor, as `feature_packing` packs it.
            latent_weights: Tensor, as `latent_packing` packs it.

        Returns:
            `Posteriors`.
        """
        weights = self.unpack(feature_weights, latent_weights, "encoder")
        return self._encode(x, weights)

    def widths_to_draw(
        self, training: bool | None, noise: Tensor | None
    ) -> dict[str, int]:
        """How many random numbers a token needs in a step, and for what.

        Args:
            training: Boolean, whether there is dropout.
            noise: The noise, if it is given, or `None`.

        Returns:
            Dict of name to integer.
        """
        config = self.config
        widths = {}
        if noise is None and (training or config.sample_at_inference):
            widths["noise"] = 2 * config.rank
        if training and config.dropout > 0:
            num_trunks = self.latent_packing.shapes["encoder_bias_0"][0]
            for level, units in enumerate(config.hidden_units):
                widths[f"encoder_{level}"] = num_trunks * units
            for level, units in enumerate(config.decoder_units):
                widths[f"decoder_{level}"] = units
        return widths

    def draws_shape(self, *shape: Any) -> tuple[Any, ...]:
        """The shape of latents: with several draws there is an axis more."""
        if self.config.num_samples > 1:
            return (self.config.num_samples, *shape)
        return shape

    def _draw_and_elbo(self, inputs, seed=None, training=True):
        """The latents and the loss.

        Args:
            inputs: Dict of the arguments of `_elbo` that are not drawn.
            seed: What `next_seed` returned. `None` (default) if nothing
                is drawn.
            training: Boolean, whether there is dropout. Defaults to `True`.

        Returns:
            A `ELBO`.
        """
        return self._elbo(**inputs, **self._draw(inputs, seed, training))

    def _rematerialized_elbo(self, inputs, seed):
        """As `_draw_and_elbo` in training, and little is kept of it."""
        return rematerialize(self._draw, self._elbo, inputs, seed)

    def _draw(self, inputs, seed=None, training=True):
        """The random numbers of a step: arguments of `_elbo`."""
        widths = self.widths_to_draw(training, inputs.get("noise"))
        if not widths:
            return {}
        num_tokens = ops.shape(inputs["x"])[0]
        noise_width = widths.pop("noise", 0)
        noise, masks = noise_and_masks(
            self.draws_shape(num_tokens),
            seed,
            noise_width,
            [*widths.values()],
            self.config.dropout,
        )
        drawn = {"dropout_masks": dict(zip(widths, masks))}
        if self.config.num_samples > 1:
            # The encoders run once for all draws.
            for name, mask in drawn["dropout_masks"].items():
                if name.startswith("encoder"):
                    drawn["dropout_masks"][name] = mask[0]
        if noise_width:
            shape = self.draws_shape(num_tokens, 2, self.config.rank)
            drawn["noise"] = reshape(noise, shape)
        return drawn

    def _elbo(
        self,
        x,
        feature_weights,
        latent_weights,
        coefficients,
        token_weights=None,
        noise=None,
        dropout_masks=(),
    ):
        """The latents and the loss.

        Args:
            x: Tensor of shape `(tokens, d)`.
            feature_weights: Tensor, as `feature_packing` packs it.
            latent_weights: Tensor, as `latent_packing` packs it.
            coefficients: Tensor of shape `(4,)`: `elbo_weight`, b, and c
                for z1 and for z2.
            token_weights: Optional tensor of shape `(tokens,)`, as
                `replicas.token_weights` returns it.
            noise: Optional tensor shaped like the latents, `(..., tokens, 2,
                rank)`; `None` for latents that are the posteriors' means.
            dropout_masks: Dict of hidden layer to boolean tensor of the shape
                of its units, those that dropout keeps.

        Returns:
            A `ELBO`.
        """
        weights = self.unpack(feature_weights, latent_weights)
        posteriors = self._encode(x, weights, dropout_masks)
        z = posteriors.mean
        if noise is not None:
            z = reparameterize(posteriors, noise)
        # The scale is the same for every token, so the squared error is
        # averaged over the tokens before it is divided by the scale.
        squared_error = lean_gradients.mean_squared_error(
            self._decode(z, weights, x.dtype, dropout_masks),
            ops.transpose(weights["decoder_output_kernel"]),
            weights["decoder_output_bias"],
            x,
            token_weights,
        )
        terms, log_priors = self._terms(posteriors, z, token_weights)
        terms["negative_log_likelihood"] = objective.negative_log_likelihood(
            squared_error, ops.exp(weights["log_std"]) + STD_FLOOR
        )
        loss = -self._objective(terms, log_priors, coefficients)
        return ELBO(posteriors, z, squared_error, terms, loss)

    def _encode(self, x, weights, dropout_masks=()):
        """The posteriors; the trunks of the encoders run side by side."""
        token_shape = ops.shape(x)[:-1]
        for level in range(len(self.config.hidden_units) + 1):
            kernel = weights[f"encoder_kernel_{level}"]
            if level == 0:
                # Every trunk reads x.
                kernel = reshape(kernel, (kernel.shape[0], -1))
            else:
                x = self._activate(x, dropout_masks, f"encoder_{level - 1}")
                kernel = _block_diagonal(kernel)
            bias = reshape(weights[f"encoder_bias_{level}"], (-1,))
            x = affine(x, kernel, bias)
        # Of each posterior, the mean and the log variance.
        heads = reshape(
            ops.cast(x, "float32"), (*token_shape, 2, 2, self.config.rank)
        )
        mean, log_variance = ops.unstack(heads, 2, axis=-2)
        log_variance = lean_gradients.clip(log_variance, *LOG_VARIANCE_LIMITS)
        return Posteriors(mean, log_variance)

    def _decode(self, z, weights, dtype, dropout_masks):
        """The decoder's last hidden layer, or what the decoder reads."""
        if self.config.latent_fusion == "concat":
            x = reshape(z, (*ops.shape(z)[:-2], 2 * self.config.rank))
        else:
            x = ops.mean(z, axis=-2)
        x = ops.cast(x, dtype)
        for level in range(len(self.config.decoder_units)):
            kernel = weights[f"decoder_kernel_{level}"]
            x = affine(x, kernel, weights[f"decoder_bias_{level}"])
            x = self._activate(x, dropout_masks, f"decoder_{level}")
        return x

    def _activate(self, x, dropout_masks, name):
        """ReLU and dropout of a hidden layer."""
        if name in dropout_masks:
            return lean_gradients.relu_and_dropout(
                x, dropout_masks[name], self.config.dropout
            )
        return ops.relu(x)

    def _terms(self, posteriors, z, token_weights):
        """The terms of the latents, means over the tokens that count.

        Returns:
            Dict of scalar tensors, and the pair of log p1(z1) and log p2(z2).
        """

        def mean(values):
            return token_mean(values, token_weights, feature_axes=2)

        means, log_variance = posteriors
        prior_means = pair(0.0, self.config.prior_mean, means)[:, None]
        prior_stds = pair(1.0, self.config.prior_std, means)[:, None]
        # The terms are linear in these two, so their means come first.
        squared_distance = mean(
            objective.squared_distance(means, log_variance, prior_means)
        )
        log_variance = mean(log_variance)
        kl_z1, kl_z2 = ops.unstack(
            objective.kl_divergence(squared_distance, log_variance, prior_stds),
            2,
        )
        if self.config.gamma_estimator == "monte_carlo":
            squared_distance = mean(ops.square(z - prior_means))
        log_p1, log_p2 = ops.unstack(
            objective.log_density(squared_distance, prior_stds), 2
        )
        terms = {"kl_z1": kl_z1, "kl_z2": kl_z2, "gamma": log_p2 - log_p1}
        return terms, (log_p1, log_p2)

    def _objective(self, terms, log_priors, coefficients):
        log_likelihood = -terms["negative_log_likelihood"]
        kl_z1, kl_z2 = terms["kl_z1"], terms["kl_z2"]
        _, kl_weight, *gamma_weights = ops.unstack(coefficients, 4)
        if self.config.objective == "fvae":
            return objective.fvae(
                log_likelihood,
                kl_z1,
                *log_priors,
                self.config.reconstruction_weight,
                kl_weight,
                gamma_weights,
            )
        if self.config.objective == "vae2lat":
            return objective.vae2lat(log_likelihood, kl_z1, kl_z2)
        return objective.beta_vae2lat(log_likelihood, kl_z1, kl_z2, kl_weight)


@functools.cache
def _networks_for(config, width, finalized):
    return Networks(config, width, finalized)


def _block_diagonal(kernels):
    """One matrix from kernels `(in, n, out)`, for n inputs side by side.

    Half or more of it is zeros, but these products are small, and one runs
    faster than n.
    """
    width, count, units = kernels.shape
    blocks = reshape(ops.eye(count), (count, 1, count, 1)) * kernels
    return reshape(blocks, (count * width, count * units))


def reparameterize(q: Posterior | Posteriors, noise: Tensor) -> Tensor:
    """z = mean + standard deviation * noise."""
    noise = ops.cast(noise, "float32")
    return lean_gradients.add_noise(q.mean, q.log_variance, noise)
