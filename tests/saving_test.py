"""Adapter files: round trips, other processes, and files that do not fit."""

import json
import os

import h5py
import keras
import numpy as np
import pytest
import zoo
from helpers import BACKENDS
from helpers import NEXT_BACKEND
from helpers import move_adapters
from helpers import run_python
from helpers import snapshot
from helpers import to_numpy

import keras_fvae
from keras_fvae import lookup

SMALL = {"rank": 2, "decoder_units": (4,)}
FILE = "task.fvae_lora.h5"


def enable(model, name, **options):
    names = [layer.name for layer in model.layers]
    return keras_fvae.enable_fvae_lora(
        getattr(model, "backbone", model),
        trainable_layer_names=["head"] if "head" in names else (),
        **{**SMALL, **options},
    )


def set_base_weights(model, weights):
    """The pretrained weights, which an adapter file does not have."""
    values = [w for w in weights if "adapter" not in w.path]
    model.set_weights([to_numpy(weight) for weight in values])


def make_pair(name, rng, **options):
    """A model with adapters that matter, and the same one without."""
    adapted, plain = zoo.MODELS[name](), zoo.MODELS[name]()
    enable(adapted, name, **options)
    before = zoo.predict(adapted, name)
    move_adapters(adapted, rng, scale=1.0)
    assert np.abs(zoo.predict(adapted, name) - before).max() > 0.1
    set_base_weights(plain, adapted.weights)
    return adapted, plain


@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("include", ["all", "inference"])
def test_round_trip_onto_a_plain_model(name, include, rng, tmp_path):
    adapted, plain = make_pair(name, rng)
    trainable = len(adapted.trainable_weights)
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE, include)
    keras_fvae.load_fvae_lora_weights(plain, tmp_path / FILE)
    np.testing.assert_allclose(
        zoo.predict(plain, name), zoo.predict(adapted, name), atol=1e-6
    )
    finalized = [
        layer.adapter.finalized for layer in lookup.adapted_layers(plain)
    ]
    assert set(finalized) == {include == "inference"}
    if include == "all":
        assert len(plain.trainable_weights) == trainable


def count_numbers(path):
    with h5py.File(path) as file:
        counts = []
        file.visititems(
            lambda name, item: counts.append(getattr(item, "size", 0))
        )
        return sum(counts) - file["header"].size


def test_only_the_adapters_and_what_trains_is_in_the_file(rng, tmp_path):
    adapted, _ = make_pair("text_classifier", rng)
    backbone = adapted.backbone
    backbone.save_fvae_lora_weights(tmp_path / FILE)
    assert count_numbers(tmp_path / FILE) == sum(
        to_numpy(weight).size for weight in backbone.trainable_weights
    )
    backbone.save_fvae_lora_weights(tmp_path / FILE, include="inference")
    assert count_numbers(tmp_path / FILE) == sum(
        layer.adapter.num_inference_parameters
        for layer in lookup.adapted_layers(backbone)
    )


def test_onto_an_adapted_model(rng, tmp_path):
    adapted, plain = make_pair("functional", rng, seed=1)
    enable(plain, "functional", seed=2)
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    keras_fvae.load_fvae_lora_weights(plain, tmp_path / FILE)
    np.testing.assert_allclose(
        zoo.predict(plain, "functional"),
        zoo.predict(adapted, "functional"),
        atol=1e-6,
    )


def test_names_that_keras_makes_up_may_have_changed(rng, tmp_path):
    adapted, plain = make_pair("functional", rng)
    paths = [
        [layer.path for layer in keras.tree.flatten(model.layers)]
        for model in (adapted, plain)
    ]
    assert paths[0] != paths[1]
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    keras_fvae.load_fvae_lora_weights(plain, tmp_path / FILE)
    assert len(lookup.adapted_layers(plain)) == 3


def test_a_preprocessor_makes_no_difference(rng, tmp_path):
    adapted, plain = make_pair("text_classifier", rng)
    adapted.preprocessor = keras.layers.Rescaling(1.0)
    assert adapted.backbone.name != plain.backbone.name
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    keras_fvae.load_fvae_lora_weights(plain, tmp_path / FILE)
    assert len(lookup.adapted_layers(plain)) == 4


def test_of_many_layers_the_right_ones(tmp_path):
    def make():
        layers = [keras.layers.Dense(4) for _ in range(5)]
        return keras.Sequential([keras.Input((4,)), *layers])

    adapted, plain = make(), make()
    keras_fvae.enable_fvae_lora(
        adapted, 2, [adapted.layers[1].name, adapted.layers[3].name]
    )
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    # Of these numbers, some are those of other layers in the other model.
    keras_fvae.load_fvae_lora_weights(plain, tmp_path / FILE)
    assert [hasattr(layer, "adapter") for layer in plain.layers] == [
        False,
        True,
        False,
        True,
        False,
    ]


LOAD = """
import sys
import keras, numpy as np
sys.path.insert(0, "tests")
import zoo
import keras_fvae
directory = sys.argv[1]
model = zoo.make_text_classifier()
model.load_weights(directory + "/base.weights.h5")
model.backbone.load_fvae_lora_weights(directory + "/task.fvae_lora.h5")
np.save(directory + "/loaded.npy", zoo.predict(model, "text_classifier"))
other = zoo.make_text_classifier()
other.load_weights(directory + "/base.weights.h5")
keras_fvae.load_peft_adapter(other, directory + "/peft")
np.save(directory + "/peft.npy", zoo.predict(other, "text_classifier"))
"""


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory):
    """A directory with a trained adapter, and what it predicts."""
    directory = tmp_path_factory.mktemp("trained")
    keras.utils.set_random_seed(0)
    model = zoo.make_text_classifier()
    model.get_layer("logits").trainable = False
    base_predictions = zoo.predict(model, "text_classifier")
    model.save_weights(directory / "base.weights.h5")
    model.backbone.enable_fvae_lora(**SMALL)
    move_adapters(model, np.random.default_rng(0), scale=1.0)
    zoo.compile_model(model, "text_classifier")
    zoo.fit(model, "text_classifier")
    predictions = zoo.predict(model, "text_classifier")
    assert np.abs(predictions - base_predictions).max() > 0.1
    model.backbone.save_fvae_lora_weights(directory / FILE)
    keras_fvae.save_peft_adapter(model, directory / "peft")
    return directory, predictions


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(b, marks=[pytest.mark.slow] if b != NEXT_BACKEND else [])
        for b in BACKENDS
    ],
)
def test_trained_here_and_loaded_on_every_backend(backend, trained_here):
    directory, predictions = trained_here
    run_python("-c", LOAD, directory, backend=backend)
    for name in ("loaded", "peft"):
        np.testing.assert_allclose(
            np.load(directory / f"{name}.npy"), predictions, atol=1e-5
        )


def test_a_file_is_small(tmp_path):
    """24 layers of the width of ViT-B: a few megabytes."""
    inputs = keras.Input((768,))
    x = inputs
    for index in range(24):
        x = keras.layers.Dense(768, name=f"query_{index}")(x)
    model = keras.Model(inputs, x)
    keras_fvae.enable_fvae_lora(model, 16, lambda layer: True)
    keras_fvae.save_fvae_lora_weights(model, tmp_path / FILE)
    keras_fvae.save_fvae_lora_weights(
        model, tmp_path / "i.fvae_lora.h5", "inference"
    )
    assert (tmp_path / FILE).stat().st_size < 20e6
    assert (tmp_path / "i.fvae_lora.h5").stat().st_size < 3e6


def edit_header(path, change):
    with h5py.File(path, "r+") as file:
        header = json.loads(file["header"][()])
        change(header)
        del file["header"]
        file["header"] = json.dumps(header)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of the weights, as a bad disk would."""
    with h5py.File(path) as file:
        dataset = file["layers/query/kernel_b"]
        offset = dataset.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


def foreign(path):
    with h5py.File(path, "w") as file:
        file["x"] = 1


def reshape(path):
    with h5py.File(path, "r+") as file:
        del file["layers/query/kernel_b"]
        file["layers/query/kernel_b"] = np.zeros((2, 7), "float32")


def drop(path):
    with h5py.File(path, "r+") as file:
        del file["layers/query/kernel_b"]


DAMAGES = [
    (cut, "damaged, cut short"),
    (lambda path: path.write_text("no HDF5"), "damaged, cut short"),
    (lambda path: path.write_bytes(b""), "damaged, cut short"),
    (flip, "damaged, cut short"),
    (foreign, "none that `save_fvae_lora_weights` wrote"),
    (
        lambda path: edit_header(path, lambda h: h["record"].update(version=2)),
        "newer version of keras_fvae",
    ),
    (reshape, r"'layers/query/kernel_b' has shape \(2, 7\).*\(2, 8\)"),
    (drop, "only the model has a weight 'layers/query/kernel_b'"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_damaged_file_changes_nothing(damage, message, rng, tmp_path):
    adapted, plain = make_pair("sequential", rng)
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    damage(tmp_path / FILE)
    for model in (plain, adapted):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            keras_fvae.load_fvae_lora_weights(model, tmp_path / FILE)
        assert snapshot(model) == before


def with_units(units=8, name="query", head="head"):
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(units, name=name),
            keras.layers.Dense(3, name=head),
        ]
    )


def adapted_with(**options):
    model = zoo.make_sequential()
    enable(model, "sequential", **options)
    return model


def finalized():
    model = adapted_with()
    keras_fvae.finalize_fvae_lora(model)
    return model


OTHERS = [
    (lambda: with_units(9), r"'layers/query/kernel_b' has shape \(2, 8\)"),
    (lambda: with_units(name="value"), "'query' was adapted.*'value'"),
    (lambda: with_units(head="top"), "'head/kernel' was trainable"),
    (lambda: adapted_with(rank=3), "'query' the file says rank=2.*rank=3"),
    (lambda: adapted_with(alpha=4.0), "alpha=None, the model alpha=4.0"),
    (
        lambda: adapted_with(target_layer_names=["query", "head"]),
        "'.*head' is adapted only in the model",
    ),
    (lambda: adapted_with(target_layer_names="head"), "only in the model"),
    (finalized, "finalized=False, the model finalized=True"),
]


def test_a_file_does_not_mind_rematerialization(tmp_path):
    adapted = adapted_with(rematerialize=True)
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    other = adapted_with(seed=3)
    keras_fvae.load_fvae_lora_weights(other, tmp_path / FILE)
    layer, expected = (m.get_layer("query") for m in (other, adapted))
    assert not layer.config.rematerialize
    for name, array in expected.adapter.get_arrays().items():
        np.testing.assert_array_equal(layer.adapter.get_arrays()[name], array)


@pytest.mark.parametrize("make, message", OTHERS)
def test_a_file_of_another_model_changes_nothing(make, message, tmp_path):
    keras_fvae.save_fvae_lora_weights(adapted_with(), tmp_path / FILE)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        keras_fvae.load_fvae_lora_weights(model, tmp_path / FILE)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda model: keras_fvae.save_fvae_lora_weights(model, FILE),
        lambda model: keras_fvae.load_fvae_lora_weights(model, FILE),
        lambda model: keras_fvae.save_peft_adapter(model, "peft"),
        lambda model: keras_fvae.load_peft_adapter(model, "peft"),
        keras_fvae.finalize_fvae_lora,
        keras_fvae.merge_fvae_lora,
        lambda model: keras_fvae.fvae_lora_disabled(model).__enter__(),
    ],
)
def test_models_of_another_type(call):
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        call("model")


def test_arguments(tmp_path):
    model = zoo.make_sequential()
    with pytest.raises(ValueError, match="nothing to save"):
        keras_fvae.save_fvae_lora_weights(model, tmp_path / FILE)
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        keras_fvae.load_fvae_lora_weights(model, tmp_path / FILE)
    enable(model, "sequential")
    for call in (
        keras_fvae.save_fvae_lora_weights,
        keras_fvae.load_fvae_lora_weights,
    ):
        with pytest.raises(ValueError, match="end in '.fvae_lora.h5'"):
            call(model, tmp_path / "task.h5")
    with pytest.raises(ValueError, match="'all' or 'inference'"):
        keras_fvae.save_fvae_lora_weights(model, tmp_path / FILE, "some")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
import h5py, keras
import keras_fvae
layer = keras.layers.Dense(8, name="query")
model = keras.Sequential([keras.Input((8,)), layer])
keras_fvae.enable_fvae_lora(model, 2)
keras_fvae.save_fvae_lora_weights(model, sys.argv[1])
create = h5py.File.create_dataset
def die(file, name, **options):
    if name.endswith("kernel_b"):
        file.flush()
        os._exit(9)
    return create(file, name, **options)
h5py.File.create_dataset = die
model.layers[0].adapter.kernel_b.assign(0 * model.layers[0].adapter.kernel_b)
keras_fvae.save_fvae_lora_weights(model, sys.argv[1])
"""


@pytest.mark.one_backend
def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / FILE
    result = run_python("-c", KILLED, path, check=False)
    assert result.returncode == 9, result.stderr
    with h5py.File(path) as file:
        assert np.abs(file["layers/query/kernel_b"][()]).max() > 0


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model = adapted_with()
    keras_fvae.save_fvae_lora_weights(model, tmp_path / FILE)
    content = (tmp_path / FILE).read_bytes()

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keras_fvae.save_fvae_lora_weights(model, tmp_path / FILE)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == content


def test_onto_another_precision(rng, tmp_path):
    adapted, _ = make_pair("sequential", rng)
    keras_fvae.save_fvae_lora_weights(adapted, tmp_path / FILE)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        other = zoo.make_sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    set_base_weights(other, adapted.weights)
    keras_fvae.load_fvae_lora_weights(other, tmp_path / FILE)
    np.testing.assert_allclose(
        zoo.predict(other, "sequential").astype("float32"),
        zoo.predict(adapted, "sequential"),
        atol=0.1,
    )
