"""Files that an earlier version wrote load, and predict what they did there.

`python tests/golden_test.py` writes them anew, for when a format changes.
"""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import ROOT
from helpers import move_adapters
from helpers import text_inputs
from helpers import to_numpy

import keras_fvae

FOLDER = ROOT / "tests" / "reference" / "golden"
SMALL = {"rank": 2, "decoder_units": (4,), "dropout": 0.0}
FEATURES = np.random.default_rng(0).normal(size=(4, 6, 8)).astype("float32")
TEXTS = text_inputs(np.random.default_rng(0))


def load_model():
    return keras.saving.load_model(FOLDER / "model.keras"), FEATURES


def load_preset():
    path = str(FOLDER / "preset")
    return keras_hub.models.TextClassifier.from_preset(path), TEXTS


def load_peft():
    path = str(FOLDER / "base_preset")
    model = keras_hub.models.TextClassifier.from_preset(path)
    keras_fvae.load_peft_adapter(model, FOLDER / "peft")
    return model, TEXTS


LOADERS = {"model": load_model, "preset": load_preset, "peft": load_peft}


@pytest.mark.parametrize("name", LOADERS)
def test_golden_files(name):
    model, x = LOADERS[name]()
    with np.load(FOLDER / "expected.npz") as expected:
        np.testing.assert_allclose(
            to_numpy(model(x)), expected[f"{name}/predictions"], atol=1e-5
        )
        with keras_fvae.adapter_disabled(model):
            np.testing.assert_allclose(
                to_numpy(model(x)), expected[f"{name}/base"], atol=1e-5
            )
        shapes = [str(tuple(w.shape)) for w in model.trainable_weights]
        assert shapes == expected[f"{name}/trainable"].tolist()


def make_model():
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = keras.layers.Dense(8, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_fvae.enable_fvae_lora(model, trainable_layer_names=["head"], **SMALL)
    model.compile("adam", "mse")
    model.fit(FEATURES, np.ones((4, 3)), verbose=0)
    return model


def make_classifier():
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=12,
    )
    for weight in backbone.weights:
        if weight.name == "kernel":
            # Their initial values are for wide layers.
            weight.assign(10 * weight)
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=3, preprocessor=None, dropout=0.0
    )


def write():
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    FOLDER.mkdir(exist_ok=True)
    model = make_model()
    move_adapters(model, rng)
    model.save(FOLDER / "model.keras")
    classifier = make_classifier()
    classifier.save_to_preset(FOLDER / "base_preset")
    classifier.backbone.enable_fvae_lora(**SMALL)
    move_adapters(classifier, rng, scale=1.0)
    classifier.save_to_preset(FOLDER / "preset")
    keras_fvae.save_peft_adapter(classifier, FOLDER / "peft")
    expected = {}
    for name, load in LOADERS.items():
        model, x = load()
        expected[f"{name}/predictions"] = to_numpy(model(x))
        with keras_fvae.adapter_disabled(model):
            expected[f"{name}/base"] = to_numpy(model(x))
        difference = expected[f"{name}/predictions"] - expected[f"{name}/base"]
        assert np.abs(difference).max() > 0.01
        expected[f"{name}/trainable"] = np.array(
            [str(tuple(w.shape)) for w in model.trainable_weights]
        )
    np.savez(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    write()
