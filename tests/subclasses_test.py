"""Layers of classes that derive from Keras's and compute the same."""

import keras
import numpy as np
import pytest
from helpers import move_adapters
from helpers import run_python
from helpers import to_numpy

import keras_fvae


@keras.saving.register_keras_serializable(package="subclasses")
class Projection(keras.layers.Dense):
    """Made with another signature, and built in another way."""

    def __init__(self, width=6, note="", **kwargs):
        super().__init__(width, activation="tanh", **kwargs)
        self.note = note

    def build(self, input_shape):
        super().build(input_shape)
        self.kernel.assign(0.1 + to_numpy(self.kernel))

    def get_config(self):
        config = super().get_config()
        return {key: config[key] for key in ("name", "dtype", "trainable")} | {
            "width": self.units,
            "note": self.note,
        }


class Heads(keras.layers.EinsumDense):
    """Known to Keras by no name."""


class Twice(keras.layers.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training)


def make_model():
    return keras.Sequential(
        [
            keras.Input((4, 5)),
            Projection(6, note="of ours", name="query"),
            Heads("abc,cde->abde", (None, 2, 3), name="value"),
        ]
    )


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 4, 5)).astype("float32")


def predict(model, x):
    return to_numpy(model(x, training=False))


def test_a_subclass_is_adapted_in_place(rng, x):
    model = make_model()
    layers, before = [*model.layers], predict(model, x)
    keras_fvae.enable_fvae_lora(model, rank=2, decoder_units=(4,))
    np.testing.assert_array_equal(predict(model, x), before)
    move_adapters(model, rng)
    assert np.abs(predict(model, x) - before).max() > 0.01
    assert isinstance(layers[0], Projection) and layers[0].note == "of ours"
    model.compile("sgd", "mse")
    model.fit(x, np.ones((2, 4, 2, 3)), verbose=0)
    state, after = keras_fvae.get_adapter(model), predict(model, x)
    keras_fvae.remove_adapter(model)
    assert [type(layer) for layer in layers] == [Projection, Heads]
    np.testing.assert_array_equal(predict(model, x), before)
    keras_fvae.set_adapter(model, state)
    np.testing.assert_array_equal(predict(model, x), after)


@pytest.mark.parametrize("finalized", [False, True])
def test_a_subclass_is_saved(finalized, rng, x, tmp_path):
    model = make_model()
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    move_adapters(model, rng)
    if finalized:
        keras_fvae.finalize_adapter(model)
    expected = predict(model, x)
    model.save(tmp_path / "model.keras")
    with keras.saving.custom_object_scope({"Heads": Heads}):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        clone = keras.models.clone_model(model)
    np.testing.assert_allclose(predict(loaded, x), expected, atol=1e-6)
    assert [type(la).__name__ for la in loaded.layers] == [
        "Projection",
        "Heads",
    ]
    assert loaded.layers[0].note == "of ours"
    assert loaded.layers[0].adapter.finalized == finalized
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(predict(clone, x), expected, atol=1e-6)
    keras_fvae.remove_adapter(loaded)
    assert type(loaded.layers[0]) is Projection


@pytest.mark.slow
def test_a_subclass_is_loaded_in_another_process(rng, x, tmp_path):
    model = make_model()
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    move_adapters(model, rng)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    run_python(
        "-c",
        "import sys, keras, numpy as np, keras_fvae, subclasses_test as s\n"
        "with keras.saving.custom_object_scope({'Heads': s.Heads}):\n"
        "    model = keras.saving.load_model(sys.argv[1] + '/model.keras')\n"
        "x = np.load(sys.argv[1] + '/x.npy')\n"
        "np.save(sys.argv[1] + '/y.npy', s.predict(model, x))\n",
        tmp_path,
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), predict(model, x), atol=1e-6
    )


def test_a_subclass_is_quantized(rng, x):
    model = make_model()
    model.quantize("int8")
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    before = predict(model, x)
    move_adapters(model, rng)
    assert np.abs(predict(model, x) - before).max() > 0.01


def test_what_computes_something_else_is_refused():
    model = keras.Sequential([keras.Input((5,)), Twice(3, name="query")])
    with pytest.raises(ValueError, match="compute something else: 'query'"):
        keras_fvae.enable_fvae_lora(model)
