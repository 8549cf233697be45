"""Whole models and presets, saved here and loaded in fresh processes."""

import contextlib
import pickle
from copy import deepcopy

import keras
import keras_hub
import numpy as np
import pytest
import small_models
from helpers import LONG_ON_ONE_BACKEND
from helpers import move_adapters
from helpers import run_python
from helpers import snapshot
from helpers import to_numpy

import keras_fvae
from keras_fvae.model.containers import AdaptedContainer
from keras_fvae.model.lookup import adapted_layers

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
MARKS = {
    "functional": [pytest.mark.one_backend],
    "text_classifier": [],
    "subclassed": [pytest.mark.one_backend],
    "backbone": [pytest.mark.one_backend],
}


def enable(model, name):
    if name in KERAS_MODELS:
        return keras_fvae.enable_fvae_lora(
            model, trainable_layer_names=["head"], **OPTIONS
        )
    return getattr(model, "backbone", model).enable_fvae_lora(**OPTIONS)


def describe(model, name):
    """What a model predicts, and what of it trains."""
    trainable = [str(weight.shape) for weight in model.trainable_weights]
    return small_models.predict(model, name), trainable


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
        pytest.param(n, marks=MARKS.get(n, [pytest.mark.slow]))
        for n in small_models.MODELS
    ],
)
def test_what_is_saved_comes_back_in_a_fresh_process(name, tmp_path):
    model = small_models.MODELS[name]()
    enable(model, name)
    # Far enough that a dropped adapter is seen.
    move_adapters(model, np.random.default_rng(0), scale=1.0)
    small_models.compile_model(model, name)
    small_models.fit(model, name, epochs=2)
    with keras_fvae.adapter_disabled(model):
        base_predictions = small_models.predict(model, name)
    expected = save(tmp_path, "trained", name, model)
    assert np.abs(expected["trained"][0] - base_predictions).max() > 0.1
    if name in KERAS_MODELS:
        # There, `fit` goes on where it stopped, and saves once more.
        small_models.fit(model, name)
        expected["after"] = expected["again"] = describe(model, name)
        moved = expected["after"][0] - expected["trained"][0]
        assert np.abs(moved).max() > 1e-3
    keras_fvae.finalize_adapter(model)
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
import small_models
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


@pytest.mark.one_backend
def test_without_the_package_no_adapter_is_dropped_in_silence(tmp_path):
    for name in SHORT:
        model = small_models.MODELS[name]()
        enable(model, name)
        save(tmp_path, "trained", name, model)
        keras_fvae.finalize_adapter(model)
        save(tmp_path, "finalized", name, model)
    output = run_python("-c", WITHOUT_THE_PACKAGE, tmp_path).stdout
    assert output.count("refused") == 2 * len(SHORT) + 4


def test_a_loaded_backbone_is_of_its_class(tmp_path):
    model = small_models.make_text_classifier()
    enable(model, "text_classifier")
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(model.backbone, keras_hub.models.BertBackbone)
    assert isinstance(model, keras_hub.models.BertTextClassifier)


def test_weights_files(tmp_path):
    def make():
        model = small_models.make_functional()
        enable(model, "functional")
        small_models.compile_model(model, "functional")
        return model

    model = make()
    small_models.fit(model, "functional", epochs=5)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = make()
    other.load_weights(path)
    np.testing.assert_allclose(
        small_models.predict(other, "functional"),
        small_models.predict(model, "functional"),
        atol=1e-6,
    )
    # Neither way is an adapter passed over.
    plain = small_models.make_functional()
    with pytest.raises(ValueError):
        plain.load_weights(path)
    small_models.make_functional().save_weights(path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="with 0 adapted layers.* has 3"):
        model.load_weights(path)
    assert snapshot(model) == before


def make_blocks():
    """Layers that Keras knows by their classes and their order alone."""

    class Blocks(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [keras.layers.Dense(8) for _ in range(3)]
            self.last = keras.layers.EinsumDense("ab,bc->ac", 8)

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    model = Blocks()
    model(np.ones((1, 8)))
    return model


def make_of_adapted_layers():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras_fvae.FVAELoRADense(8, 2),
            *[keras.layers.Dense(8) for _ in range(3)],
        ]
    )


def make_of_plain_layers():
    return keras.Sequential(
        [keras.Input((8,)), *[keras.layers.Dense(8) for _ in range(4)]]
    )


def kernels_of(model):
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
        and tuple(layer.kernel.shape) == (8, 8)
    ]
    return [to_numpy(layer.kernel) for layer in layers]


def adapt_second(model):
    layers = [la for la in model._flatten_layers() if hasattr(la, "units")]
    keras_fvae.enable_fvae_lora(model, 2, lambda layer: layer is layers[1])
    return model


@pytest.mark.parametrize("suffix", [".weights.h5", ".weights.json", ".keras"])
@pytest.mark.parametrize("skip_mismatch", [False, True])
@pytest.mark.parametrize(
    "make_source, make_model",
    [
        (make_blocks, lambda: adapt_second(make_blocks())),
        (lambda: adapt_second(make_blocks()), make_blocks),
        (make_of_plain_layers, lambda: adapt_second(make_of_plain_layers())),
        (lambda: adapt_second(make_of_plain_layers()), make_of_plain_layers),
        (make_of_plain_layers, make_of_adapted_layers),
        (make_of_adapted_layers, make_of_plain_layers),
    ],
)
@pytest.mark.one_backend
def test_no_layer_gets_the_weights_of_another(
    make_source, make_model, skip_mismatch, suffix, tmp_path
):
    source, model = make_source(), make_model()
    before, wanted = kernels_of(model), kernels_of(source)
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        if not isinstance(source, keras.Sequential):
            return
        source.save(path)
    elif suffix == ".weights.json":
        source.save_weights(path, max_shard_size=2e-4)
    else:
        source.save_weights(path)
    with contextlib.suppress(ValueError):
        model.load_weights(path, skip_mismatch=skip_mismatch)
    for found, old, new in zip(kernels_of(model), before, wanted):
        assert np.array_equal(found, old) or np.array_equal(found, new)
    if isinstance(model, AdaptedContainer):
        # There before anything is overwritten.
        for found, old in zip(kernels_of(model), before):
            np.testing.assert_array_equal(found, old)


def assert_a_copy(copy, model, name):
    """It is adapted as the model is, and with its weights predicts the same."""
    assert len(adapted_layers(copy)) == len(adapted_layers(model)) > 0
    copy.set_weights(model.get_weights())
    np.testing.assert_allclose(
        small_models.predict(copy, name),
        small_models.predict(model, name),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "name, cls",
    [("functional", keras.Model), ("sequential", keras.Sequential)],
)
def test_keras_makes_a_copy_of_the_config(name, cls, rng):
    model = small_models.MODELS[name]()
    enable(model, name)
    move_adapters(model, rng)
    for copy_class in (cls, type(model)):
        copy = copy_class.from_config(model.get_config())
        assert_a_copy(copy, model, name)


def test_the_config_of_a_subclass_needs_its_own_class(rng):
    model = small_models.make_subclassed()
    enable(model, "subclassed")
    copy = type(model).from_config(model.get_config())
    assert_a_copy(copy, model, "subclassed")
    with pytest.raises((TypeError, ValueError), match="keras_fvae"):
        small_models.Subclassed.from_config(model.get_config())


@pytest.mark.one_backend
@pytest.mark.parametrize("name", small_models.MODELS)
@pytest.mark.parametrize(
    "copy", ["pickle", pytest.param("deepcopy", marks=LONG_ON_ONE_BACKEND)]
)
def test_models_can_be_pickled(name, copy, rng):
    model = small_models.MODELS[name]()
    enable(model, name)
    move_adapters(model, rng, scale=1.0)
    expected = describe(model, name)
    if copy == "pickle":
        found = pickle.loads(pickle.dumps(model))
    else:
        found = deepcopy(model)
    assert type(found).__name__ == type(model).__name__
    predictions, trainable = describe(found, name)
    np.testing.assert_allclose(predictions, expected[0], atol=1e-6)
    assert trainable == expected[1]
    keras_fvae.finalize_adapter(model)
    found = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(
        small_models.predict(found, name), expected[0], atol=1e-6
    )


def test_layers_can_be_pickled(rng):
    inputs = keras.Input((5, 8))
    layers = [
        keras.layers.Dense(8, name="query"),
        keras.layers.MultiHeadAttention(2, 4, name="attention"),
    ]
    outputs = layers[1](*[layers[0](inputs)] * 2)
    model = keras.Model(inputs, outputs)
    keras_fvae.enable_fvae_lora(model, **OPTIONS)
    move_adapters(model, rng)
    x = rng.normal(size=(2, 5, 8)).astype("float32")
    for layer, arguments in ((layers[0], [x]), (layers[1], [x, x])):
        found = pickle.loads(pickle.dumps(layer))
        np.testing.assert_allclose(
            to_numpy(found(*arguments)), to_numpy(layer(*arguments)), atol=1e-6
        )


UNPICKLE = """
import pickle, sys
import keras
model = pickle.loads(sys.stdin.buffer.read())
print(sum(hasattr(layer, "adapter") for layer in model._flatten_layers()))
"""


@pytest.mark.one_backend
def test_another_process_unpickles_without_a_word_of_the_package():
    model = small_models.make_functional()
    enable(model, "functional")
    output = run_python("-c", UNPICKLE, stdin=pickle.dumps(model)).stdout
    assert output.split() == ["3"]


@pytest.mark.one_backend
def test_keras_refuses_code_in_the_file_of_an_adapted_model(tmp_path):
    inner = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="query"),
            keras.layers.Lambda(lambda x: 2 * x),
        ]
    )
    model = keras.Sequential([inner, keras.layers.Dense(3, name="head")])
    enable(model, "sequential")
    path = tmp_path / "model.keras"
    model.save(path)
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.saving.load_model(path)
    with pytest.raises(ValueError, match="safe_mode=False"):
        type(model).from_config(model.get_config())
    loaded = keras.saving.load_model(path, safe_mode=False)
    x = np.ones((2, 8))
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "named",
    [
        {"module": "os", "class_name": "system"},
        {"module": "subprocess", "class_name": "Popen"},
        {"module": "builtins", "class_name": "eval"},
        {"module": "keras.utils", "class_name": "get_file"},
    ],
)
def test_what_a_config_says_of_the_plain_model_names_no_code(named):
    model = small_models.make_sequential()
    enable(model, "sequential")
    config = model.get_config()
    config["keras_fvae"]["layer"] |= {"registered_name": None, **named}
    with pytest.raises((TypeError, ValueError), match=named["class_name"]):
        type(model).from_config(config)


@pytest.mark.parametrize("name", ["functional", "text_classifier"])
@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_keras_old_format_is_refused_when_saving(name, suffix, tmp_path):
    model = small_models.MODELS[name]()
    enable(model, name)
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ValueError, match="Save the model to a `.keras` file"):
        model.save(path)
    assert not path.exists()
    with pytest.raises(ValueError, match="Save the model to a `.keras` file"):
        keras.saving.save_model(model, path)


@keras.saving.register_keras_serializable(package="whole_model_test")
class Late(keras_hub.models.Backbone):
    """It makes weights and layers after its base class is constructed."""

    def __init__(self, width, dtype=None, name=None, trainable=True):
        inputs = keras.Input((8,))
        outputs = keras.layers.Dense(width, name="query")(inputs)
        super().__init__(
            inputs, outputs, dtype=dtype, name=name, trainable=trainable
        )
        self.width = width
        self.late = self.add_weight(shape=(2,), name="late")
        self.value = keras.layers.Dense(2, name="value")
        self.value.build((None, 8))

    def get_config(self):
        return {**super().get_config(), "width": self.width}

    @classmethod
    def from_config(cls, config):
        # Not by way of its base class.
        return cls(**{**config, "dtype": None})


def test_a_users_backbone_is_whole_before_it_is_restored(tmp_path):
    model = Late(8)
    model.enable_fvae_lora(2, ["query", "value"])
    model.save(tmp_path / "model.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    for loaded in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset")),
    ):
        assert isinstance(loaded, Late)
        assert not loaded.late.trainable
        assert len(adapted_layers(loaded)) == 2
        assert len(loaded.trainable_weights) == len(model.trainable_weights)


@keras.saving.register_keras_serializable(package="whole_model_test")
class BuiltWhenCalled(keras.Layer):
    """It does not say in its config that the layers inside are built."""

    def __init__(self, is_half_built=False, **kwargs):
        super().__init__(**kwargs)
        self.is_half_built = is_half_built
        if is_half_built:
            self.shift = self.add_weight(shape=(8,), name="shift")
        self.query = keras.layers.Dense(8, name="query")

    def call(self, inputs):
        return self.query(inputs)

    def get_build_config(self):
        return None

    def get_config(self):
        return {**super().get_config(), "is_half_built": self.is_half_built}


@keras.saving.register_keras_serializable(package="whole_model_test")
class MadeOfALayer(keras_hub.models.Backbone):
    """It makes the layer from the layer's config, before it is made itself."""

    def __init__(self, layer, dtype=None, **kwargs):
        inputs = keras.Input((8,))
        super().__init__(inputs, layer(inputs), dtype=dtype, **kwargs)
        self.layer = layer

    def get_config(self):
        layer = keras.layers.serialize(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config):
        layer = keras.layers.deserialize(config["layer"])
        return cls(**{**config, "layer": layer, "dtype": None})


@pytest.mark.parametrize("is_half_built", [False, True])
def test_a_layer_that_is_built_by_its_model_comes_back(
    is_half_built, rng, tmp_path
):
    def make_functional():
        inputs = keras.Input((8,))
        return keras.Model(inputs, BuiltWhenCalled(is_half_built)(inputs))

    x = rng.normal(size=(3, 8)).astype("float32")
    for model in (
        make_functional(),
        MadeOfALayer(BuiltWhenCalled(is_half_built)),
    ):
        keras_fvae.enable_fvae_lora(model, 2, "query")
        move_adapters(model, rng)
        model.save(tmp_path / "model.keras")
        loaded = [keras.saving.load_model(tmp_path / "model.keras")]
        if isinstance(model, keras_hub.models.Backbone):
            model.save_to_preset(str(tmp_path / "preset"))
            load = keras_hub.models.Backbone.from_preset
            loaded.append(load(str(tmp_path / "preset")))
        for other in loaded:
            assert len(adapted_layers(other)) == 1
            np.testing.assert_allclose(
                to_numpy(other(x)), to_numpy(model(x)), atol=1e-6
            )
        # By itself nothing tells what it is made of.
        (layer,) = (la for la in model.layers if la.name.startswith("built"))
        with pytest.raises(ValueError, match="another architecture"):
            keras.layers.deserialize(keras.layers.serialize(layer))


def test_a_task_around_an_adapted_backbone_is_saved_with_it(rng, tmp_path):
    backbone = small_models.make_text_classifier().backbone
    backbone.enable_fvae_lora(**OPTIONS)
    move_adapters(backbone, rng)
    # After the backbone was adapted.
    task = keras_hub.models.BertTextClassifier(
        backbone, num_classes=3, preprocessor=None
    )
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert_a_copy(loaded, task, "text_classifier")


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
    model = small_models.make_functional()
    enable(model, "functional")
    small_models.compile_model(model, "functional")
    x, y = small_models.data("functional")
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    model.fit(x, y, epochs=3, verbose=0, callbacks=[checkpoint])
    loaded = keras.saving.load_model(path)
    np.testing.assert_allclose(
        small_models.predict(loaded, "functional"),
        small_models.predict(model, "functional"),
        atol=1e-6,
    )


def train_with_backup(directory, callbacks=()):
    """What a model predicts after four epochs, whenever they were trained."""
    keras.utils.set_random_seed(0)
    model = small_models.make_sequential()
    enable(model, "sequential")
    small_models.compile_model(model, "sequential")
    x, y = small_models.data("sequential")
    backup = keras.callbacks.BackupAndRestore(directory)
    model.fit(
        x, y, batch_size=4, epochs=4, shuffle=False, verbose=0,
        callbacks=[backup, *callbacks],
    )  # fmt: skip
    return small_models.predict(model, "sequential")


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


@pytest.mark.one_backend
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
    model = small_models.make_functional()
    enable(model, "functional")
    small_models.compile_model(model, "functional")
    small_models.fit(model, "functional", epochs=5)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(
        small_models.predict(clone, "functional"),
        small_models.predict(model, "functional"),
        atol=1e-6,
    )
