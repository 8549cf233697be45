import numpy as np
import pytest
from helpers import BACKEND
from helpers import value_and_gradients
from keras import ops

from keras_fvae.backend import lean_gradients

RATE = 0.25


@pytest.fixture
def dropout_mask(rng):
    return rng.uniform(size=(5, 40)) >= RATE


@pytest.fixture
def arrays(rng):
    """A tensor, its log variance or the like, and what is asked of them."""
    return [rng.normal(size=(5, 40)).astype("float32") for _ in range(3)]


def dot(one, other):
    return ops.sum(ops.multiply(ops.convert_to_tensor(one), other))


def test_relu_and_dropout(arrays, dropout_mask):
    x, _, upstream = arrays
    keep = ops.convert_to_tensor(dropout_mask)
    value, _, (gradient,) = value_and_gradients(
        lambda x: dot(upstream, lean_gradients.relu_and_dropout(x, keep, RATE)),
        [],
        [x],
    )
    passes = (dropout_mask & (x > 0)) / (1 - RATE)
    np.testing.assert_allclose(value, np.sum(upstream * passes * x), rtol=1e-4)
    np.testing.assert_allclose(gradient, upstream * passes, rtol=1e-6)


def test_clip(arrays):
    x, _, upstream = arrays
    value, _, (gradient,) = value_and_gradients(
        lambda x: dot(upstream, lean_gradients.clip(x, -0.5, 1.0)), [], [x]
    )
    is_within = (x > -0.5) & (x < 1.0)
    assert 0 < is_within.mean() < 1
    np.testing.assert_allclose(
        value, np.sum(upstream * np.clip(x, -0.5, 1.0)), rtol=1e-4
    )
    np.testing.assert_array_equal(gradient, upstream * is_within)


def test_add_noise(arrays, rng):
    mean, log_variance, upstream = arrays
    noise = rng.normal(size=mean.shape).astype("float32")
    tensor = ops.convert_to_tensor(noise)
    value, _, gradients = value_and_gradients(
        lambda *q: dot(upstream, lean_gradients.add_noise(*q, tensor)),
        [],
        [mean, log_variance],
    )
    scaled = np.exp(log_variance / 2) * noise
    np.testing.assert_allclose(
        value, np.sum(upstream * (mean + scaled)), rtol=1e-4
    )
    np.testing.assert_array_equal(gradients[0], upstream)
    np.testing.assert_allclose(
        gradients[1], upstream * scaled / 2, rtol=1e-4, atol=1e-6
    )


@pytest.mark.skipif(BACKEND != "jax", reason="JAX tells what it keeps")
def test_no_more_is_kept_than_the_results(arrays, dropout_mask):
    import jax

    x, log_variance, noise = arrays

    def size_of_what_is_kept(function, *tensors):
        _, gradients_of = jax.vjp(function, *tensors)
        return sum(each.nbytes for each in jax.tree.leaves(gradients_of))

    def hidden(x):
        return lean_gradients.relu_and_dropout(x, dropout_mask, RATE)

    def latents(mean, log_variance):
        return lean_gradients.add_noise(mean, log_variance, noise)

    assert size_of_what_is_kept(hidden, x) == x.nbytes
    # The mean is kept for the loss in any case.
    assert size_of_what_is_kept(latents, x, log_variance) == 2 * x.nbytes


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 40), (3, 5, 40)])
def test_token_mean_of_squares(shape, is_weighted, rng):
    x = rng.normal(size=shape).astype("float32")
    upstream = rng.normal(size=shape[-1]).astype("float32")
    token_weights = np.full(5, 0.2, "float32")
    given = None
    if is_weighted:
        token_weights = np.array([0.5, 0, 0.3, 0.2, 0], "float32")
        given = ops.convert_to_tensor(token_weights)
    value, _, (gradient,) = value_and_gradients(
        lambda x: dot(upstream, lean_gradients.token_mean_of_squares(x, given)),
        [],
        [x],
    )
    weights = token_weights[:, None] / (x.size // (5 * 40))
    expected = np.sum(upstream * weights * x**2)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(
        gradient, 2 * upstream * weights * x, rtol=1e-5, atol=1e-7
    )
