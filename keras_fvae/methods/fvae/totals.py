"""The terms of an FVAE, summed over the steps of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_fvae.backend import packing
from keras_fvae.backend.token_mean import token_mean
from keras_fvae.backend.types import Tensor

TERMS = (
    "fvae_loss",
    "negative_log_likelihood",
    "kl_z1",
    "gamma",
    "wasserstein",
)
# What `TermTotals.means` gives, beside what was added to the loss.
NAMES = (*TERMS, "active_units", "signal_to_noise", "explained_variance")
# From where on a latent unit counts as active: Burda et al., "Importance
# Weighted Autoencoders" (2016), section 5.2.
ACTIVE_UNIT_VARIANCE = 0.01


class TermTotals:
    """Running sums in one variable, so that a step adds to them at once.

    The variable is state of a compiled step and no weight of the model: it is
    neither trained nor saved.

    Args:
        rank: Integer, width of the latents.
        width: Integer, that of what is reconstructed.
    """

    def __init__(self, rank: int, width: int) -> None:
        self.widths: tuple[int, ...] = (len(TERMS) + 6, rank, rank, width)
        self.variable: keras.Variable = keras.Variable(
            ops.zeros((sum(self.widths),)),
            trainable=False,
            autocast=False,
            aggregation="sum",
            name="term_totals",
        )

    def add(
        self,
        terms: Mapping[str, Tensor],
        x: Tensor,
        squared_error: Tensor,
        q1: Any,
        token_weights: Tensor | None = None,
    ) -> None:
        """Adds a step.

        Args:
            terms: Dict of scalar tensors with the names in `TERMS`, and of
                `added_loss`, what the layer adds to the model's loss.
            x: Tensor of shape `(tokens, d)`, what is reconstructed.
            squared_error: Tensor of shape `(d,)`, the mean over tokens.
            q1: `Posterior` of the tokens.
            token_weights: Optional tensor of shape `(tokens,)`, as
                `replicas.token_weights` returns it.
        """
        x = ops.cast(x, "float32")
        x_mean, x_square, z1_total, z1_square, z1_noise = (
            token_mean(values, token_weights, feature_axes=1)
            for values in (
                x,
                ops.square(x),
                q1.mean,
                ops.square(q1.mean),
                ops.exp(q1.log_variance),
            )
        )
        # Keras's mean of the loss has the batches by their size, too.
        num_tokens = ops.sum(ops.ones_like(x[:, 0]))
        scalars = [terms[name] for name in TERMS]
        scalars += [
            terms["added_loss"] * num_tokens,
            num_tokens,
            ops.sum(squared_error),
            ops.sum(x_square),
            ops.sum(z1_noise),
            ops.ones(()),
        ]
        step = ops.concatenate(
            [ops.stack(scalars), z1_total, z1_square, x_mean]
        )
        self.variable.assign_add(step)

    def reset(self) -> None:
        """Begins anew."""
        self.variable.assign(ops.zeros(self.variable.shape))

    def means(self) -> dict[str, float] | None:
        """What the steps since the last `reset` come to.

        Returns:
            Dict of floats: the means of the terms, `active_units`, how many
            units of z1 have a posterior mean that varies from token to token,
            `signal_to_noise`, by how much those means vary beside the noise
            that is drawn, `explained_variance`, the share of the variance
            of x that the decoder reconstructs, and `added_loss`, what the
            layer added to the model's loss, its mean over the examples, as
            that of the loss is. `None` if there was no step.
        """
        totals = ops.convert_to_numpy(self.variable).astype("float64")
        scalars, z1_total, z1_square, x_total = packing.split(
            totals, self.widths
        )
        *terms, added, num_tokens, squared_error, x_square, noise, num_steps = (
            scalars
        )
        if num_steps == 0:
            return None
        # Of all steps, because a step may have a single token.
        variance = x_square - ((x_total / num_steps) ** 2).sum() * num_steps
        z1_variance = z1_square / num_steps - (z1_total / num_steps) ** 2
        return {
            **{name: term / num_steps for name, term in zip(TERMS, terms)},
            "active_units": float((z1_variance > ACTIVE_UNIT_VARIANCE).sum()),
            "signal_to_noise": z1_variance.sum() / (noise / num_steps),
            "explained_variance": (
                1 - squared_error / variance
                # Below it lies what rounding leaves of a variance of 0.
                if variance > 1e-5 * x_square
                else 0.0
            ),
            "added_loss": added / num_tokens,
        }
