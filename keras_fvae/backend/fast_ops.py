"""Operations that one of the backends does faster in another way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fvae.backend.types import Tensor


def affine(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """`x kernel + bias`, in the dtype of `x`.

    Args:
        x: Tensor of shape `(..., d)`.
        kernel: Tensor of shape `(d, units)`.
        bias: Tensor of shape `(units,)`.

    Returns:
        Tensor of shape `(..., units)`.
    """
    if keras.config.backend() == "torch":
        # In one operation, where Keras's take longer to call than to run.
        import torch

        kernel, bias = kernel.to(x.dtype), bias.to(x.dtype)
        if len(x.shape) == 2:
            return torch.addmm(bias, x, kernel)
        rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), kernel)
        return rows.reshape(*x.shape[:-1], kernel.shape[-1])
    kernel, bias = ops.cast(kernel, x.dtype), ops.cast(bias, x.dtype)
    return ops.matmul(x, kernel) + bias


def thin_matmul(x: Tensor, kernel: Tensor) -> Tensor:
    """`x kernel`, in the dtype of `x`, for a kernel of few columns.

    Args:
        x: Tensor of shape `(..., d)`.
        kernel: Tensor or `keras.Variable` of shape `(d, units)`.

    Returns:
        Tensor of shape `(..., units)`.
    """
    kernel = ops.convert_to_tensor(kernel)
    if keras.config.backend() == "torch":
        import torch

        # Few rows take MKL a third of the time that few columns do, and their
        # gradient a fifth.
        rows = kernel.to(x.dtype).t().contiguous()
        return torch.nn.functional.linear(x, rows)
    return ops.matmul(x, ops.cast(kernel, x.dtype))


def add_matmul(y: Tensor, x: Tensor, kernel: Tensor) -> Tensor | None:
    """`y + x kernel`, in the dtype of `y`, or `None`.

    Args:
        y: Tensor of shape `(..., units)`. It may be changed in place.
        x: Tensor of shape `(..., d)`.
        kernel: Tensor of shape `(d, units)`.

    Returns:
        Tensor of the shape of `y`; `None` if there is no faster way than to
        multiply, and then to add.
    """
    if keras.config.backend() != "torch":
        return None
    import torch

    # Where `torch.vmap` maps, a tensor stands for many.
    if torch._C._functorch.maybe_current_level() is not None:
        return None
    rows = x.reshape(-1, x.shape[-1]).to(y.dtype)
    kernel = kernel.to(y.dtype)
    # A gradient would have to be copied for what is changed in place.
    if torch.is_grad_enabled() or not y.is_contiguous():
        sums = y.reshape(-1, kernel.shape[-1])
        return torch.addmm(sums, rows, kernel).view(y.shape)
    y.view(-1, kernel.shape[-1]).addmm_(rows, kernel)
    return y


def reshape(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """`keras.ops.reshape`, of a NumPy array as well.

    Args:
        x: Tensor or NumPy array.
        shape: Sequence of integers or scalar tensors.

    Returns:
        Tensor or NumPy array.
    """
    if isinstance(x, np.ndarray) or keras.config.backend() == "torch":
        # Keras would take longer to look for symbolic tensors in the shape
        # than PyTorch takes for a small product.
        return x.reshape(shape)
    return ops.reshape(x, shape)


def pair(first: float, second: float, like: Tensor) -> Tensor:
    """Two numbers, of the dtype of a tensor, and where that one is.

    Args:
        first: Float.
        second: Float.
        like: Float tensor.

    Returns:
        Tensor of shape `(2,)`.
    """
    if keras.config.backend() == "torch":
        import torch

        # It begins on the device: Python would wait for a GPU, at each copy
        # that it makes there, until all that was asked of it is done.
        return torch.linspace(
            first, second, 2, dtype=like.dtype, device=like.device
        )
    return ops.convert_to_tensor([first, second], like.dtype)


def conv(
    inputs: Tensor,
    kernel: Tensor,
    strides: tuple[int, ...],
    padding: str,
    data_format: str,
    dilation_rate: tuple[int, ...],
) -> Tensor:
    """`keras.ops.conv`."""
    options = strides, padding
    if keras.config.backend() == "torch" and data_format == "channels_last":
        # A view, as PyTorch reads it, where Keras copies the input twice.
        inputs = ops.moveaxis(inputs.contiguous(), -1, 1)
        outputs = ops.conv(
            inputs, kernel, *options, "channels_first", dilation_rate
        )
        return ops.moveaxis(outputs, 1, -1)
    return ops.conv(inputs, kernel, *options, data_format, dilation_rate)


def subsample(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Every so many positions along the axes between the first and the last.

    Args:
        x: Float tensor of shape `(batch, ..., channels)`.
        strides: Tuple of integers, one for each axis between.

    Returns:
        Tensor of the dtype of `x`.
    """
    if math.prod(strides) == 1:
        return x
    if keras.config.backend() == "tensorflow":
        # Means of one position each. The gradient of a slice with strides
        # would take several times as long as the convolution.
        return ops.average_pool(x, 1, strides, data_format="channels_last")
    return x[(slice(None), *(slice(None, None, step) for step in strides))]


def traced_once(
    function: Callable[..., Any], *static_arguments: str
) -> Callable[..., Any]:
    """A function that JAX traces once for all layers with the same shapes.

    Not so TensorFlow, whose XLA would compute what the gradient of an inner
    `tf.function` takes from it while it compiles.
    """
    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function, static_argnames=static_arguments)
    return function


def traced_in_parts(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that `torch.compile` does not trace, but all that it calls.

    A model with adapters is nested deeper than Python lets it trace as one.
    `torch.export` traces otherwise, and only as one.
    """
    if keras.config.backend() != "torch":
        return method
    import torch

    disabled = torch.compiler.disable(method, recursive=False)

    @functools.wraps(method)
    def call(*args, **kwargs):
        if torch.compiler.is_exporting():
            return method(*args, **kwargs)
        return disabled(*args, **kwargs)

    return call
