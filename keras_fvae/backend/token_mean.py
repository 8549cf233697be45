"""The mean over the tokens that count."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_fvae.backend.types import Tensor


def token_mean(
    values: Tensor, token_weights: Tensor | None = None, feature_axes: int = 0
) -> Tensor:
    """Mean over the tokens.

    Args:
        values: Tensor of shape `(tokens, ...)`, or `(draws, tokens, ...)`
            for the mean over several draws too.
        token_weights: Optional tensor of shape `(tokens,)`, what each token
            weighs. `None` (default) means all the same.
        feature_axes: Integer, how many axes follow that of the tokens; they
            are kept.

    Returns:
        Float32 tensor of the shape of the kept axes; 0 if there is no token.
    """
    values = ops.cast(values, "float32")
    axes = tuple(range(len(values.shape) - feature_axes))
    if token_weights is None:
        sizes = ops.shape(values)[: len(axes)]
        if all(isinstance(size, int) and size > 0 for size in sizes):
            if keras.config.backend() == "torch":
                # Keras takes longer to ask than PyTorch does for the mean.
                return values.mean(dim=axes)
            return ops.mean(values, axis=axes)
        # There may be no tokens, of which the mean is 0.
        num_values = ops.cast(ops.prod(ops.stack(sizes)), "float32")
        return ops.divide_no_nan(ops.sum(values, axis=axes), num_values)
    weights = ops.reshape(token_weights, (-1, *[1] * feature_axes))
    num_draws = math.prod(values.shape[: len(axes) - 1])
    return ops.sum(values * weights, axis=axes) * (1 / num_draws)
