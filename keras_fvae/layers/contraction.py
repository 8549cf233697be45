"""How a kernel contracts: einsum equations as maps from tokens to units."""

import functools
import math
import string
from typing import NamedTuple

from keras import ops

from keras_fvae.backend import fast_ops


class Contraction(NamedTuple):
    """An einsum equation, seen as a linear map of each token's vector.

    Args:
        token_axes: Tuple of integers, the input's axes that count tokens.
        contracted_axes: Tuple of integers, the input's other axes, in the
            order of the kernel's.
        kernel_contracted_axes: Tuple of integers, the kernel's axes that are
            contracted.
        kernel_carried_axes: Tuple of integers, the kernel's axes that are
            carried to the output.
        output_order: Tuple of integers, the permutation that takes the token
            axes followed by the carried axes to the output's order.
    """

    token_axes: tuple
    contracted_axes: tuple
    kernel_contracted_axes: tuple
    kernel_carried_axes: tuple
    output_order: tuple

    @property
    def num_leading_token_axes(self):
        """How many token axes come first in the input."""
        return sum(i == axis for i, axis in enumerate(self.token_axes))

    @property
    def num_kernel_axes(self):
        """How many axes the kernel has."""
        return len(self.matrix_order)

    @property
    def matrix_order(self):
        """Tuple of integers, the kernel's axes: contracted, then carried."""
        return self.kernel_contracted_axes + self.kernel_carried_axes

    def width(self, kernel_shape):
        """The width of a token's vector."""
        return math.prod(kernel_shape[i] for i in self.kernel_contracted_axes)

    def units(self, kernel_shape):
        """The number of outputs for each token."""
        return math.prod(kernel_shape[i] for i in self.kernel_carried_axes)

    def bias_shape(self, kernel_shape):
        """The shape of a bias for each unit, added to the output."""
        num_tokens = len(self.token_axes)
        sizes = [1] * num_tokens
        sizes += [kernel_shape[i] for i in self.kernel_carried_axes]
        is_token = [axis < num_tokens for axis in self.output_order]
        first_unit = is_token.index(False)
        return tuple(sizes[axis] for axis in self.output_order[first_unit:])

    def token_shape(self, inputs):
        """The shape of the token axes of a layer's input."""
        shape = ops.shape(inputs)
        return tuple(shape[axis] for axis in self.token_axes)

    def to_tokens(self, inputs, kernel_shape):
        """From a layer's input to a vector for each token, on the last axis."""
        x = _transpose(inputs, self.token_axes + self.contracted_axes)
        if len(self.contracted_axes) == 1:
            return x
        return ops.reshape(
            x, (*self.token_shape(inputs), self.width(kernel_shape))
        )

    def from_tokens(self, outputs, inputs, kernel_shape):
        """From outputs for each token, on the last axis, to the layer's."""
        units_shape = [kernel_shape[i] for i in self.kernel_carried_axes]
        shape = (*self.token_shape(inputs), *units_shape)
        return _transpose(ops.reshape(outputs, shape), self.output_order)

    def to_matrix(self, kernel):
        """A kernel, or array of its shape, as a matrix `(d, k)`."""
        order = self.matrix_order
        shape = self.width(kernel.shape), self.units(kernel.shape)
        return ops.reshape(_transpose(kernel, order), shape)

    def from_matrix(self, matrix, kernel_shape):
        """A NumPy matrix `(d, k)` in the shape of the kernel."""
        order = self.matrix_order
        matrix = matrix.reshape([kernel_shape[axis] for axis in order])
        return matrix.transpose([order.index(i) for i in range(len(order))])

    def add_product(self, outputs, tokens, matrix, inputs, kernel_shape):
        """Adds a map of tokens to a layer's outputs.

        Args:
            outputs: Tensor, the layer's outputs. On PyTorch they change.
            tokens: Tensor of shape `(..., rank)`, a vector for each token.
            matrix: Tensor of shape `(rank, units)`.
            inputs: Tensor, the layer's input.
            kernel_shape: Tuple of integers, the shape of the layer's kernel.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        if _is_range(self.output_order):
            total = fast_ops.add_matmul(outputs, tokens, matrix)
            if total is not None:
                return total
        product = ops.matmul(
            ops.cast(tokens, outputs.dtype), ops.cast(matrix, outputs.dtype)
        )
        outputs += self.from_tokens(product, inputs, kernel_shape)
        return outputs


@functools.cache
def analyze_equation(equation, input_rank):
    """Reads an einsum equation of two operands, the input and the kernel.

    Args:
        equation: String, as `keras.layers.EinsumDense` takes it.
        input_rank: Integer, the number of axes of the input.

    Returns:
        A `Contraction`.

    Raises:
        ValueError: If a kernel axis is neither contracted with the input nor
            carried to the output, or an input axis is neither contracted with
            the kernel nor kept in the output.
    """
    operands, outputs = equation.split("->")
    inputs, kernel = operands.split(",")
    if "..." in inputs:
        unused = (c for c in string.ascii_letters if c not in equation)
        num_elided = input_rank - len(inputs.replace("...", ""))
        elided = "".join(next(unused) for _ in range(num_elided))
        inputs = inputs.replace("...", elided)
        outputs = outputs.replace("...", elided)

    contracted = [c for c in kernel if c in inputs and c not in outputs]
    carried = [c for c in outputs if c in kernel and c not in inputs]
    tokens = [c for c in inputs if c in outputs and c not in kernel]
    if (
        sorted(contracted + carried) != sorted(kernel)
        or sorted(tokens + contracted) != sorted(inputs)
        or sorted(tokens + carried) != sorted(outputs)
        or any(len({*axes}) < len(axes) for axes in (inputs, kernel, outputs))
    ):
        raise ValueError(
            f"No adapter fits the einsum equation '{equation}'. Each "
            "axis of the kernel must be either contracted with the input or "
            "carried to the output, and each other axis of the input must be "
            "kept in the output, as in 'abc,cde->abde' or 'btnh,nhd->btd'."
        )
    return Contraction(
        token_axes=tuple(inputs.index(c) for c in tokens),
        contracted_axes=tuple(inputs.index(c) for c in contracted),
        kernel_contracted_axes=tuple(kernel.index(c) for c in contracted),
        kernel_carried_axes=tuple(kernel.index(c) for c in carried),
        output_order=tuple((tokens + carried).index(c) for c in outputs),
    )


def _transpose(x, order):
    return x if _is_range(order) else ops.transpose(x, order)


def _is_range(order):
    return order == tuple(range(len(order)))
