import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import value_and_gradients
from keras import ops

from keras_fvae.backend.noise import noise_and_masks
from keras_fvae.backend.rematerialization import rematerialize

pytestmark = pytest.mark.skipif(
    BACKEND == "torch", reason="`keras.remat` is used there"
)
NUM_BLOCKS = 3
SEED_DTYPE = keras.random.SeedGenerator(1).state.dtype


def draw(inputs, seed=None):
    """What a block needs of random numbers: a dropout mask."""
    if seed is None:
        return {}
    units = inputs["kernel"].shape[-1]
    _, (mask,) = noise_and_masks(
        inputs["x"].shape[:-1], seed, 0, [units], rate=0.1
    )
    return {"mask": mask}


def block(x, kernel, mask=None):
    """A layer with dropout, and what it comes to."""
    hidden = ops.relu(ops.matmul(x, kernel))
    if mask is not None:
        hidden *= ops.cast(mask, "float32")
    x = x + ops.matmul(hidden, ops.transpose(kernel))
    return {"x": x, "size": ops.mean(ops.square(x))}


def loss_of(call, kernel, x):
    """Of blocks in a row, each as `call(draw, block, inputs, seed)` does."""
    sizes = []
    for number in range(NUM_BLOCKS):
        inputs = {"x": x, "kernel": kernel}
        seed = ops.convert_to_tensor([1, number], SEED_DTYPE)
        outputs = call(draw, block, inputs, seed)
        x = outputs["x"]
        sizes.append(outputs["size"])
    return ops.sum(ops.sin(x)) + sum(sizes)


def plainly(draw, function, inputs, seed):
    return function(**inputs, **draw(inputs, seed))


def by_keras(draw, function, inputs, seed):
    return keras.remat(
        lambda inputs, seed: plainly(draw, function, inputs, seed)
    )(inputs, seed)


@pytest.fixture
def arrays(rng):
    shapes = (6, 6), (64, 6)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.fixture
def count_products(arrays):
    """Counts those that are left in a compiled gradient."""

    def count(call):
        tensors = [ops.convert_to_tensor(array) for array in arrays]
        if BACKEND == "jax":
            import jax

            gradient = jax.grad(lambda *t: loss_of(call, *t), argnums=(0, 1))
            compiled = jax.jit(gradient).lower(*tensors).compile().as_text()
        else:
            import tensorflow as tf

            @tf.function(jit_compile=True)
            def gradient(kernel, x):
                with tf.GradientTape() as tape:
                    tape.watch([kernel, x])
                    loss = loss_of(call, kernel, x)
                return tape.gradient(loss, [kernel, x])

            compiled = gradient.experimental_get_compiler_ir(*tensors)(
                stage="optimized_hlo"
            )
        return compiled.count(" dot(")

    return count


def test_results_and_gradients_are_the_same(arrays):
    expected, _, expected_gradients = value_and_gradients(
        lambda *tensors: loss_of(plainly, *tensors), [], arrays
    )
    value, _, gradients = value_and_gradients(
        lambda *tensors: loss_of(rematerialize, *tensors), [], arrays
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(gradients, expected_gradients):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_results_that_the_loss_leaves_out_add_nothing(arrays):
    kernel, x = arrays

    def size(kernel, x):
        inputs = {"x": x, "kernel": kernel}
        return rematerialize(draw, block, inputs, None)["size"]

    _, _, (kernel_gradient, _) = value_and_gradients(size, [], arrays)
    step = 1e-2 * kernel_gradient
    values = [
        value_and_gradients(size, [], [kernel + sign * step, x])[0]
        for sign in (1, -1)
    ]
    assert (values[0] - values[1]) / 2 == pytest.approx(
        np.sum(step * kernel_gradient), rel=1e-2
    )


def test_xla_does_not_join_the_second_computation_with_the_first(
    count_products,
):
    # A block has two products, and the gradient needs the results of both.
    all_twice = count_products(plainly) + 2 * NUM_BLOCKS
    assert count_products(rematerialize) == all_twice
    # When this fails, `keras.remat` is all that is needed.
    assert count_products(by_keras) < all_twice
