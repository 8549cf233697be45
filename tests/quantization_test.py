"""Adapters on quantized bases."""

import functools

import keras
import numpy as np
import pytest
import small_models
from helpers import dtype_of
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.model import lookup

SMALL = {"rank": 2, "decoder_units": (4,)}


@pytest.fixture(params=["int8", "int4"])
def mode(request):
    return request.param


def quantized_weights(model):
    return {
        weight.path: to_numpy(weight)
        for weight in model.weights
        if "int" in dtype_of(weight)
    }


@pytest.mark.parametrize(
    "name, mode",
    [
        ("functional", "int4"),
        pytest.param("text_classifier", "int8", marks=pytest.mark.one_backend),
    ],
)
def test_a_quantized_model_is_adapted_trained_and_saved(name, mode, tmp_path):
    model = small_models.MODELS[name]()
    # A quantized head could not be trained.
    inner = getattr(model, "backbone", model)
    inner.quantize(mode, filters=lambda layer: layer.name != "head")
    base_predictions = small_models.predict(model, name)
    head = ["head"] if name == "functional" else []
    keras_fvae.enable_fvae_lora(inner, trainable_layer_names=head, **SMALL)
    np.testing.assert_array_equal(
        small_models.predict(model, name), base_predictions
    )
    before = quantized_weights(model)
    assert before
    small_models.compile_model(model, name)
    losses = small_models.fit(model, name, epochs=10).history["loss"]
    assert min(losses) < losses[0]
    for path, value in quantized_weights(model).items():
        np.testing.assert_array_equal(value, before[path])
    for layer in lookup.adapted_layers(model):
        assert layer.quantization_mode == mode
        assert {w.dtype for w in layer.adapter.weights} == {"float32"}
    predictions = small_models.predict(model, name)
    assert np.abs(predictions - base_predictions).max() > 0.01
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        small_models.predict(loaded, name), predictions, atol=1e-6
    )
    layers = lookup.adapted_layers(loaded)
    assert {layer.quantization_mode for layer in layers} == {mode}


@pytest.mark.one_backend
def test_adapters_of_a_float_model_load_onto_a_quantized_one(rng, tmp_path):
    model = small_models.make_text_classifier()
    other = small_models.make_text_classifier()
    other.set_weights(model.get_weights())
    model.backbone.enable_fvae_lora(**SMALL)
    move_adapters(model, rng, scale=0.5)
    path = tmp_path / "task.safetensors"
    model.backbone.save_adapter(path)
    other.quantize("int8")
    base_predictions = small_models.predict(other, "text_classifier")
    other.backbone.load_adapter(path)
    predictions = small_models.predict(other, "text_classifier")
    expected = small_models.predict(model, "text_classifier")
    error = np.abs(predictions - expected).max()
    assert error < np.abs(base_predictions - expected).max() / 2


@pytest.mark.shared_out
@pytest.mark.parametrize("einsum", [True, False])
def test_the_update_comes_before_the_activation(mode, einsum, rng):
    inputs = keras.Input((5, 4))
    if einsum:
        layer = keras.layers.EinsumDense(
            "abc,cde->abde", (None, 2, 3), bias_axes="de", activation="tanh"
        )
    else:
        layer = keras.layers.Dense(6, activation="tanh")
    model = keras.Model(inputs, layer(inputs))
    model.quantize(mode)
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    linear = np.arctanh(to_numpy(model(x)))
    keras_fvae.enable_fvae_lora(model, 2, layer.name, decoder_units=(4,))
    move_adapters(model, rng, scale=0.3)
    nothing = functools.partial(ops.zeros, linear.shape)
    call = FrozenCall(layer, nothing, ops.convert_to_tensor(x))
    update = to_numpy(layer.adapter.adapt(call, training=False))
    assert np.abs(update).max() > 0.05
    np.testing.assert_allclose(
        to_numpy(model(x)), np.tanh(linear + update), atol=1e-5
    )


@pytest.mark.parametrize("name", ["functional", "text_classifier", "backbone"])
def test_quantizing_an_adapted_model_says_the_order(name):
    model = small_models.MODELS[name]()
    keras_fvae.enable_fvae_lora(getattr(model, "backbone", model), **SMALL)
    before = snapshot(model)
    with pytest.raises(ValueError, match="quantized before it is"):
        model.quantize("int8")
    assert snapshot(model) == before


def test_a_model_around_an_adapted_one_is_not_half_quantized_in_silence():
    inner = small_models.make_sequential()
    keras_fvae.enable_fvae_lora(inner, **SMALL)
    inputs = keras.Input((8,))
    outer = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    with pytest.raises(ValueError, match="quantized before it is"):
        outer.quantize("int8")


@pytest.mark.parametrize("other_mode", ["float8", "gptq"])
def test_other_modes_are_refused(other_mode):
    model = small_models.make_sequential()
    if other_mode == "float8":
        model.quantize("float8")
    else:
        config = keras.quantizers.GPTQConfig(dataset=["a"], tokenizer=str)
        for layer in model.layers:
            layer.quantize(config=config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'{other_mode}'.*'int8' and 'int4'"):
        keras_fvae.enable_fvae_lora(model, **SMALL)
    assert snapshot(model) == before
