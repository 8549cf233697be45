"""Several arrays in one variable.

An optimizer pays for each variable about the same, however small it is: in
kernel launches, in operations to trace, in slots to keep. The networks of an
FVAE would have some twenty small ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_fvae.backend.fast_ops import reshape
from keras_fvae.backend.types import Tensor


class Packing:
    """Where each of several arrays lies in the one that holds them all.

    The arrays share their first axes, if any; what follows these is laid side
    by side along the last axis.

    Args:
        shapes: Dict of name to shape.
        num_shared_axes: Integer, how many first axes the arrays share.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], num_shared_axes: int = 0
    ) -> None:
        self.shapes = shapes
        self.shared_shape: tuple[int, ...] = next(iter(shapes.values()))[
            :num_shared_axes
        ]
        self.sizes: list[int] = [
            math.prod(s[num_shared_axes:]) for s in shapes.values()
        ]
        ends = [*itertools.accumulate(self.sizes)]
        self.slices: dict[str, slice] = dict(
            zip(shapes, map(slice, [0, *ends], ends))
        )
        self.shape: tuple[int, ...] = (*self.shared_shape, ends[-1])

    def pack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """From a dict of name to array to the one array."""
        return ops.concatenate(
            [
                ops.reshape(arrays[name], (*self.shared_shape, -1))
                for name in self.shapes
            ],
            axis=-1,
        )

    def unpack(self, array: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """From the one array to a dict; of views, if it is a NumPy array.

        Args:
            array: Array of shape `self.shape`.
            prefix: String. Only arrays whose names begin so are unpacked.
        """
        return {
            name: part if part.shape == shape else reshape(part, shape)
            for (name, shape), part in zip(
                self.shapes.items(), split(array, self.sizes)
            )
            if name.startswith(prefix)
        }

    def unpack_one(self, array: Tensor, name: str) -> Tensor:
        """One of the arrays, with all axes that it does not share as one.

        A slice: for where there is no gradient, which would be padded to the
        size of the whole.
        """
        return array[..., self.slices[name]]


def split(array: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Parts of an array, along its last axis.

    Not slices: the gradient is then one array, put together once, and not the
    sum of as many as there are parts.

    Args:
        array: Tensor or NumPy array of shape `(..., sum(sizes))`.
        sizes: List of integers, how many columns each part has.

    Returns:
        List of arrays of shape `(..., size)`.
    """
    if not isinstance(array, np.ndarray):
        # Keras takes boundaries, and gets to the sizes in a dozen operations,
        # which `torch.compile` can't do.
        if keras.config.backend() == "torch":
            return array.split(sizes, dim=-1)
        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            return tf.split(array, sizes, axis=-1)
    boundaries = [*itertools.accumulate(sizes)][:-1]
    if isinstance(array, np.ndarray):
        return np.split(array, boundaries, axis=-1)
    return ops.split(array, boundaries, axis=-1)
