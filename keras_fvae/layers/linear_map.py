"""What a frozen layer is to its adapter: a linear map of vectors."""

from __future__ import annotations

import math

import numpy as np
from keras import ops

from keras_fvae.backend import fast_ops
from keras_fvae.backend.types import Tensor


class LinearMap:
    """A frozen layer, seen as a matrix that multiplies each token's vector.

    A token is a vector of width d that the kernel is applied to, a unit one of
    the k outputs for each token. All contracted axes of the kernel are joined
    to d, all carried axes to k: so the kernel is a matrix of shape `(d, k)`.

    Its kinds are `Contraction` and `Convolution`, which say where the tokens
    are in the layer's input, and the units in its outputs.

    Attributes:
        kernel_contracted_axes: Tuple of integers, the kernel's axes that are
            contracted with the input.
        kernel_carried_axes: Tuple of integers, the kernel's axes that are
            carried to the output.
    """

    kernel_contracted_axes: tuple[int, ...]
    kernel_carried_axes: tuple[int, ...]

    @property
    def num_kernel_axes(self) -> int:
        """How many axes the kernel has."""
        return len(self.matrix_order)

    @property
    def matrix_order(self) -> tuple[int, ...]:
        """Tuple of integers, the kernel's axes: contracted, then carried."""
        return self.kernel_contracted_axes + self.kernel_carried_axes

    @property
    def num_leading_token_axes(self) -> int:
        """How many axes that count tokens come first in the input."""
        raise NotImplementedError

    @property
    def has_units_last(self) -> bool:
        """Whether the outputs are the tokens', in their order, units last."""
        raise NotImplementedError

    def width(self, kernel_shape: tuple[int, ...]) -> int:
        """The width of a token's vector."""
        return math.prod([kernel_shape[i] for i in self.kernel_contracted_axes])

    def units(self, kernel_shape: tuple[int, ...]) -> int:
        """The number of outputs for each token."""
        return math.prod([kernel_shape[i] for i in self.kernel_carried_axes])

    def bias_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a bias for each unit, as the layer holds it."""
        raise NotImplementedError

    def to_matrix(self, kernel: Tensor) -> Tensor:
        """A kernel, or array of its shape, as a matrix `(d, k)`."""
        shape = self.width(kernel.shape), self.units(kernel.shape)
        return ops.reshape(transpose(kernel, self.matrix_order), shape)

    def from_matrix(
        self, matrix: np.ndarray, kernel_shape: tuple[int, ...]
    ) -> np.ndarray:
        """A NumPy matrix `(d, k)` in the shape of the kernel."""
        order = self.matrix_order
        matrix = matrix.reshape([kernel_shape[axis] for axis in order])
        return matrix.transpose([order.index(i) for i in range(len(order))])

    def to_tokens(
        self, inputs: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        """From a layer's input to a vector for each token, on the last axis."""
        raise NotImplementedError

    def from_tokens(
        self, outputs: Tensor, inputs: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        """From outputs for each token, on the last axis, to the layer's."""
        raise NotImplementedError

    def broadcast_bias(self, bias: Tensor) -> Tensor:
        """A bias of the layer, such that it broadcasts to the outputs."""
        return bias

    def mask_tokens(self, mask: Tensor | None, inputs: Tensor) -> Tensor | None:
        """From a mask of the first axes of the input to one of the tokens'."""
        return mask

    def project(
        self, inputs: Tensor, matrix: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        """The tokens times a matrix.

        Args:
            inputs: Tensor, the layer's input.
            matrix: Variable or tensor of shape `(d, rank)`, of few columns.
            kernel_shape: Tuple of integers, the shape of the layer's kernel.

        Returns:
            Tensor of shape `(..., rank)`, of the dtype of `inputs`.
        """
        tokens = self.to_tokens(inputs, kernel_shape)
        return fast_ops.thin_matmul(tokens, matrix)

    def multiply(
        self, inputs: Tensor, matrix: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        """The layer's outputs by another kernel, without a bias.

        Args:
            inputs: Tensor, the layer's input.
            matrix: Tensor of shape `(d, k)`, that kernel.
            kernel_shape: Tuple of integers, the shape of the layer's kernel.

        Returns:
            Tensor of the shape of the outputs, of the dtype of `inputs`.
        """
        tokens = self.to_tokens(inputs, kernel_shape)
        outputs = ops.matmul(tokens, ops.cast(matrix, tokens.dtype))
        return self.from_tokens(outputs, inputs, kernel_shape)

    def multiply_tokens(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        """Vectors `(..., rank)`, one for each token, times `(rank, k)`."""
        return ops.matmul(tokens, matrix)

    def add_product(
        self,
        outputs: Tensor,
        tokens: Tensor,
        matrix: Tensor,
        inputs: Tensor,
        kernel_shape: tuple[int, ...],
    ) -> Tensor:
        """Adds a map of tokens to a layer's outputs.

        Args:
            outputs: Tensor, the layer's outputs. On PyTorch they change.
            tokens: Tensor of shape `(..., rank)`, a vector for each token.
            matrix: Tensor of shape `(rank, k)`.
            inputs: Tensor, the layer's input.
            kernel_shape: Tuple of integers, the shape of the layer's kernel.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        if self.has_units_last:
            total = fast_ops.add_matmul(outputs, tokens, matrix)
            if total is not None:
                return total
        product = self.multiply_tokens(
            ops.cast(tokens, outputs.dtype), ops.cast(matrix, outputs.dtype)
        )
        outputs += self.from_tokens(product, inputs, kernel_shape)
        return outputs


def transpose(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`x` with its axes in an order, a tuple of integers."""
    return x if is_range(order) else ops.transpose(x, order)


def is_range(order: tuple[int, ...]) -> bool:
    """Whether an order of axes is that in which they are."""
    return order == tuple(range(len(order)))
