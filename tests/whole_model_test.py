"""Whole models and presets, saved here and loaded in fresh processes."""

import keras
import keras_hub
import numpy as np
import pytest
import zoo
from helpers import move_adapters
from helpers import run_python

import keras_fvae

# Without dropout, which Keras does not seed on PyTorch.
OPTIONS = {
    "rank": 2,
    "decoder_units": (4,),
    "elbo_weight": 0.01,
    "dropout": 0.0,
}
HUB_MODELS = ["text_classifier", "image_classifier", "causal_lm", "backbone"]
# Keras saves the optimizer of these; KerasHub's tasks have their own compile.
KERAS_MODELS = ["functional", "sequential", "subclassed"]
# Of each kind one.
SHORT = ["functional", "subclassed", "text_classifier", "backbone"]


def enable(model, name):
    if name in KERAS_MODELS:
        return keras_fvae.enable_fvae_lora(
            model, trainable_layer_names=["head"], **OPTIONS
        )
    return getattr(model, "backbone", model).enable_fvae_lora(**OPTIONS)


def describe(model, name):
    """What a model predicts, and what of it trains."""
    trainable = [str(weight.shape) for weight in model.trainable_weights]
    return zoo.predict(model, name), trainable


def save(directory, kind, name, model):
    """Saves a model as a file, and as a preset if it can be one.

    Returns:
        Dict of what was saved to what `describe` says of it.
    """
    model.save(directory / f"{kind}-{name}.keras")
    expected = {kind: describe(model, name)}
    if name in HUB_MODELS:
        model.save_to_preset(str(directory / f"{kind}-{name}-preset"))
        expected[f"{kind}-preset"] = expected[kind]
    return expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n not in SHORT else [])
        for n in zoo.MODELS
    ],
)
def test_what_is_saved_comes_back_in_a_fresh_process(name, tmp_path):
    model = zoo.MODELS[name]()
    enable(model, name)
    # Far enough that a dropped adapter is seen.
    move_adapters(model, np.random.default_rng(0), scale=1.0)
    zoo.compile_model(model, name)
    zoo.fit(model, name, epochs=2)
    with keras_fvae.fvae_lora_disabled(model):
        base_predictions = zoo.predict(model, name)
    expected = save(tmp_path, "trained", name, model)
    assert np.abs(expected["trained"][0] - base_predictions).max() > 0.1
    if name in KERAS_MODELS:
        # There, `fit` goes on where it stopped, and saves once more.
        zoo.fit(model, name)
        expected["after"] = expected["again"] = describe(model, name)
        moved = expected["after"][0] - expected["trained"][0]
        assert np.abs(moved).max() > 1e-3
    keras_fvae.finalize_fvae_lora(model)
    expected |= save(tmp_path, "finalized", name, model)
    run_python("tests/fresh_load.py", tmp_path)
    with np.load(tmp_path / "loaded.npz") as loaded:
        kinds = {what.split("/")[0] for what in loaded}
        assert kinds == {*expected}
        for kind, (predictions, trainable) in expected.items():
            np.testing.assert_allclose(
                loaded[f"{kind}/predictions"],
                predictions,
                atol=1e-5 if kind in ("after", "again") else 1e-6,
            )
            assert loaded[f"{kind}/trainable"].tolist() == trainable


WITHOUT_THE_PACKAGE = """
import pathlib, sys
import keras, keras_hub
sys.path.insert(0, "tests")
import zoo
directory = pathlib.Path(sys.argv[1])
loaders = {path: keras.saving.load_model for path in directory.glob("*.keras")}
for path in directory.glob("*-backbone-preset"):
    loaders[path] = keras_hub.models.Backbone.from_preset
for path in directory.glob("*-text_classifier-preset"):
    loaders[path] = keras_hub.models.TextClassifier.from_preset
for path, load in loaders.items():
    try:
        load(str(path))
    except (TypeError, ValueError) as error:
        assert "keras_fvae" in str(error), str(error)
        print("refused")
    else:
        raise AssertionError(f"{path} was loaded without a word")
"""


def test_without_the_package_no_adapter_is_dropped_in_silence(tmp_path):
    for name in SHORT:
        model = zoo.MODELS[name]()
        enable(model, name)
        save(tmp_path, "trained", name, model)
        keras_fvae.finalize_fvae_lora(model)
        save(tmp_path, "finalized", name, model)
    output = run_python("-c", WITHOUT_THE_PACKAGE, tmp_path).stdout
    assert output.count("refused") == 2 * len(SHORT) + 4


def test_a_loaded_backbone_is_of_its_class(tmp_path):
    model = zoo.make_text_classifier()
    enable(model, "text_classifier")
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(model.backbone, keras_hub.models.BertBackbone)
    assert isinstance(model, keras_hub.models.BertTextClassifier)


def test_weights_files(tmp_path):
    def make():
        model = zoo.make_functional()
        enable(model, "functional")
        zoo.compile_model(model, "functional")
        return model

    model = make()
    zoo.fit(model, "functional", epochs=5)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = make()
    other.load_weights(path)
    np.testing.assert_allclose(
        zoo.predict(other, "functional"),
        zoo.predict(model, "functional"),
        atol=1e-6,
    )
    # Neither way is an adapter passed over.
    plain = zoo.make_functional()
    with pytest.raises(ValueError):
        plain.load_weights(path)
    zoo.make_functional().save_weights(path)
    with pytest.raises(ValueError):
        model.load_weights(path)


def test_weights_of_adapted_inner_layers_are_refused_by_plain_ones(
    make_attention_model, tmp_path
):
    model = make_attention_model()
    keras_fvae.enable_fvae_lora(model, **OPTIONS)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    # The layers inside `MultiHeadAttention` have the same place in both.
    with pytest.raises(ValueError, match="query"):
        make_attention_model().load_weights(path)


def test_model_checkpoint(tmp_path):
    path = tmp_path / "best.keras"
    model = zoo.make_functional()
    enable(model, "functional")
    zoo.compile_model(model, "functional")
    x, y = zoo.data("functional")
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    model.fit(x, y, epochs=3, verbose=0, callbacks=[checkpoint])
    loaded = keras.saving.load_model(path)
    np.testing.assert_allclose(
        zoo.predict(loaded, "functional"),
        zoo.predict(model, "functional"),
        atol=1e-6,
    )


def train_with_backup(directory, callbacks=()):
    """What a model predicts after four epochs, whenever they were trained."""
    keras.utils.set_random_seed(0)
    model = zoo.make_sequential()
    enable(model, "sequential")
    zoo.compile_model(model, "sequential")
    x, y = zoo.data("sequential")
    backup = keras.callbacks.BackupAndRestore(directory)
    model.fit(
        x, y, batch_size=4, epochs=4, shuffle=False, verbose=0,
        callbacks=[backup, *callbacks],
    )  # fmt: skip
    return zoo.predict(model, "sequential")


DIE = """
import os, sys
import keras
import whole_model_test

class Die(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 5:
            os._exit(9)  # In the middle of the third epoch.

whole_model_test.train_with_backup(sys.argv[1], [Die()])
"""


def test_a_killed_run_is_resumed(tmp_path):
    expected = train_with_backup(tmp_path / "whole")
    killed = run_python("-c", DIE, tmp_path / "killed", check=False)
    assert killed.returncode == 9, killed.stderr
    epochs = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epochs.append(epoch)
    )
    predictions = train_with_backup(tmp_path / "killed", [count])
    assert epochs == [2, 3]
    np.testing.assert_allclose(predictions, expected, atol=1e-6)


def test_clone_model_clones_the_adapters(rng):
    model = zoo.make_functional()
    enable(model, "functional")
    zoo.compile_model(model, "functional")
    zoo.fit(model, "functional", epochs=5)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(
        zoo.predict(clone, "functional"),
        zoo.predict(model, "functional"),
        atol=1e-6,
    )
