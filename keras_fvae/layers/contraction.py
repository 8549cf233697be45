"""How a kernel contracts: einsum equations as maps from tokens to units."""

from __future__ import annotations

import dataclasses
import functools
import string
from typing import Any

from keras import ops

from keras_fvae.backend.fast_ops import reshape
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.linear_map import is_range
from keras_fvae.layers.linear_map import transpose


@dataclasses.dataclass(frozen=True)
class Contraction(LinearMap):
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

    token_axes: tuple[int, ...]
    contracted_axes: tuple[int, ...]
    kernel_contracted_axes: tuple[int, ...]
    kernel_carried_axes: tuple[int, ...]
    output_order: tuple[int, ...]

    @property
    def num_leading_token_axes(self) -> int:
        return sum(i == axis for i, axis in enumerate(self.token_axes))

    @property
    def has_units_last(self) -> bool:
        return is_range(self.output_order)

    def bias_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        num_tokens = len(self.token_axes)
        sizes = [1] * num_tokens
        sizes += [kernel_shape[i] for i in self.kernel_carried_axes]
        is_token = [axis < num_tokens for axis in self.output_order]
        first_unit = is_token.index(False)
        return tuple(sizes[axis] for axis in self.output_order[first_unit:])

    def token_shape(self, inputs: Tensor) -> tuple[Any, ...]:
        """The shape of the token axes of a layer's input."""
        shape = ops.shape(inputs)
        return tuple(shape[axis] for axis in self.token_axes)

    def to_tokens(
        self, inputs: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        x = transpose(inputs, self.token_axes + self.contracted_axes)
        if len(self.contracted_axes) == 1:
            return x
        return reshape(x, (*self.token_shape(inputs), self.width(kernel_shape)))

    def from_tokens(
        self, outputs: Tensor, inputs: Tensor, kernel_shape: tuple[int, ...]
    ) -> Tensor:
        units_shape = [kernel_shape[i] for i in self.kernel_carried_axes]
        shape = (*self.token_shape(inputs), *units_shape)
        return transpose(reshape(outputs, shape), self.output_order)


@functools.cache
def analyze_equation(equation: str, input_rank: int) -> Contraction:
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
