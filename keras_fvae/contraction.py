"""How a kernel contracts: einsum equations as maps from tokens to units."""

import functools
import math
import string
from typing import NamedTuple

from keras import ops


class Contraction(NamedTuple):
    """An einsum equation, seen as a linear map of each token's vector.

    Args:
        input_order: Tuple of integers, the permutation of the input's axes
            that puts the token axes first and the contracted axes last.
        output_order: Tuple of integers, the permutation that takes the token
            axes followed by the carried axes to the output's order.
        contracted: Tuple of integers, the kernel axes that are contracted.
        carried: Tuple of integers, the kernel axes that the output keeps.
        num_token_axes: Integer, how many token axes there are.
        num_leading_token_axes: Integer, how many of them come first in the
            input.
    """

    input_order: tuple
    output_order: tuple
    contracted: tuple
    carried: tuple
    num_token_axes: int
    num_leading_token_axes: int

    def width(self, kernel_shape):
        """The width of a token's vector."""
        return math.prod(kernel_shape[axis] for axis in self.contracted)

    def units(self, kernel_shape):
        """The number of outputs of a token."""
        return math.prod(kernel_shape[axis] for axis in self.carried)

    def to_tokens(self, inputs):
        """From the layer's input to tensors of shape `(*tokens, width)`."""
        x = _transpose(inputs, self.input_order)
        if len(self.contracted) == 1:
            return x
        shape = ops.shape(x)[: self.num_token_axes]
        width = math.prod(x.shape[self.num_token_axes :])
        return ops.reshape(x, (*shape, width))

    def from_tokens(self, outputs, kernel_shape):
        """From shape `(*tokens, units)` to the layer's output."""
        if len(self.carried) != 1:
            units_shape = [kernel_shape[axis] for axis in self.carried]
            shape = (*ops.shape(outputs)[: self.num_token_axes], *units_shape)
            outputs = ops.reshape(outputs, shape)
        return _transpose(outputs, self.output_order)


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
    ):
        raise ValueError(
            f"FVAE-LoRA cannot adapt the einsum equation '{equation}'. Each "
            "axis of the kernel must be either contracted with the input or "
            "carried to the output, and each other axis of the input must be "
            "kept in the output, as in 'abc,cde->abde' or 'btnh,nhd->btd'."
        )
    is_leading = [c in tokens for c in inputs] + [False]
    return Contraction(
        input_order=tuple(inputs.index(c) for c in tokens + contracted),
        output_order=tuple((tokens + carried).index(c) for c in outputs),
        contracted=tuple(kernel.index(c) for c in contracted),
        carried=tuple(kernel.index(c) for c in carried),
        num_token_axes=len(tokens),
        num_leading_token_axes=is_leading.index(False),
    )


def _transpose(x, order):
    return x if order == tuple(range(len(order))) else ops.transpose(x, order)
