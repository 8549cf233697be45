"""Several arrays in one variable.

An optimizer pays for each variable about the same, however small it is: in
kernel launches, in operations to trace, in slots to keep. The networks of an
FVAE would have some twenty small ones.
"""

import itertools
import math

import numpy as np
from keras import ops


class Packing:
    """Where each of several arrays lies in the one that holds them all.

    The arrays share their first axes, if any; what follows these is laid side
    by side along the last axis.

    Args:
        shapes: Dict of name to shape.
        num_shared_axes: Integer, how many first axes the arrays share.
    """

    def __init__(self, shapes, num_shared_axes=0):
        self.shapes = shapes
        self.shared_shape = next(iter(shapes.values()))[:num_shared_axes]
        sizes = [math.prod(s[num_shared_axes:]) for s in shapes.values()]
        stops = list(itertools.accumulate(sizes))
        self.ranges = dict(zip(shapes, zip([0, *stops], stops)))
        self.shape = (*self.shared_shape, stops[-1])

    def pack(self, arrays):
        """From a dict of name to array to the one array."""
        return ops.concatenate(
            [
                ops.reshape(arrays[name], (*self.shared_shape, -1))
                for name in self.shapes
            ],
            axis=-1,
        )

    def unpack(self, array, prefix=""):
        """From the one array to a dict; of views, if it is a NumPy array.

        Args:
            array: Array of shape `self.shape`.
            prefix: String. Only arrays whose names begin so are unpacked.
        """
        reshape = np.reshape if isinstance(array, np.ndarray) else ops.reshape
        arrays = {}
        for name, shape in self.shapes.items():
            if name.startswith(prefix):
                start, stop = self.ranges[name]
                arrays[name] = array[..., start:stop]
                if tuple(arrays[name].shape) != shape:
                    arrays[name] = reshape(arrays[name], shape)
        return arrays
