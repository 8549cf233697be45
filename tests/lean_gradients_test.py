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


def test_squared_distance(arrays, rng):
    mean, log_variance, upstream = arrays
    prior_mean = rng.normal(size=(5, 1)).astype("float32")
    tensor = ops.convert_to_tensor(prior_mean)
    value, _, gradients = value_and_gradients(
        lambda *q: dot(upstream, lean_gradients.squared_distance(*q, tensor)),
        [],
        [mean, log_variance],
    )
    distance, variance = mean - prior_mean, np.exp(log_variance)
    np.testing.assert_allclose(
        value, np.sum(upstream * (distance**2 + variance)), rtol=1e-4
    )
    np.testing.assert_allclose(gradients[0], 2 * upstream * distance, rtol=1e-5)
    np.testing.assert_allclose(gradients[1], upstream * variance, rtol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="the gradients are PyTorch's")
@pytest.mark.parametrize(
    "name",
    ["add_noise", "squared_distance", "relu_and_dropout", "mean_squared_error"],
)
def test_gradients_of_gradients(name, arrays, dropout_mask, decoder):
    """A penalty on the gradients, beside that of plain operations."""
    import torch

    mean, log_variance, third = map(torch.tensor, arrays)
    mask = torch.tensor(dropout_mask)
    hidden, kernel, bias, x = map(torch.tensor, decoder)
    weights = torch.tensor([0.5, 0, 0.3, 0.2, 0])
    given, plain = {
        "add_noise": (
            [mean, log_variance],
            lambda m, v: m + torch.exp(v / 2) * third,
        ),
        "squared_distance": (
            [mean, log_variance],
            lambda m, v: (m - third) ** 2 + torch.exp(v),
        ),
        "relu_and_dropout": (
            [mean],
            lambda x: torch.where(mask, torch.relu(x) / (1 - RATE), 0),
        ),
        "mean_squared_error": (
            [hidden, kernel, bias, x],
            lambda h, k, b, x: (
                ((h @ k + b - x) ** 2 * weights[:, None]).sum(1).mean(0)
            ),
        ),
    }[name]
    fixed = {
        "relu_and_dropout": (mask, RATE),
        "mean_squared_error": (weights,),
    }.get(name, (third,))

    def penalty_gradients(function):
        tensors = [each.clone().requires_grad_() for each in given]
        value = torch.sum(torch.sin(function(*tensors)))
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        penalty = sum(torch.sum(each**2) for each in gradients)
        return torch.autograd.grad(penalty, tensors)

    lean = getattr(lean_gradients, name)
    for gradient, expected in zip(
        penalty_gradients(lambda *tensors: lean(*tensors, *fixed)),
        penalty_gradients(plain),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


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


@pytest.fixture
def decoder(rng):
    """Hidden units, a kernel, a bias, and what is to come of them."""
    shapes = (3, 5, 7), (7, 40), (40,), (5, 40)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_draws", [None, 3])
def test_mean_squared_error(num_draws, is_weighted, decoder, rng):
    hidden, kernel, bias, x = decoder
    if num_draws is None:
        hidden = hidden[0]
    upstream = rng.normal(size=40).astype("float32")
    token_weights = np.full(5, 0.2, "float32")
    given = None
    if is_weighted:
        token_weights = np.array([0.5, 0, 0.3, 0.2, 0], "float32")
        given = ops.convert_to_tensor(token_weights)
    value, _, gradients = value_and_gradients(
        lambda *arrays: dot(
            upstream, lean_gradients.mean_squared_error(*arrays, given)
        ),
        [],
        [hidden, kernel, bias, x],
    )
    error = hidden @ kernel + bias - x
    weights = upstream * token_weights[:, None] / (num_draws or 1)
    np.testing.assert_allclose(value, np.sum(weights * error**2), rtol=1e-4)
    of_error = 2 * weights * error
    of_draws = of_error.reshape(-1, 5, 40)
    for gradient, expected in zip(
        gradients,
        (
            of_error @ kernel.T,
            hidden.reshape(-1, 7).T @ of_error.reshape(-1, 40),
            of_draws.sum((0, 1)),
            -of_draws.sum(0),
        ),
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch tells what it keeps")
def test_no_masks_noise_or_errors_are_kept(arrays, dropout_mask, decoder):
    import torch

    def shapes_of_what_is_kept(function, *tensors):
        kept = []

        def keep(tensor):
            kept.append((tensor.dtype, tuple(tensor.shape)))
            return tensor

        tensors = [torch.tensor(each, requires_grad=True) for each in tensors]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function(*tensors)
        return kept

    mask = torch.tensor(dropout_mask)
    assert shapes_of_what_is_kept(
        lambda x: lean_gradients.relu_and_dropout(x, mask, RATE), arrays[0]
    ) == [(torch.float32, (5, 40))]
    *q, noise = arrays
    of_q = [(torch.float32, (5, 40))] * 2
    # Of the latents the mean, and what came of it.
    assert of_q == shapes_of_what_is_kept(
        lambda *q: lean_gradients.add_noise(*q, torch.tensor(noise)), *q
    )
    prior_mean = torch.ones(())
    assert [*of_q, (torch.float32, ())] == shapes_of_what_is_kept(
        lambda *q: lean_gradients.squared_distance(*q, prior_mean), *q
    )
    hidden, kernel, bias, x = decoder
    assert shapes_of_what_is_kept(
        lambda *given: lean_gradients.mean_squared_error(*given, None),
        *(hidden[0], kernel, bias, x),
    ) == [(torch.float32, shape) for shape in ((5, 7), (7, 40), (40,), (5, 40))]
