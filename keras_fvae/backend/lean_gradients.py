"""Operations with custom gradients that keep less for them.

On JAX, XLA computes in the backward pass again what is cheap to compute, and
keeps what that begins with: here the random bits, several times as large as
what came of them. PyTorch keeps what each operation asks for, and takes a pass
over memory for each.
"""

from __future__ import annotations

import inspect
import math

import keras
from keras import ops

from keras_fvae.backend.fast_ops import affine
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
        return _ReLUAndDropout.apply(x, dropout_mask, scale)
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
        # Keras would copy the limits to the device. The gradient of `clamp`
        # takes five operations, that of `hardtanh` one.
        return torch.nn.functional.hardtanh(x, low, high)
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
        mean: Float32 tensor of shape `(..., latents, rank)`.
        log_variance: Float32 tensor of the same shape.
        noise: Float32 tensor of the same shape, or with an axis more in front,
            for several draws. On JAX and PyTorch it has no gradient.

    Returns:
        Float32 tensor of the shape of `noise`.
    """
    if keras.config.backend() == "torch":
        return _AddNoise.apply(mean, log_variance, noise)
    shape = ops.shape(noise)

    def flatten(tensor):
        # As what reads z does, so that it is one tensor for XLA to keep.
        if len(tensor.shape) < len(shape):
            tensor = ops.broadcast_to(tensor, shape)
        return ops.reshape(tensor, (*shape[:-2], -1))

    def compute(mean, log_variance, noise):
        return mean + ops.exp(0.5 * log_variance) * noise

    @ops.custom_gradient
    def compute_leanly(mean, log_variance, noise):
        z = compute(mean, log_variance, noise)

        def gradients(upstream):
            return upstream, 0.5 * upstream * (z - mean), None

        return z, gradients

    is_jax = keras.config.backend() == "jax"
    add = compute_leanly if is_jax else compute
    return ops.reshape(add(*map(flatten, (mean, log_variance, noise))), shape)


def squared_distance(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor
) -> Tensor:
    """(mean - prior_mean)^2 + exp(log_variance).

    Args:
        mean: Float32 tensor.
        log_variance: Float32 tensor of the same shape.
        prior_mean: Float32 tensor that broadcasts. On PyTorch it has no
            gradient.

    Returns:
        Float32 tensor of the shape of `mean`.
    """
    if keras.config.backend() == "torch":
        return _SquaredDistance.apply(mean, log_variance, prior_mean)
    return ops.square(mean - prior_mean) + ops.exp(log_variance)


def mean_squared_error(
    hidden: Tensor,
    kernel: Tensor,
    bias: Tensor,
    x: Tensor,
    token_weights: Tensor | None,
) -> Tensor:
    """The mean over the tokens of `(x - (hidden kernel + bias))^2`.

    On PyTorch the differences, as wide as x, are computed once more for the
    gradient: to keep them would take more memory than all the rest of an FVAE.

    Args:
        hidden: Float tensor of shape `(..., tokens, units)`.
        kernel: Tensor of shape `(units, d)`.
        bias: Tensor of shape `(d,)`.
        x: Float tensor of shape `(tokens, d)`.
        token_weights: Optional tensor of shape `(tokens,)`, as in
            `token_mean.token_mean`.

    Returns:
        Float32 tensor of shape `(d,)`.
    """
    if keras.config.backend() == "torch":
        # Within `torch.autocast` they may be of several.
        decoder = (each.to(x.dtype) for each in (hidden, kernel, bias))
        return _MeanSquaredError.apply(*decoder, x, token_weights)
    error = affine(hidden, kernel, bias) - x
    squares = ops.square(ops.cast(error, "float32"))
    return token_mean(squares, token_weights, feature_axes=1)


if keras.config.backend() == "torch":
    import torch

    class _ReLUAndDropout(torch.autograd.Function):
        """With a gradient for which no mask is kept."""

        @staticmethod
        def forward(x, dropout_mask, scale):
            return torch.where(dropout_mask, x * scale, 0).relu_()

        @staticmethod
        def setup_context(ctx, inputs, output):
            *_, ctx.scale = inputs
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, upstream):
            (y,) = ctx.saved_tensors
            # Neither lets anything through where nothing came of it.
            gradient = torch.ops.aten.threshold_backward(upstream, y, 0)
            return gradient.mul_(ctx.scale), None, None

    class _AddNoise(torch.autograd.Function):
        """With a gradient for which neither the noise nor its size is kept."""

        @staticmethod
        def forward(mean, log_variance, noise):
            std = torch.exp(0.5 * log_variance)
            return torch.addcmul(mean, std, noise)

        @staticmethod
        def setup_context(ctx, inputs, output):
            mean, *_ = inputs
            ctx.save_for_backward(mean, output)

        @staticmethod
        def backward(ctx, upstream):
            mean, z = ctx.saved_tensors
            gradients = upstream, 0.5 * upstream * (z - mean)
            # One mean and log variance for all draws.
            return *(each.sum_to_size(mean.shape) for each in gradients), None

    class _SquaredDistance(torch.autograd.Function):
        """With a gradient for which neither of what is added is kept."""

        @staticmethod
        def forward(mean, log_variance, prior_mean):
            return torch.square(mean - prior_mean) + torch.exp(log_variance)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, upstream):
            mean, log_variance, prior_mean = ctx.saved_tensors
            return (
                2 * upstream * (mean - prior_mean),
                upstream * torch.exp(log_variance),
                None,
            )

    class _MeanSquaredError(torch.autograd.Function):
        """With a gradient for which no differences are kept."""

        @staticmethod
        def forward(hidden, kernel, bias, x, token_weights):
            errors = _errors(hidden, kernel, bias, x)
            squares = torch.square(errors.to(torch.float32))
            return token_mean(squares, token_weights, feature_axes=1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, upstream):
            hidden, kernel, bias, x, token_weights = ctx.saved_tensors
            num_tokens = x.shape[0]
            num_draws = math.prod(hidden.shape[:-2])
            # In place: no more is held at once than where they are kept.
            errors = _errors(hidden, kernel, bias, x)
            if token_weights is None:
                errors *= upstream * (2 / num_draws / max(num_tokens, 1))
            else:
                errors *= upstream * (2 / num_draws)
                errors *= token_weights[:, None]
            rows = errors.reshape(-1, errors.shape[-1])
            hidden_rows = hidden.reshape(-1, hidden.shape[-1])
            x_gradient = None
            if ctx.needs_input_grad[3]:
                # One x for all draws.
                x_gradient = errors.sum_to_size(x.shape)
            return (
                _negated_product(rows, kernel.t()).reshape(hidden.shape),
                _negated_product(hidden_rows.t(), rows),
                -rows.sum(0),
                x_gradient,
                None,
            )

    def _errors(hidden, kernel, bias, x):
        """`x - (hidden kernel + bias)`, in one product."""
        shape = *hidden.shape[:-1], x.shape[-1]
        rows = (x - bias).expand(shape).contiguous().view(-1, x.shape[-1])
        rows.addmm_(hidden.reshape(-1, hidden.shape[-1]), kernel, alpha=-1)
        return rows.view(shape)

    def _negated_product(left, right):
        """`-(left right)`, in one operation."""
        unread = left.new_empty(())
        return torch.addmm(unread, left, right, beta=0, alpha=-1)

    # PyTorch asks for them in each call, and Python takes long to find out.
    for _function in (
        _ReLUAndDropout,
        _AddNoise,
        _SquaredDistance,
        _MeanSquaredError,
    ):
        _function.forward.__signature__ = inspect.signature(_function.forward)
