"""Operations with custom gradients that save outputs, and not inputs.

On JAX, XLA computes in the backward pass again what is cheap to compute, and
keeps what that begins with: here the random bits, several times as large as
what came of them. PyTorch takes a pass over memory for each operation.
"""

from __future__ import annotations

import inspect

import keras
from keras import ops

from keras_fvae.backend.token_mean import token_mean
from keras_fvae.backend.types import Tensor


def relu_and_dropout(x: Tensor, dropout_mask: Tensor, rate: float) -> Tensor:
    """ReLU and dropout.

    Args:
        x: Float tensor.
        dropout_mask: Boolean tensor of the same shape, the units that stay.
        rate: Float in `(0, 1)`, the share of those that don't.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    scale = 1 / (1 - rate)
    # The ReLU last, so that there is one result to keep, and not two.
    if keras.config.backend() == "torch":
        # Keras would copy the 0 to the device.
        return torch.where(dropout_mask, x * scale, 0).relu()
    if keras.config.backend() == "tensorflow":
        return ops.relu(ops.where(dropout_mask, x * scale, 0))

    @ops.custom_gradient
    def compute(x, dropout_mask):
        y = ops.where(dropout_mask, ops.relu(x * scale), 0)

        def gradients(upstream):
            # Neither lets anything through where nothing came of it.
            return ops.where(y > 0, upstream * scale, 0), None

        return y, gradients

    return compute(x, dropout_mask)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """Clips x to `[low, high]`.

    Args:
        x: Float tensor.
        low: Float.
        high: Float.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    if keras.config.backend() == "torch":
        # Keras would copy the limits to the device.
        return x.clamp(low, high)
    if keras.config.backend() == "tensorflow":
        return ops.clip(x, low, high)

    @ops.custom_gradient
    def compute(x):
        y = ops.clip(x, low, high)

        def gradients(upstream):
            # JAX would halve it at the limits, which takes four comparisons.
            return ops.where((low < y) & (y < high), upstream, 0)

        return y, gradients

    return compute(x)


def add_noise(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """mean + standard deviation * noise.

    Args:
        mean: Float32 tensor.
        log_variance: Float32 tensor of the same shape.
        noise: Float32 tensor of the same shape. On JAX it has no gradient.

    Returns:
        Float32 tensor of the same shape.
    """

    def compute(mean, log_variance, noise):
        return mean + ops.exp(0.5 * log_variance) * noise

    if keras.config.backend() != "jax":
        return compute(mean, log_variance, noise)

    @ops.custom_gradient
    def compute_leanly(mean, log_variance, noise):
        z = compute(mean, log_variance, noise)

        def gradients(upstream):
            return upstream, 0.5 * upstream * (z - mean), None

        return z, gradients

    return compute_leanly(mean, log_variance, noise)


def token_mean_of_squares(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """The mean over the tokens of what is squared.

    Args:
        x: Float32 tensor of shape `(..., tokens, d)`.
        token_weights: Optional tensor of shape `(tokens,)`, as in
            `token_mean.token_mean`.

    Returns:
        Float32 tensor of shape `(d,)`.
    """
    if keras.config.backend() == "torch":
        return _TokenMeanOfSquares.apply(x, token_weights)
    return token_mean(ops.square(x), token_weights, feature_axes=1)


if keras.config.backend() == "torch":
    import torch

    class _TokenMeanOfSquares(torch.autograd.Function):
        """With a gradient in one pass, for which PyTorch takes four."""

        @staticmethod
        def forward(x, token_weights):
            return token_mean(torch.square(x), token_weights, feature_axes=1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, upstream):
            x, token_weights = ctx.saved_tensors
            num_tokens, width = x.shape[-2:]
            num_draws = x.numel() // (num_tokens * width)
            scale = 2 * upstream / num_draws
            if token_weights is None:
                return x * (scale / num_tokens), None
            return x * scale * token_weights[:, None], None

    # PyTorch asks for it in each call, and Python takes long to find it out.
    _TokenMeanOfSquares.forward.__signature__ = inspect.signature(
        _TokenMeanOfSquares.forward
    )
