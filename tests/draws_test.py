"""Random numbers against their distributions."""

import keras
import numpy as np
import pytest
import scipy.stats
from helpers import BACKEND
from helpers import dtype_of
from helpers import to_numpy

from keras_fvae import draws

SHAPE = (50, 400)


def draw(seed, calls=1):
    """NumPy arrays, as the backend draws them."""
    generator = keras.random.SeedGenerator(seed)
    return [
        to_numpy(draws.uniform(SHAPE, draws.seed(generator)))
        for _ in range(calls)
    ]


def test_numbers_are_uniform():
    (numbers,) = draw(seed=1)
    assert numbers.shape == SHAPE
    numbers = numbers / 2.0**32
    assert numbers.min() >= 0 and numbers.max() <= 1
    assert scipy.stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.75])
def test_the_share_of_the_smallest(share):
    (numbers,) = draw(seed=1)
    found = draws.are_at_least(keras.ops.convert_to_tensor(numbers), share)
    expected = numbers.astype("float64") >= share * 2.0**32
    # In float32, a threshold is not the same to the last of its 32 bits.
    assert np.mean(to_numpy(found) != expected) < 1e-3
    deviation = np.sqrt(share * (1 - share) / numbers.size)
    assert np.mean(to_numpy(found)) == pytest.approx(
        1 - share, abs=5 * deviation
    )


def test_calls_and_seeds_share_no_numbers():
    # On PyTorch, Keras adds the count of calls to the seed.
    streams = [*draw(seed=1, calls=3), *draw(seed=10**6, calls=3)]
    correlations = np.corrcoef([numbers.ravel() for numbers in streams])
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / np.sqrt(np.prod(SHAPE))
    # Nor does one repeat another's, shifted.
    values = np.concatenate([numbers.ravel()[:1000] for numbers in streams])
    assert len(np.unique(values)) > 0.99 * len(values)


def test_the_seed_fixes_the_numbers():
    for one, other in zip(draw(seed=3, calls=2), draw(seed=3, calls=2)):
        np.testing.assert_array_equal(one, other)


def test_normal_numbers_are_normal():
    (numbers,) = draw(seed=1)
    normal = draws.to_normal(keras.ops.convert_to_tensor(numbers))
    assert dtype_of(normal) == "float32"
    normal = to_numpy(normal)
    assert normal.shape[-1] * draws.NUMBERS_PER_NORMAL == numbers.shape[-1]
    assert scipy.stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
    # Nor does one say anything of another.
    correlations = np.corrcoef(normal.T)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 6 / np.sqrt(len(normal))


def test_the_ends_of_the_uniform_numbers_are_finite():
    last = 2**32 if BACKEND == "torch" else 2**32 - 1
    half = 2**31
    ends = np.array([[0, last, half, 0], [half, 0, 0, half]])
    dtype = "float32" if BACKEND == "torch" else "uint32"
    normal = draws.to_normal(keras.ops.convert_to_tensor(ends, dtype))
    first = np.array([[2.0**-33, 1.0], [0.5, 2.0**-33]])
    expected = np.sqrt(-2 * np.log(first)) * [[-1, 1], [1, -1]]
    np.testing.assert_allclose(to_numpy(normal), expected, atol=1e-5)
