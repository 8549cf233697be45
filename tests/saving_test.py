"""Adapter files: round trips, other processes, and files that do not fit."""

import re
import time

import keras
import numpy as np
import pytest
import small_models
from helpers import BACKENDS
from helpers import NEXT_BACKEND
from helpers import move_adapters
from helpers import run_python
from helpers import snapshot
from helpers import to_numpy

import keras_fvae
from keras_fvae.model import files
from keras_fvae.model import lookup

SMALL = {"rank": 2, "decoder_units": (4,)}
FILE = "task.safetensors"


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
    adapted, plain = small_models.MODELS[name](), small_models.MODELS[name]()
    enable(adapted, name, **options)
    before = small_models.predict(adapted, name)
    move_adapters(adapted, rng, scale=1.0)
    assert np.abs(small_models.predict(adapted, name) - before).max() > 0.1
    set_base_weights(plain, adapted.weights)
    return adapted, plain


@pytest.mark.one_backend
@pytest.mark.parametrize("name", small_models.MODELS)
@pytest.mark.parametrize("include", ["all", "inference"])
def test_round_trip_onto_a_plain_model(name, include, rng, tmp_path):
    adapted, plain = make_pair(name, rng)
    trainable = len(adapted.trainable_weights)
    keras_fvae.save_adapter(adapted, tmp_path / FILE, include)
    keras_fvae.load_adapter(plain, tmp_path / FILE)
    np.testing.assert_allclose(
        small_models.predict(plain, name),
        small_models.predict(adapted, name),
        atol=1e-6,
    )
    finalized = [
        layer.adapter.finalized for layer in lookup.adapted_layers(plain)
    ]
    assert set(finalized) == {include == "inference"}
    if include == "all":
        assert len(plain.trainable_weights) == trainable


def count_numbers(path):
    _, arrays = files.parse(path.read_bytes(), path)
    return sum(array.size for array in arrays.values())


def test_only_the_adapters_and_what_trains_is_in_the_file(rng, tmp_path):
    adapted, _ = make_pair("text_classifier", rng)
    backbone = adapted.backbone
    backbone.save_adapter(tmp_path / FILE)
    assert count_numbers(tmp_path / FILE) == sum(
        to_numpy(weight).size for weight in backbone.trainable_weights
    )
    backbone.save_adapter(tmp_path / FILE, include="inference")
    assert count_numbers(tmp_path / FILE) == sum(
        layer.adapter.num_inference_parameters
        for layer in lookup.adapted_layers(backbone)
    )


def test_onto_an_adapted_model(rng, tmp_path):
    adapted, plain = make_pair("functional", rng, seed=1)
    enable(plain, "functional", seed=2)
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    keras_fvae.load_adapter(plain, tmp_path / FILE)
    np.testing.assert_allclose(
        small_models.predict(plain, "functional"),
        small_models.predict(adapted, "functional"),
        atol=1e-6,
    )


def test_names_that_keras_makes_up_may_have_changed(rng, tmp_path):
    adapted, plain = make_pair("functional", rng)
    paths = [
        [layer.path for layer in keras.tree.flatten(model.layers)]
        for model in (adapted, plain)
    ]
    assert paths[0] != paths[1]
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    keras_fvae.load_adapter(plain, tmp_path / FILE)
    assert len(lookup.adapted_layers(plain)) == 3


def test_a_preprocessor_makes_no_difference(rng, tmp_path):
    adapted, plain = make_pair("text_classifier", rng)
    adapted.preprocessor = keras.layers.Rescaling(1.0)
    assert adapted.backbone.name != plain.backbone.name
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    keras_fvae.load_adapter(plain, tmp_path / FILE)
    assert len(lookup.adapted_layers(plain)) == 4


def test_of_many_layers_the_right_ones(tmp_path):
    def make():
        layers = [keras.layers.Dense(4) for _ in range(5)]
        return keras.Sequential([keras.Input((4,)), *layers])

    adapted, plain = make(), make()
    keras_fvae.enable_fvae_lora(
        adapted, 2, [adapted.layers[1].name, adapted.layers[3].name]
    )
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    # Of these numbers, some are those of other layers in the other model.
    keras_fvae.load_adapter(plain, tmp_path / FILE)
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
import small_models
import keras_fvae
directory = sys.argv[1]
model = small_models.make_text_classifier()
model.load_weights(directory + "/base.weights.h5")
model.backbone.load_adapter(directory + "/task.safetensors")
loaded = small_models.predict(model, "text_classifier")
np.save(directory + "/loaded.npy", loaded)
other = small_models.make_text_classifier()
other.load_weights(directory + "/base.weights.h5")
keras_fvae.load_peft_adapter(other, directory + "/peft")
np.save(directory + "/peft.npy", small_models.predict(other, "text_classifier"))
"""


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory):
    """A directory with a trained adapter, and what it predicts."""
    directory = tmp_path_factory.mktemp("trained")
    keras.utils.set_random_seed(0)
    model = small_models.make_text_classifier()
    model.get_layer("logits").trainable = False
    base_predictions = small_models.predict(model, "text_classifier")
    model.save_weights(directory / "base.weights.h5")
    model.backbone.enable_fvae_lora(**SMALL)
    move_adapters(model, np.random.default_rng(0), scale=1.0)
    small_models.compile_model(model, "text_classifier")
    small_models.fit(model, "text_classifier")
    predictions = small_models.predict(model, "text_classifier")
    assert np.abs(predictions - base_predictions).max() > 0.1
    model.backbone.save_adapter(directory / FILE)
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
    keras_fvae.save_adapter(model, tmp_path / FILE)
    keras_fvae.save_adapter(model, tmp_path / "i.safetensors", "inference")
    assert (tmp_path / FILE).stat().st_size < 25e6
    assert (tmp_path / "i.safetensors").stat().st_size < 6.1e6


def edit(path, change):
    """Changes the record and the arrays of a file, as if they were saved so."""
    record, arrays = files.parse(path.read_bytes(), path)
    change(record, arrays)
    files.write(path, record, arrays)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of the weights, as a bad disk would."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


B = "layers/query/kernel_b"


def in_record(**entries):
    return lambda path: edit(path, lambda record, _: record.update(entries))


def in_config(**settings):
    def change(record, arrays):
        record["adapted"]["query"]["config"].update(settings)

    return lambda path: edit(path, change)


def in_arrays(**entries):
    """Of the array of B, or by other names of other arrays."""

    def change(record, arrays):
        for name, array in entries.items():
            name = B if name == "b" else name
            arrays.pop(name, None)
            if array is not None:
                arrays[name] = array

    return lambda path: edit(path, change)


DAMAGES = [
    (cut, "damaged, cut short"),
    (flip, "is damaged"),
    (in_arrays(b=np.zeros((2, 7), "float32")), r"shape \(2, 7\).*\(2, 8\)"),
    (in_arrays(b=None), f"only the model has a weight '{B}'"),
    (in_arrays(c=np.zeros(3)), "only the state has a weight 'c'"),
    (in_arrays(b=np.zeros((2, 8))), "of dtype float64, and it must be float32"),
    (in_arrays(b=np.zeros((2, 8), "int32")), "of dtype int32"),
    (
        in_arrays(b=np.full((2, 8), np.nan, "float32")),
        f"'{B}' has numbers.*not",
    ),
    (
        in_arrays(b=np.full((2, 8), np.inf, "float32")),
        f"'{B}' has numbers.*not",
    ),
    (in_record(adapted={}), "'adapted' must be an object of one layer"),
    (in_record(adapted=None), "'adapted' must be an object"),
    (in_record(adapted={"query": {}}), "'adapted/query' must be an object of"),
    (in_record(layer_paths=["query"] * 2), "'layer_paths' must be without rep"),
    (in_record(layer_paths=[1]), "'layer_paths' must be a list of strings"),
    (in_record(trained=["no/such"]), "the weight 'no/such' was trained"),
    (in_record(state="query"), "'state' must be a list of strings"),
    (in_record(extra=1), "the entries must be these"),
    (in_config(rank=10**9), "kernel_b' has shape|rank=1000000000"),
    (in_config(rank=-1), "in the settings of 'query', `rank` must be"),
    (in_config(rank=10**400), "the settings of 'query'|kernel_b|rank="),
    (in_config(alpha=10**400), "the settings of 'query'.*`alpha` must be"),
    (in_config(decoder_units=[4] * 10**5), "only the model|decoder_units="),
    (in_config(lora=True), "record is wrong: in the settings of 'query'"),
    (
        lambda p: edit(p, lambda r, _: r.pop("state")),
        "the entries must be these",
    ),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
@pytest.mark.one_backend
def test_a_damaged_file_changes_nothing(damage, message, rng, tmp_path):
    adapted, plain = make_pair("sequential", rng)
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    damage(tmp_path / FILE)
    for model in (plain, adapted):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            keras_fvae.load_adapter(model, tmp_path / FILE)
        assert snapshot(model) == before


HOSTILE = [None, True, -1, 10**9, 1e308, "", "query", [], ["head"], {}, [{}]]


def spoil(value, rng):
    """A value, or something in it, in the place of which is another."""
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    if not keys:
        return value
    key = keys[rng.integers(len(keys))]
    if isinstance(value[key], (dict, list)) and rng.random() < 0.7:
        spoil(value[key], rng)
    elif rng.random() < 0.2:
        value.pop(key)
    else:
        value[key] = HOSTILE[rng.integers(len(HOSTILE))]
    return value


@pytest.mark.always_one_backend
@pytest.mark.parametrize(
    "number", [150, pytest.param(600, marks=pytest.mark.slow)]
)
def test_hostile_records_change_nothing(number, rng, tmp_path):
    adapted, plain = make_pair("sequential", rng)
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    before = snapshot(plain), snapshot(adapted)
    content, num_refused = (tmp_path / FILE).read_bytes(), 0
    for _ in range(number):
        (tmp_path / FILE).write_bytes(content)
        edit(tmp_path / FILE, lambda record, _: spoil(record, rng))
        for model in (plain, adapted):
            begin = time.process_time()
            try:
                keras_fvae.load_adapter(model, tmp_path / FILE)
            except ValueError:
                num_refused += 1
            else:
                # What it changed is no matter to what is loaded.
                assert np.array_equal(
                    to_numpy(model.get_layer("query").adapter.kernel_b),
                    to_numpy(adapted.get_layer("query").adapter.kernel_b),
                )
                if model is plain:
                    _, plain = make_pair("sequential", rng)
                    set_base_weights(plain, adapted.weights)
                    before = snapshot(plain), before[1]
            assert time.process_time() - begin < 10
        assert (snapshot(plain), snapshot(adapted)) == before
    assert num_refused > number


def test_numbers_that_were_not_finite_come_back(rng, tmp_path):
    adapted, plain = make_pair("sequential", rng)
    kernel_b = adapted.get_layer("query").adapter.kernel_b
    kernel_b.assign(np.full((2, 8), np.nan))
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    keras_fvae.load_adapter(plain, tmp_path / FILE)
    assert np.isnan(to_numpy(plain.get_layer("query").adapter.kernel_b)).all()


def with_units(units=8, name="query", head="head"):
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(units, name=name),
            keras.layers.Dense(3, name=head),
        ]
    )


def adapted_with(**options):
    model = small_models.make_sequential()
    enable(model, "sequential", **options)
    return model


def finalized():
    model = adapted_with()
    keras_fvae.finalize_adapter(model)
    return model


OTHERS = [
    (lambda: with_units(9), r"'layers/query/kernel_b' has shape \(2, 8\)"),
    (lambda: with_units(name="value"), "'query' was adapted.*'value'"),
    (lambda: with_units(head="top"), "'head/kernel' was trained"),
    (lambda: adapted_with(rank=3), "'query' the state has rank=2.*rank=3"),
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
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    other = adapted_with(seed=3)
    keras_fvae.load_adapter(other, tmp_path / FILE)
    layer, expected = (m.get_layer("query") for m in (other, adapted))
    assert not layer.config.rematerialize
    for name, array in expected.adapter.get_arrays().items():
        np.testing.assert_array_equal(layer.adapter.get_arrays()[name], array)


@pytest.mark.parametrize("make, message", OTHERS)
def test_a_file_of_another_model_changes_nothing(make, message, tmp_path):
    keras_fvae.save_adapter(adapted_with(), tmp_path / FILE)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        keras_fvae.load_adapter(model, tmp_path / FILE)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda model: keras_fvae.save_adapter(model, FILE),
        lambda model: keras_fvae.load_adapter(model, FILE),
        lambda model: keras_fvae.save_peft_adapter(model, "peft"),
        lambda model: keras_fvae.load_peft_adapter(model, "peft"),
        keras_fvae.finalize_adapter,
        keras_fvae.merge_adapter,
        lambda model: keras_fvae.adapter_disabled(model).__enter__(),
    ],
)
def test_models_of_another_type(call):
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        call("model")


def test_a_model_that_is_not_built(tmp_path):
    keras_fvae.save_adapter(adapted_with(), tmp_path / FILE)
    model = keras.Sequential([keras.layers.Dense(8, name="query")])
    with pytest.raises(ValueError, match="is not built, so its layers have no"):
        keras_fvae.load_adapter(model, tmp_path / FILE)


@pytest.mark.parametrize(
    "call",
    [
        keras_fvae.save_adapter,
        keras_fvae.load_adapter,
        lambda model, path: keras_fvae.save_peft_adapter(
            small_models.make_text_classifier(), path
        ),
        lambda model, path: keras_fvae.load_peft_adapter(
            small_models.make_text_classifier(), path
        ),
    ],
)
def test_paths_of_other_file_systems(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="local file system.*gs://bucket"):
        call(adapted_with(), "gs://bucket/task.safetensors")
    with pytest.raises(TypeError, match="must be a string or path"):
        call(adapted_with(), 3)
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path):
    model = small_models.make_sequential()
    with pytest.raises(ValueError, match="no adapted layer"):
        keras_fvae.save_adapter(model, tmp_path / FILE)
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        keras_fvae.load_adapter(model, tmp_path / FILE)
    enable(model, "sequential")
    for call in (
        keras_fvae.save_adapter,
        keras_fvae.load_adapter,
    ):
        with pytest.raises(ValueError, match="end in '.safetensors'"):
            call(model, tmp_path / "task.h5")
    with pytest.raises(ValueError, match="'all' or 'inference'"):
        keras_fvae.save_adapter(model, tmp_path / FILE, "some")
    assert list(tmp_path.iterdir()) == []


def test_onto_another_precision(rng, tmp_path):
    adapted, _ = make_pair("sequential", rng)
    keras_fvae.save_adapter(adapted, tmp_path / FILE)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        other = small_models.make_sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    set_base_weights(other, adapted.weights)
    keras_fvae.load_adapter(other, tmp_path / FILE)
    np.testing.assert_allclose(
        small_models.predict(other, "sequential").astype("float32"),
        small_models.predict(adapted, "sequential"),
        atol=0.1,
    )


def stateful_model(kind):
    """A model with layers that change state of theirs without a gradient."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, name="query")(inputs)
    x = STATEFUL[kind](name="stateful")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


class Counts(keras.layers.Layer):
    """Divides by a number that each step in training makes larger."""

    def build(self, input_shape):
        self.count = self.add_weight(
            (), "ones", dtype="int32", trainable=False, name="count"
        )
        self.mean = self.add_weight((8,), "zeros", trainable=False, name="mean")

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1)
            self.mean.assign(keras.ops.mean(x, axis=0))
        return x / keras.ops.cast(self.count, x.dtype) - self.mean


STATEFUL = {
    "batch_norm": lambda **kw: keras.layers.BatchNormalization(
        momentum=0.5, **kw
    ),
    "statistics_alone": lambda **kw: keras.layers.BatchNormalization(
        momentum=0.5, center=False, scale=False, **kw
    ),
    "spectral": lambda **kw: keras.layers.SpectralNormalization(
        keras.layers.Dense(8), **kw
    ),
    "own": Counts,
}


def fit_stateful(model, rng, epochs=3):
    x = (3 * rng.normal(size=(16, 8)) + 5).astype("float32")
    model.compile(
        keras.optimizers.Adam(0.03),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, np.arange(16) % 3, epochs=epochs, verbose=0)
    return x


def without_numbers(path):
    return re.sub(r"_\d+", "", path)


@pytest.mark.one_backend
@pytest.mark.parametrize("is_chosen", [True, False])
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_without_a_gradient_comes_back(kind, is_chosen, rng, tmp_path):
    model, loaded = stateful_model(kind), stateful_model(kind)
    chosen = ["stateful", "head"] if is_chosen else ["head"]
    keras_fvae.enable_fvae_lora(model, trainable_layer_names=chosen, **SMALL)
    layer = model.get_layer("stateful")
    before = [to_numpy(weight) for weight in layer.weights]
    x = fit_stateful(model, rng)
    moved = not all(map(np.array_equal, map(to_numpy, layer.weights), before))
    # Frozen, batch normalization changes nothing; others do not ask.
    assert moved == (is_chosen or kind in ("spectral", "own"))
    keras_fvae.save_adapter(model, tmp_path / FILE)
    _, arrays = files.parse((tmp_path / FILE).read_bytes(), FILE)
    assert moved == any("stateful" in name for name in arrays)
    keras_fvae.load_adapter(loaded, tmp_path / FILE)
    np.testing.assert_allclose(
        to_numpy(loaded(x)), to_numpy(model(x)), atol=1e-6
    )
    # And it trains as it did.
    trainable = [[la.trainable for la in m.layers] for m in (model, loaded)]
    assert trainable[0] == trainable[1]
    keras_fvae.save_adapter(loaded, tmp_path / FILE)
    _, again = files.parse((tmp_path / FILE).read_bytes(), FILE)
    assert sorted(map(without_numbers, again)) == sorted(
        map(without_numbers, arrays)
    )


@pytest.mark.parametrize(
    "freeze",
    [
        lambda model: setattr(model, "trainable", False),
        lambda model: setattr(model.get_layer("head"), "trainable", False),
        lambda model: [setattr(w, "trainable", False) for w in model.weights],
    ],
)
@pytest.mark.parametrize("compile_again", [False, True])
@pytest.mark.one_backend
def test_what_was_trained_and_then_frozen_comes_back(
    freeze, compile_again, rng, tmp_path
):
    model, loaded = (
        small_models.make_sequential(),
        small_models.make_sequential(),
    )
    loaded.set_weights(model.get_weights())
    enable(model, "sequential")
    small_models.compile_model(model, "sequential")
    small_models.fit(model, "sequential")
    freeze(model)
    if compile_again:
        small_models.compile_model(model, "sequential")
    predictions = small_models.predict(model, "sequential")
    keras_fvae.save_adapter(model, tmp_path / FILE)
    keras_fvae.load_adapter(loaded, tmp_path / FILE)
    np.testing.assert_allclose(
        small_models.predict(loaded, "sequential"), predictions, atol=1e-6
    )
    assert len(loaded.trainable_weights) == 5
    # Also when it goes by a whole model in between.
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    keras_fvae.save_adapter(model, tmp_path / FILE)
    _, arrays = files.parse((tmp_path / FILE).read_bytes(), FILE)
    assert {"weights/head/kernel", "weights/head/bias"} <= arrays.keys()


@pytest.mark.one_backend
def test_the_head_of_a_task_that_was_trained_and_then_frozen(rng, tmp_path):
    model, loaded = (
        small_models.make_text_classifier(),
        small_models.make_text_classifier(),
    )
    loaded.set_weights(model.get_weights())
    model.backbone.enable_fvae_lora(**SMALL)
    small_models.compile_model(model, "text_classifier")
    small_models.fit(model, "text_classifier")
    model.trainable = False
    small_models.compile_model(model, "text_classifier")
    predictions = small_models.predict(model, "text_classifier")
    keras_fvae.save_adapter(model, tmp_path / FILE)
    keras_fvae.load_adapter(loaded, tmp_path / FILE)
    np.testing.assert_allclose(
        small_models.predict(loaded, "text_classifier"), predictions, atol=1e-6
    )


def test_a_layer_by_itself_is_saved(rng, tmp_path):
    def make():
        layer = keras.layers.Dense(3, name="query")
        layer.build((None, 4))
        return layer

    layer, other = make(), make()
    other.set_weights(layer.get_weights())
    keras_fvae.enable_fvae_lora(layer, 2, "query")
    move_adapters(layer, rng)
    x = rng.normal(size=(2, 4)).astype("float32")
    keras_fvae.save_adapter(layer, tmp_path / FILE)
    keras_fvae.load_adapter(other, tmp_path / FILE)
    np.testing.assert_allclose(to_numpy(other(x)), to_numpy(layer(x)))
