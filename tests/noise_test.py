"""Random numbers against their distributions."""

import itertools

import keras
import numpy as np
import pytest
import scipy.stats
from helpers import BACKEND
from helpers import dtype_of
from helpers import to_numpy

from keras_fvae.backend.noise import are_at_least
from keras_fvae.backend.noise import next_seed
from keras_fvae.backend.noise import noise_and_masks
from keras_fvae.backend.noise import seeds_set
from keras_fvae.backend.noise import to_normal

SHAPE = (50, 40)
# Neither is a multiple of the numbers that PyTorch draws at once.
MASK_WIDTHS = 7, 354


def draw(seed, calls=1, noise_width=10, rate=0.1):
    """Noise and masks of calls in a row, NumPy arrays."""
    generator = keras.random.SeedGenerator(seed)
    drawn = []
    for _ in range(calls):
        noise, masks = noise_and_masks(
            SHAPE, next_seed(generator), noise_width, MASK_WIDTHS, rate
        )
        assert dtype_of(noise) == "float32"
        assert {dtype_of(mask) for mask in masks} == {"bool"}
        drawn.append((to_numpy(noise), *map(to_numpy, masks)))
    return drawn


def test_the_shapes():
    (arrays,) = draw(seed=1)
    assert [array.shape for array in arrays] == [
        (*SHAPE, width) for width in (10, *MASK_WIDTHS)
    ]
    noise, masks = noise_and_masks(
        SHAPE, next_seed(keras.random.SeedGenerator(1)), 3
    )
    assert tuple(noise.shape) == (*SHAPE, 3)
    assert len(masks) == 0


def test_noise_is_normal():
    ((noise, *_),) = draw(seed=1)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert_independent(noise)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.75, 1 - 1e-9])
def test_masks_keep_their_share(rate):
    ((_, *masks),) = draw(seed=1, rate=rate)
    for mask in masks:
        # PyTorch keeps no smaller share than one that is not 0.
        share = max(1 - rate, 2.0**-16)
        error = 5 * np.sqrt(share * (1 - share) / mask.size)
        assert np.mean(mask) == pytest.approx(1 - rate, abs=error + 2.0**-16)


def test_masks_are_independent():
    ((_, _, mask),) = draw(seed=1, rate=0.5)
    assert_independent(mask)


def assert_independent(values):
    """That no number says anything of another in its set, nor of the next."""
    columns = values.reshape(-1, values.shape[-1]).astype("float64")
    columns = np.concatenate([columns[:-1], columns[1:]], axis=-1)
    correlations = np.corrcoef(columns.T)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 6 / np.sqrt(len(columns))


def test_calls_and_seeds_share_no_numbers():
    # The layers' seeds are one apart.
    drawn = [call for seed in (1, 2, 10**6) for call in draw(seed, calls=3)]
    for arrays in zip(*drawn):
        correlations = np.corrcoef([array.ravel() for array in arrays])
        np.fill_diagonal(correlations, 0)
        assert np.abs(correlations).max() < 5 / np.sqrt(arrays[0].size)
    # Nor does one repeat another's, shifted.
    values = np.concatenate([noise.ravel()[:1000] for noise, *_ in drawn])
    assert len(np.unique(values)) > 0.99 * len(values)


def test_the_seed_fixes_the_numbers():
    for one, other in zip(draw(seed=3, calls=2), draw(seed=3, calls=2)):
        for array, same in zip(one, other):
            np.testing.assert_array_equal(array, same)


def test_the_state_moves_on_as_keras_moves_it():
    ours, theirs = (keras.random.SeedGenerator(5) for _ in range(2))
    for _ in range(2):
        seed = next_seed(ours)
        seed = np.array(seed.numbers) if BACKEND == "torch" else to_numpy(seed)
        np.testing.assert_array_equal(seed, to_numpy(theirs.next()))
    np.testing.assert_array_equal(to_numpy(ours.state), to_numpy(theirs.state))


@pytest.mark.skipif(BACKEND != "torch", reason="The others ask no host")
def test_a_state_is_asked_for_once_and_when_it_has_changed(monkeypatch):
    import torch

    asked = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda t: (asked.append(1), original(t))[1]
    )
    generator = keras.random.SeedGenerator(5)

    def next_numbers():
        return next_seed(generator).numbers

    assert [next_numbers() for _ in range(3)] == [(5, 0), (5, 1), (5, 2)]
    assert len(asked) == 1
    # However it is changed.
    generator.state.assign([7, 3])
    assert [next_numbers() for _ in range(2)] == [(7, 3), (7, 4)]
    with torch.no_grad():
        generator.state.value[1] += 4
    assert next_numbers() == (7, 9)
    with keras.StatelessScope([(generator.state, torch.tensor([1, 2]))]):
        assert [next_numbers() for _ in range(2)] == [(1, 2), (1, 3)]
    assert next_numbers() == (7, 10)
    with torch.inference_mode():
        other = keras.random.SeedGenerator(5)
        assert [next_seed(other).numbers[1] for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_blocks_may_end_in_any_order(order):
    """Not all of them have all generators."""
    generators = [keras.random.SeedGenerator(seed) for seed in (7, 8)]
    of_block = [generators, generators[:1], generators[::-1]]

    def states():
        return [to_numpy(generator.state).tolist() for generator in generators]

    blocks, history = {}, [states()]
    for number, those in enumerate(of_block):
        blocks[number] = seeds_set(those, seed=number)
        blocks[number].__enter__()
        history.append(states())
    for number in order:
        blocks.pop(number).__exit__(None, None, None)
        # That of the last block that is still there, and has the generator.
        for index, generator in enumerate(generators):
            those = [n for n in blocks if generator in of_block[n]]
            last = max(those, default=-1) + 1
            assert states()[index] == history[last][index]


def test_a_block_that_cannot_begin_changes_nothing():
    generator = keras.random.SeedGenerator(7)
    before = to_numpy(generator.state)
    with pytest.raises(AttributeError), seeds_set([generator, None], seed=1):
        pass
    np.testing.assert_array_equal(to_numpy(generator.state), before)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.75])
def test_the_share_of_the_smallest(share):
    # Each number of 16 bits once.
    numbers = np.arange(-(2**15), 2**15, dtype="int16")
    found = are_at_least(keras.ops.convert_to_tensor(numbers), share)
    expected = np.arange(2**16) >= share * 2**16
    # To the last of its bits.
    assert np.sum(to_numpy(found) != expected) <= 1


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has its own")
def test_the_ends_of_the_uniform_numbers_are_finite():
    last, half = 2**32 - 1, 2**31
    ends = np.array([[0, last, half, 0], [half, 0, 0, half]], "uint32")
    normal = to_normal(keras.ops.convert_to_tensor(ends))
    first = np.array([[2.0**-33, 1.0], [0.5, 2.0**-33]])
    expected = np.sqrt(-2 * np.log(first)) * [[-1, 1], [1, -1]]
    np.testing.assert_allclose(to_numpy(normal), expected, atol=1e-5)
