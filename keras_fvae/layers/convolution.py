"""How a kernel convolves: convolutions as maps from patches to filters."""

from __future__ import annotations

import dataclasses
import itertools
import math

from keras import ops

from keras_fvae.backend import fast_ops
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.linear_map import LinearMap


@dataclasses.dataclass(frozen=True)
class Convolution(LinearMap):
    """A convolution, seen as a linear map of each patch.

    A token is a patch: what the kernel sees of the input for one position of
    the output, a vector of width d, the size of the kernel times the number of
    channels, in the order of the kernel's axes. A unit is a filter.

    Args:
        size: Tuple of integers, the kernel's size along each spatial axis.
        strides: Tuple of integers, one for each spatial axis.
        padding: `"valid"`, `"same"` or, along one axis, `"causal"`.
        dilation: Tuple of integers, one for each spatial axis.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    dilation: tuple[int, ...]
    data_format: str

    @property
    def kernel_contracted_axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(len(self.size) + 1))

    @property
    def kernel_carried_axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.size) + 1,)

    @property
    def is_pointwise(self) -> bool:
        """Whether a patch is of one position: then it is a `Dense` layer."""
        return math.prod(self.size) == 1

    @property
    def num_leading_token_axes(self) -> int:
        return len(self.size) + 1 if self.has_units_last else 1

    @property
    def has_units_last(self) -> bool:
        return self.data_format == "channels_last"

    def bias_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(kernel_shape[-1:])

    def broadcast_bias(self, bias: Tensor) -> Tensor:
        if self.has_units_last:
            return bias
        return ops.reshape(bias, (-1, *[1] * len(self.size)))

    def to_tokens(
        self, inputs: Tensor, kernel_shape: tuple[int, ...] | None
    ) -> Tensor:
        x = self._to_channels_last(self._pad(inputs))
        if self.is_pointwise:
            return fast_ops.subsample(x, self.strides)
        # For each place in the kernel, what it sees of all patches.
        parts = []
        for place in itertools.product(*map(range, self.size)):
            slices = map(_slice, place, self.size, self.strides, self.dilation)
            parts.append(x[(slice(None), *slices)])
        return ops.concatenate(parts, axis=-1)

    def from_tokens(
        self, outputs: Tensor, inputs: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        return outputs if self.has_units_last else ops.moveaxis(outputs, -1, 1)

    def mask_tokens(self, mask: Tensor | None, inputs: Tensor) -> Tensor | None:
        """A patch counts if any part of it does."""
        if mask is None or len(mask.shape) == 1:
            return mask
        positions = ops.shape(inputs)[:-1]
        missing_axes = len(positions) - len(mask.shape)
        mask = ops.reshape(mask, (*ops.shape(mask), *[1] * missing_axes, 1))
        mask = ops.broadcast_to(ops.cast(mask, "float32"), (*positions, 1))
        return ops.any(self.to_tokens(mask, kernel_shape=None), axis=-1)

    def project(
        self, inputs: Tensor, matrix: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        if self.is_pointwise:
            return super().project(inputs, matrix, kernel_shape)
        outputs = self.multiply(inputs, matrix, kernel_shape)
        return self._to_channels_last(outputs)

    def multiply(
        self, inputs: Tensor, matrix: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        kernel = ops.reshape(matrix, (*kernel_shape[:-1], matrix.shape[-1]))
        padding = self.padding
        if padding == "causal":
            inputs, padding = self._pad(inputs), "valid"
        return fast_ops.conv(
            inputs,
            ops.cast(kernel, inputs.dtype),
            self.strides,
            padding,
            self.data_format,
            self.dilation,
        )

    def multiply_tokens(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        # On JAX the gradient of a matrix product would transpose that of the
        # outputs, which takes longer than all the rest.
        kernel = ops.reshape(matrix, (*[1] * len(self.size), *matrix.shape))
        return ops.conv(tokens, kernel, data_format="channels_last")

    def _to_channels_last(self, x):
        return x if self.has_units_last else ops.moveaxis(x, 1, -1)

    def _pad(self, inputs):
        """The input with the zeros around it that the layer adds."""
        if self.padding == "valid" or self.is_pointwise:
            return inputs
        shape = ops.shape(inputs)
        first = 1 if self.has_units_last else 2
        widths = [(0, 0)] * len(shape)
        for axis in range(len(self.size)):
            widths[first + axis] = self._padding(axis, shape[first + axis])
        return ops.pad(inputs, widths)

    def _padding(self, axis, length):
        """How many zeros go before and after the input along an axis."""
        reach = (self.size[axis] - 1) * self.dilation[axis]
        if self.padding == "causal":
            return reach, 0
        stride = self.strides[axis]
        total = reach + 1 - stride + -length % stride
        # TensorFlow may not know the length yet.
        is_known = isinstance(total, int)
        total = max(total, 0) if is_known else ops.maximum(total, 0)
        return total // 2, total - total // 2


def _slice(place, size, stride, dilation):
    """What one place in a kernel sees, along an axis of the padded input."""
    places_after = size - 1 - place
    return slice(place * dilation, -places_after * dilation or None, stride)
