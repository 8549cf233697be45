"""Whole models and presets, saved here and loaded in fresh processes."""

import keras
import keras_hub
import numpy as np
import pytest
import zoo
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


def enable(model, name):
    if name in KERAS_MODELS:
        return keras_fvae.enable_fvae_lora(
            model, trainable_layer_names=["head"], **OPTIONS
        )
    return getattr(model, "backbone", model).enable_fvae_lora(**OPTIONS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of saved models, what they predict, what a process loads."""
    directory = tmp_path_factory.mktemp("saved")
    expected = {}

    def note(kind, name, model):
        expected[f"{kind}/{name}/predictions"] = zoo.predict(model, name)
        expected[f"{kind}/{name}/trainable"] = np.array(
            [str(weight.shape) for weight in model.trainable_weights]
        )

    def save(kind, name, model):
        note(kind, name, model)
        model.save(directory / f"{kind}-{name}.keras")
        if name in HUB_MODELS:
            model.save_to_preset(str(directory / f"{kind}-{name}-preset"))
            note(f"{kind}-preset", name, model)

    keras.utils.clear_session(free_memory=False)
    for name, make in zoo.MODELS.items():
        keras.utils.set_random_seed(1)
        model = make()
        enable(model, name)
        zoo.compile_model(model, name)
        zoo.fit(model, name, epochs=40)
        with keras_fvae.fvae_lora_disabled(model):
            expected[f"{name}/base"] = zoo.predict(model, name)
        save("trained", name, model)
        if name in KERAS_MODELS:
            zoo.fit(model, name)
            note("again", name, model)
        keras_fvae.finalize_fvae_lora(model)
        save("finalized", name, model)
    run_python("tests/fresh_load.py", directory)
    with np.load(directory / "loaded.npz") as file:
        return directory, expected, dict(file)


@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("kind", ["trained", "finalized"])
def test_keras_files_bring_the_adapters_back(saved, kind, name):
    _, expected, loaded = saved
    what = f"{kind}/{name}"
    predictions = expected[f"{what}/predictions"]
    # A dropped adapter could not pass.
    assert np.abs(predictions - expected[f"{name}/base"]).max() > 0.1
    np.testing.assert_allclose(
        loaded[f"{what}/predictions"], predictions, atol=1e-6
    )
    trainable = expected[f"{what}/trainable"].tolist()
    assert loaded[f"{what}/trainable"].tolist() == trainable


@pytest.mark.parametrize("name", KERAS_MODELS)
def test_fit_goes_on_where_it_stopped(saved, name):
    _, expected, loaded = saved
    after = expected[f"again/{name}/predictions"]
    before = expected[f"trained/{name}/predictions"]
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(
        loaded[f"trained/{name}/after"], after, atol=1e-5
    )
    # And what was loaded can be saved in its turn.
    np.testing.assert_allclose(
        loaded[f"again/{name}/predictions"], after, atol=1e-5
    )
    trainable = expected[f"again/{name}/trainable"].tolist()
    assert loaded[f"again/{name}/trainable"].tolist() == trainable


@pytest.mark.parametrize("name", HUB_MODELS)
@pytest.mark.parametrize("kind", ["trained-preset", "finalized-preset"])
def test_presets_bring_the_adapters_back(saved, kind, name):
    _, expected, loaded = saved
    what = f"{kind}/{name}"
    np.testing.assert_allclose(
        loaded[f"{what}/predictions"],
        expected[f"{what}/predictions"],
        atol=1e-6,
    )
    trainable = expected[f"{what}/trainable"].tolist()
    assert loaded[f"{what}/trainable"].tolist() == trainable


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


def test_without_the_package_no_adapter_is_dropped_in_silence(saved):
    directory, _, _ = saved
    output = run_python("-c", WITHOUT_THE_PACKAGE, directory).stdout
    assert output.count("refused") == 2 * len(zoo.MODELS) + 4


def test_a_loaded_backbone_is_of_its_class(saved):
    directory, _, _ = saved
    model = keras.saving.load_model(directory / "trained-text_classifier.keras")
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


BACKUP = """
import os, sys
import keras, numpy as np
sys.path.insert(0, "tests")
import zoo
import keras_fvae

class Die(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 5:
            os._exit(9)  # In the middle of the third epoch.

directory, die = sys.argv[1], sys.argv[2] == "die"
keras.utils.set_random_seed(0)
model = zoo.make_sequential()
keras_fvae.enable_fvae_lora(
    model,
    2,
    decoder_units=(4,),
    trainable_layer_names=["head"],
    dropout=0.0,
)
zoo.compile_model(model, "sequential")
x, y = zoo.data("sequential")
callbacks = [keras.callbacks.BackupAndRestore(directory + "/backup")]
model.fit(
    x, y, batch_size=4, epochs=4, shuffle=False, verbose=0,
    callbacks=callbacks + [Die()] * die,
)
np.save(directory + "/predictions.npy", zoo.predict(model, "sequential"))
"""


def test_a_killed_run_is_resumed(tmp_path):
    predictions = {}
    for name in ("whole", "killed"):
        directory = tmp_path / name
        directory.mkdir()
        if name == "killed":
            killed = run_python("-c", BACKUP, directory, "die", check=False)
            assert killed.returncode == 9
            assert not (directory / "predictions.npy").exists()
        run_python("-c", BACKUP, directory, "live")
        predictions[name] = np.load(directory / "predictions.npy")
    np.testing.assert_allclose(
        predictions["killed"], predictions["whole"], atol=1e-6
    )


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
