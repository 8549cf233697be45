"""The zeros beside each kernel, whose gradient is that of the kernel."""

import family
import keras
import numpy as np
import pytest
from helpers import JIT_COMPILE
from helpers import move_adapters
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.model import lookup


def train_on_batch(model, **options):
    model.compile(
        keras.optimizers.SGD(1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **options,
    )
    model.train_on_batch(family.X, family.Y)


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_their_gradient_is_the_kernels(jit_compile):
    model, plain = family.make_model(), family.make_model()
    family.adapt(model, "OPLoRA")
    before = {
        name: to_numpy(plain.get_layer(name).kernel)
        for name in ("query", "output", "up")
    }
    for each in (model, plain):
        train_on_batch(each, jit_compile=jit_compile)
    for name, kernel in before.items():
        step = to_numpy(plain.get_layer(name).kernel) - kernel
        zeros = to_numpy(model.get_layer(name).adapter.zero_kernel)
        assert np.abs(step).max() > 1e-3
        np.testing.assert_allclose(zeros, step.reshape(zeros.shape), atol=1e-6)


def test_they_change_nothing_where_another_optimizer_moved_them():
    model = family.adapt(family.make_model(), "OPLoRA")
    lora = family.make_model()
    keras_fvae.enable_adapter(
        lora,
        keras_fvae.LoRAConfig(2, seed=1),
        family.is_target,
        trainable_layer_names=["head"],
    )
    assert family.train(model) == pytest.approx(family.train(lora), rel=1e-5)
    np.testing.assert_allclose(
        family.predict(model), family.predict(lora), atol=1e-6
    )


@pytest.mark.one_backend
def test_they_are_in_no_file(rng, tmp_path):
    lora = family.make_model()
    keras_fvae.enable_adapter(
        lora, keras_fvae.LoRAConfig(2, seed=1), family.is_target
    )
    move_adapters(lora, rng)
    model = family.make_model()
    summary = keras_fvae.enable_adapter(
        model, keras_fvae.OPLoRAConfig(2), family.is_target
    )
    assert summary.inference_parameters == (
        keras_fvae.adapter_summary(lora).inference_parameters
    )
    for layer in lookup.adapted_layers(model):
        assert {*layer.adapter.get_arrays()} == {"kernel_a", "kernel_b"}
    # So that the weights of the one are those of the other.
    lora.save_weights(tmp_path / "lora.weights.h5")
    model.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_array_equal(family.predict(model), family.predict(lora))
    model.save_weights(tmp_path / "model.weights.h5")
    sizes = [
        (tmp_path / f"{name}.weights.h5").stat().st_size
        for name in ("lora", "model")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.one_backend
def test_there_is_no_scale():
    with pytest.raises(TypeError, match="alpha"):
        keras_fvae.OPLoRAConfig(2, alpha=4)
    with pytest.raises(ValueError, match="mean_squares='yes'"):
        keras_fvae.OPLoRAConfig(2, mean_squares="yes")
    model = family.adapt(family.make_model(), "OPLoRA")
    with pytest.raises(ValueError, match="no `alpha`"):
        keras_fvae.adapter_scale(model, 2.0)


# --- The mean squares.

CONFIG = keras_fvae.OPLoRAConfig(2, mean_squares=True)


@keras.saving.register_keras_serializable("op_lora_test")
def half_squared_error(y_true, y_pred):
    """A mean over the batch, whatever else there is."""
    error = ops.square(ops.cast(y_pred, "float32") - y_true)
    return ops.sum(ops.reshape(error, (ops.shape(error)[0], -1)), axis=-1) / 2


def squares_of_a_step(model, x, y, optimizer=None, **options):
    """What a step makes of the zeros, for each adapted layer."""
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    model.compile(optimizer, half_squared_error, **options)
    model.train_on_batch(x, y)
    return [
        -to_numpy(weight)
        for layer in lookup.adapted_layers(model)
        for weight in (
            layer.adapter.input_squares,
            layer.adapter.output_squares,
        )
    ]


def assert_all_close(found, expected, rtol=1e-4):
    for value, expected_value in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, expected_value, rtol=rtol)


def dense(**kwargs):
    return keras.layers.Dense(3, **kwargs)


def einsum(**kwargs):
    return keras.layers.EinsumDense("abtd,deh->atebh", (5, 3, 2, 2), **kwargs)


def convolution(**kwargs):
    return keras.layers.Conv1D(3, 2, strides=2, **kwargs)


def windows(x):
    return np.concatenate([x[:, ::2], x[:, 1::2]], axis=-1)


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
@pytest.mark.parametrize(
    "make_layer, shape, to_tokens, unit_axes",
    [
        (dense, (8, 5, 4), np.asarray, [-1]),
        (einsum, (8, 2, 5, 4), np.asarray, [2, 4]),
        (convolution, (8, 6, 4), windows, [-1]),
    ],
)
def test_mean_squares(
    make_layer, shape, to_tokens, unit_axes, jit_compile, rng
):
    x = rng.normal(size=shape).astype("float32")
    layer = make_layer(activation="tanh", name="layer")
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    keras_fvae.enable_adapter(model, CONFIG, "layer")
    outputs = to_numpy(model(x))
    y = rng.normal(size=outputs.shape)
    found = squares_of_a_step(model, x, y, jit_compile=jit_compile)

    tokens = to_tokens(x)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    gradient = (outputs - y) * (1 - outputs**2) / len(x)
    gradient = np.moveaxis(gradient, unit_axes, range(-len(unit_axes), 0))
    gradient = len(tokens) * gradient.reshape(len(tokens), -1)
    expected = [np.mean(each**2, axis=0) for each in (tokens, gradient)]
    assert_all_close(found, expected)


@pytest.mark.one_backend
def test_mean_squares_leave_padding_out(make_attention_model, rng):
    tokens, y = rng.integers(1, 50, (8, 4)), rng.normal(size=(8, 3))
    found = []
    for padding in (0, 2):
        keras.utils.set_random_seed(0)
        model = make_attention_model()
        keras_fvae.enable_adapter(model, CONFIG)
        x = np.pad(tokens, [(0, 0), (0, padding)])
        found.append(squares_of_a_step(model, x, y))
    assert_all_close(*found)


def test_mean_squares_of_several_calls_are_those_of_one(rng):
    x, y = rng.normal(size=(2, 8, 4, 5)).astype("float32")
    layer = keras.layers.Dense(5, "tanh", name="layer")
    inputs = keras.Input((4, 5))
    halves = layer(inputs[:, :2]), layer(inputs[:, 2:])
    found = []
    for outputs in (layer(inputs), ops.concatenate(halves, axis=1)):
        model = keras.Model(inputs, outputs)
        keras_fvae.enable_adapter(model, CONFIG, "layer")
        found.append(squares_of_a_step(model, x, y))
        keras_fvae.remove_adapter(model)
    assert_all_close(*found)


def test_mean_squares_under_loss_scaling(rng):
    x, y = rng.normal(size=(2, 8, 4, 5)).astype("float32")
    found = []
    for dtype, scale in (("float32", 1.0), ("mixed_float16", 2.0**10)):
        keras.utils.set_random_seed(0)
        layer = keras.layers.Dense(5, "tanh", name="layer", dtype=dtype)
        model = keras.Sequential([keras.Input((4, 5)), layer])
        keras_fvae.enable_adapter(model, CONFIG, "layer")
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), scale
        )
        found.append(squares_of_a_step(model, x, y, optimizer))
    assert_all_close(*found, rtol=1e-2)
