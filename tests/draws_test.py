"""Random numbers against their distributions."""

import keras
import numpy as np
import scipy.stats
from helpers import BACKEND
from helpers import dtype_of
from helpers import to_numpy

from keras_fvae import draws

SHAPE = (50, 400)


def draw(seed, calls=1):
    generator = keras.random.SeedGenerator(seed)
    seeds = draws.seeds(generator, calls)
    return [to_numpy(draws.uniform(SHAPE, seed)) for seed in seeds]


def test_numbers_are_uniform():
    (numbers,) = draw(seed=1)
    assert numbers.shape == SHAPE
    assert numbers.min() >= 0 and numbers.max() < 1
    assert scipy.stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3


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
    assert scipy.stats.kstest(to_numpy(normal).ravel(), "norm").pvalue > 1e-3


def test_the_ends_of_the_uniform_numbers_are_finite():
    # The largest number below 1 that a backend draws.
    step = 2**-24 if BACKEND == "torch" else 2**-23
    ends = np.array([0.0, 0.5, 1 - step], "float32")
    normal = to_numpy(draws.to_normal(keras.ops.convert_to_tensor(ends)))
    assert np.isfinite(normal).all()
    np.testing.assert_allclose(normal[1], 0, atol=1e-6)
    assert normal[0] < -5 and normal[2] > 5
