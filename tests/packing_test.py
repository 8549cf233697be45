import numpy as np
import pytest
from helpers import to_numpy
from helpers import value_and_gradients
from keras import ops

from keras_fvae.backend.packing import Packing

SHAPES = {
    "one": {"a": (4, 2, 3)},
    "several": {"a": (4, 2, 3), "b": (4,), "other": (4, 5)},
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_what_is_packed_comes_out_again(shapes, rng):
    packing = Packing(shapes, num_shared_axes=1)
    arrays = {name: rng.normal(size=shapes[name]) for name in shapes}
    packed = packing.pack(arrays)
    assert tuple(packed.shape) == packing.shape
    for array in (packed, to_numpy(packed)):
        unpacked = packing.unpack(array)
        assert [*unpacked] == [*shapes]
        for name, part in unpacked.items():
            np.testing.assert_allclose(to_numpy(part), arrays[name], rtol=1e-6)
            np.testing.assert_array_equal(
                to_numpy(packing.unpack_one(array, name)),
                to_numpy(part).reshape(4, -1),
            )
    assert [*packing.unpack(packed, prefix="a")] == ["a"]


def test_the_gradient_of_a_part_lies_where_the_part_does(rng):
    packing = Packing(SHAPES["several"], num_shared_axes=1)
    array = rng.normal(size=packing.shape).astype("float32")

    def loss(array):
        return ops.sum(ops.square(packing.unpack(array)["b"]))

    _, _, (gradient,) = value_and_gradients(loss, [], [array])
    expected = np.zeros(packing.shape)
    expected[:, 6] = 2 * array[:, 6]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
