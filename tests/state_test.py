"""Adapters as values: several on one base, put where they fit."""

import copy
import gc
import pathlib
import pickle
import re
import time
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from helpers import BACKEND
from helpers import CallCounter
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy

import keras_fvae
from keras_fvae.model import lookup

FVAE = {"rank": 2, "decoder_units": (4,)}
CONFIGS = {
    "fvae_lora": keras_fvae.FVAELoRAConfig(**FVAE, seed=1),
    "lora": keras_fvae.LoRAConfig(2, seed=1),
    "dora": keras_fvae.DoRAConfig(2, seed=1),
    "pissa": keras_fvae.PiSSAConfig(2),
}
FILE = "task.safetensors"


def make_model(rng, names=("query", "value")):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            *(keras.layers.Dense(6, name=name) for name in names),
            keras.layers.Dense(3, name="head"),
        ]
    )
    set_values(model, rng)
    return model


def set_values(model, rng):
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))


def adapt(model, rng, config=None):
    config = config or CONFIGS["fvae_lora"]
    keras_fvae.enable_adapter(
        model, config, ["query", "value"], trainable_layer_names=["head"]
    )
    move_adapters(model, rng)
    model.layers[-1].kernel.assign(rng.normal(size=(6, 3)))


def predict(model, x):
    return to_numpy(model(x, training=False))


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 5)).astype("float32")


@pytest.mark.parametrize("method", CONFIGS)
def test_states_of_several_tasks_on_one_base(method, rng, x):
    model = make_model(rng)
    states, expected = [], []
    for _ in range(3):
        adapt(model, rng, CONFIGS[method])
        states.append(keras_fvae.get_adapter(model))
        expected.append(predict(model, x))
        keras_fvae.remove_adapter(model)
    # Onto the plain model, then from one to another, then known ones.
    for index in (0, 1, 2, 0, 2, 1):
        keras_fvae.set_adapter(model, states[index])
        np.testing.assert_array_equal(predict(model, x), expected[index])


def test_a_state_does_not_follow_the_model(rng, x):
    model = make_model(rng)
    adapt(model, rng)
    state, before = keras_fvae.get_adapter(model), predict(model, x)
    keras_fvae.set_adapter(model, state)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x, np.ones((4, 3)), epochs=2, verbose=0)
    assert np.abs(predict(model, x) - before).max() > 0.01
    keras_fvae.set_adapter(model, state)
    np.testing.assert_array_equal(predict(model, x), before)
    # What was assigned is no memory of the state's.
    model.fit(x, np.ones((4, 3)), epochs=2, verbose=0)
    keras_fvae.set_adapter(model, state)
    np.testing.assert_array_equal(predict(model, x), before)


def test_a_switch_compiles_nothing(rng, x):
    counter = CallCounter()
    model = keras.Sequential(
        [
            keras.Input((5,)),
            counter,
            keras.layers.Dense(6, name="query"),
            keras.layers.Dense(6, name="value"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    adapt(model, rng)
    first = keras_fvae.get_adapter(model)
    move_adapters(model, rng)
    second = keras_fvae.get_adapter(model)
    model.compile("sgd", "mse", jit_compile=BACKEND == "jax")
    outputs = []
    model.predict(x, verbose=0)
    num_calls = counter.num_calls
    for state in (first, second, first, second):
        keras_fvae.set_adapter(model, state)
        outputs.append(model.predict(x, verbose=0))
    # PyTorch runs what others compile.
    assert counter.num_calls - num_calls == (4 if BACKEND == "torch" else 0)
    np.testing.assert_array_equal(outputs[0], outputs[2])
    np.testing.assert_array_equal(outputs[1], outputs[3])
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "config", [keras_fvae.FVAELoRAConfig(16), keras_fvae.LoRAConfig(16)]
)
def test_a_switch_is_quick(config, rng):
    """24 layers of ViT-B/16, beside what their assignments alone take."""
    model = keras.Sequential(
        [
            keras.Input((768,)),
            *(
                keras.layers.Dense(768, name=f"{name}_{index}")
                for index in range(12)
                for name in ("query", "value")
            ),
        ]
    )
    keras_fvae.enable_adapter(model, config, re.compile("query|value"))
    states = []
    for _ in range(2):
        move_adapters(model, rng)
        states.append(keras_fvae.get_adapter(model))
        keras_fvae.set_adapter(model, states[-1])
    weights = [w for la in model.layers for w in la.adapter.weights]
    values = [np.array(to_numpy(weight)) for weight in weights]

    def assign(_):
        for weight, value in zip(weights, values):
            weight.assign(value)

    def switch(index):
        keras_fvae.set_adapter(model, states[index % 2])

    def shortest(function):
        seconds = []
        for index in range(8):
            began = time.perf_counter()
            function(index)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    assert shortest(switch) < 2 * shortest(assign) + 2e-3


def test_others_replace_what_is_there(rng, x):
    model = make_model(rng)
    states, expected = {}, {}
    for name, config in {
        **CONFIGS,
        "rank 3": keras_fvae.LoRAConfig(3),
    }.items():
        adapt(model, rng, config)
        states[name] = keras_fvae.get_adapter(model)
        expected[name] = predict(model, x)
        keras_fvae.remove_adapter(model)
    keras_fvae.set_adapter(model, states["lora"])
    for name, message in {
        "rank 3": "'query' the state has rank=3, the model rank=2",
        "dora": "the state has class_name='DoRAConfig'",
    }.items():
        before = snapshot(model)
        with pytest.raises(ValueError, match=message) as caught:
            keras_fvae.set_adapter(model, states[name])
        assert "replace=True" in str(caught.value)
        assert snapshot(model) == before
    for name in [*states, *reversed(states)]:
        keras_fvae.set_adapter(model, states[name], replace=True)
        np.testing.assert_array_equal(predict(model, x), expected[name])
        model.compile("sgd", "mse")
        model.fit(x, np.ones((4, 3)), verbose=0)
        assert model.layers[-1].trainable_weights
    keras_fvae.remove_adapter(model)
    assert all(weight.trainable for weight in model.weights)


def test_a_state_that_was_known_and_no_longer_fits(rng, x):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model)
    keras_fvae.set_adapter(model, state)
    expected = predict(model, x)
    keras_fvae.remove_adapter(model)
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2), "query")
    with pytest.raises(ValueError, match="does not fit the model"):
        keras_fvae.set_adapter(model, state)
    keras_fvae.set_adapter(model, state, replace=True)
    np.testing.assert_array_equal(predict(model, x), expected)
    keras_fvae.finalize_adapter(model)
    with pytest.raises(ValueError, match="finalized=False, the model finalize"):
        keras_fvae.set_adapter(model, state)


def test_settings_of_training(rng, x, tmp_path):
    model = make_model(rng)
    adapt(model, rng, keras_fvae.FVAELoRAConfig(**FVAE, elbo_weight=1e-2))
    state, expected = keras_fvae.get_adapter(model), predict(model, x)
    keras_fvae.remove_adapter(model)
    state.save(tmp_path / FILE)
    keras_fvae.load_adapter(
        model, tmp_path / FILE, elbo_weight=4e-3, dropout=0.2, seed=7
    )
    layers = lookup.adapted_layers(model)
    assert [layer.config.elbo_weight for layer in layers] == [4e-3, 4e-3]
    assert [layer.config.seed for layer in layers] == [7, 8]
    assert {layer.config.dropout for layer in layers} == {0.2}
    np.testing.assert_array_equal(predict(model, x), expected)
    # A model that is adapted with others keeps them.
    keras_fvae.load_adapter(model, tmp_path / FILE)
    assert [layer.config.elbo_weight for layer in layers] == [4e-3, 4e-3]
    with pytest.raises(ValueError, match="elbo_weight=1.0.*replace=True"):
        keras_fvae.set_adapter(model, state, elbo_weight=1.0)
    keras_fvae.set_adapter(model, state, replace=True, elbo_weight=1.0)
    layers = lookup.adapted_layers(model)
    assert [layer.config.elbo_weight for layer in layers] == [1.0, 1.0]
    np.testing.assert_array_equal(predict(model, x), expected)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"alpha": 2.0}, ValueError, "only settings of training.*dropout"),
        ({"no_such": 1}, ValueError, "'no_such'"),
        ({"elbo_weight": -1.0}, ValueError, "`elbo_weight` must be"),
        ({"kl_weight": 0.1}, ValueError, "smaller than `kl_weight`"),
        ({"only": "head"}, ValueError, "`only` must be 'all' or 'adapter'"),
    ],
)
def test_settings_that_are_refused(settings, error, message, rng):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model)
    keras_fvae.remove_adapter(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        keras_fvae.set_adapter(model, state, **settings)
    assert snapshot(model) == before


def test_what_has_no_settings_of_training(rng):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model, include="inference")
    keras_fvae.remove_adapter(model)
    with pytest.raises(ValueError, match="only what inference needs"):
        keras_fvae.set_adapter(model, state, dropout=0.3)


def make_backbone(rng, **options):
    backbone = BACKBONES["BertBackbone"](**options)
    set_values(backbone, rng)
    return backbone


def make_task(backbone, cls=keras_hub.models.BertTextClassifier, **options):
    return cls(backbone, preprocessor=None, **{"num_classes": 3, **options})


def updates_of(model):
    """Array of each adapted layer's B, in their order."""
    return [
        to_numpy(layer.adapter.kernel_b)
        for layer in lookup.adapted_layers(model)
    ]


def move(model, rng):
    move_adapters(model, rng)
    return updates_of(model)


@pytest.mark.one_backend
def test_of_a_backbone_onto_a_task(rng):
    values = make_backbone(rng).get_weights()
    backbones = [make_backbone(rng) for _ in range(2)]
    for backbone in backbones:
        backbone.set_weights(values)
    backbones[0].enable_adapter(CONFIGS["lora"])
    updates = move(backbones[0], rng)
    state = keras_fvae.get_adapter(backbones[0])
    task = make_task(backbones[1])
    keras_fvae.set_adapter(task, state)
    for update, ours in zip(updates, updates_of(task), strict=True):
        np.testing.assert_array_equal(ours, update)
    # The head is new, and no part of what was frozen.
    head = task.get_layer("logits")
    assert len(head.trainable_weights) == 2
    assert not backbones[1].get_layer("token_embedding").trainable_weights


@pytest.mark.one_backend
def test_of_a_task_onto_its_bare_backbone(rng):
    values = make_backbone(rng).get_weights()
    backbones = [make_backbone(rng) for _ in range(2)]
    for backbone in backbones:
        backbone.set_weights(values)
    task = make_task(backbones[0])
    keras_fvae.enable_adapter(
        task, CONFIGS["lora"], trainable_layer_names=["logits"]
    )
    updates = move(task, rng)
    state = keras_fvae.get_adapter(task)
    before = snapshot(backbones[1])
    with pytest.raises(ValueError, match="'logits/.*only='adapter'"):
        keras_fvae.set_adapter(backbones[1], state)
    assert snapshot(backbones[1]) == before
    keras_fvae.set_adapter(backbones[1], state, only="adapter")
    for update, ours in zip(updates, updates_of(backbones[1]), strict=True):
        np.testing.assert_array_equal(ours, update)


def make_siamese(encoders, names=("left", "right")):
    inputs = [keras.Input((5,), name=name) for name in names]
    outputs = [e(x) for e, x in zip(encoders, inputs)]
    return keras.Model(inputs, keras.layers.Subtract()(outputs))


def make_encoder(rng, name):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, name="query"),
            keras.layers.Dense(6, name="value"),
        ],
        name=name,
    )
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model


def test_siamese_models(rng, x):
    shared = make_encoder(np.random.default_rng(1), "encoder")
    siamese = make_siamese([shared, shared])
    keras_fvae.enable_adapter(siamese, CONFIGS["lora"])
    updates = move(siamese, rng)
    state = keras_fvae.get_adapter(siamese)
    # Onto the encoder alone, and onto another model around it.
    bare = make_encoder(np.random.default_rng(1), "another_name")
    around = keras.Sequential(
        [
            keras.Input((5,)),
            make_encoder(np.random.default_rng(1), "third"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    for model in (bare, around):
        keras_fvae.set_adapter(model, state)
        for update, ours in zip(updates, updates_of(model), strict=True):
            np.testing.assert_array_equal(ours, update)
    # An encoder's onto a siamese model; where there are two it must be told.
    state = keras_fvae.get_adapter(bare)
    siamese = make_siamese([make_encoder(np.random.default_rng(1), "it")] * 2)
    keras_fvae.set_adapter(siamese, state)
    two = [make_encoder(np.random.default_rng(1), name) for name in "ab"]
    siamese = make_siamese(two)
    before = snapshot(siamese)
    with pytest.raises(ValueError, match=r"several parts.*\['a', 'b'\]"):
        keras_fvae.set_adapter(siamese, state)
    assert snapshot(siamese) == before
    keras_fvae.set_adapter(siamese.get_layer("b"), state)
    assert [layer.path for layer in lookup.adapted_layers(siamese)] == [
        "b/query",
        "b/value",
    ]


def test_only_the_adapter_leaves_the_head(rng, x):
    model = make_model(rng)
    adapt(model, rng)
    state, updates = keras_fvae.get_adapter(model), updates_of(model)
    keras_fvae.remove_adapter(model)
    kernel = rng.normal(size=(6, 3))
    model.layers[-1].kernel.assign(kernel)
    keras_fvae.set_adapter(model, state, only="adapter")
    np.testing.assert_allclose(model.layers[-1].kernel, kernel, rtol=1e-6)
    for update, ours in zip(updates, updates_of(model), strict=True):
        np.testing.assert_array_equal(ours, update)
    assert len(model.layers[-1].trainable_weights) == 2


def test_another_base_is_told(rng, tmp_path, recwarn):
    model = make_model(np.random.default_rng(5))
    adapt(model, rng)
    keras_fvae.save_adapter(model, tmp_path / FILE)
    same = make_model(np.random.default_rng(5))
    keras_fvae.load_adapter(same, tmp_path / FILE, strict=True)
    assert not [w for w in recwarn if "base model" in str(w.message)]
    other = make_model(np.random.default_rng(6))
    before = snapshot(other)
    with pytest.raises(ValueError, match="2 of 2 adapted layers.*'query'"):
        keras_fvae.load_adapter(other, tmp_path / FILE, strict=True)
    assert snapshot(other) == before
    with pytest.warns(UserWarning, match="trained on another base model"):
        keras_fvae.load_adapter(other, tmp_path / FILE)
    assert len(lookup.adapted_layers(other)) == 2


@pytest.mark.shared_out
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8", "int4"])
def test_a_cast_or_quantized_base_is_the_same(precision, rng, recwarn):
    def make(seed, dtype="float32"):
        rng = np.random.default_rng(seed)
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(64, name="query", dtype=dtype),
            ]
        )
        for weight in model.weights:
            weight.assign(rng.normal(size=weight.shape) * 0.05)
        return model

    model = make(0)
    keras_fvae.enable_adapter(model, CONFIGS["lora"])
    state = keras_fvae.get_adapter(model)
    models = []
    for seed in (0, 1):
        if precision.startswith("int"):
            models.append(make(seed))
            models[-1].quantize(precision)
        else:
            models.append(make(seed, precision))
    keras_fvae.set_adapter(models[0], state, strict=True)
    with pytest.raises(ValueError, match="another base model"):
        keras_fvae.set_adapter(models[1], state, strict=True)


def test_a_state_says_what_it_is(rng, tmp_path):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model)
    text = str(state)
    assert text.startswith("FVAE-LoRA of rank 2 on 2 layers, ")
    assert text.endswith("numbers, with 2 other weights")
    state.save(tmp_path / FILE)
    assert str(keras_fvae.read_adapter(tmp_path / FILE)) == text
    inference = keras_fvae.get_adapter(model, "inference")
    assert "for inference alone" in str(inference)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_state_is_a_value(method, rng, x):
    model = make_model(rng)
    adapt(model, rng, CONFIGS[method])
    state, expected = keras_fvae.get_adapter(model), predict(model, x)
    keras_fvae.set_adapter(model, state)
    with pytest.raises(TypeError):
        state.arrays["layers/query/kernel_b"] = None
    with pytest.raises(ValueError, match="read-only"):
        state.arrays["layers/query/kernel_b"][:] = 0
    keras_fvae.remove_adapter(model)
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        keras_fvae.set_adapter(model, copied, replace=True)
        np.testing.assert_array_equal(predict(model, x), expected)


def test_a_known_state_does_not_pass_over_a_scale(rng):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model)
    keras_fvae.set_adapter(model, state)
    keras_fvae.adapter_scale(model, 0.5)
    with pytest.raises(ValueError, match="alpha=None, the model alpha=1.0"):
        keras_fvae.set_adapter(model, state)


@pytest.mark.one_backend
@pytest.mark.parametrize("state", [None, "task.safetensors", {}, 3])
def test_what_is_no_state(state, rng):
    with pytest.raises(TypeError, match="`state` must be an `AdapterState`"):
        keras_fvae.set_adapter(make_model(rng), state)


def test_summaries(rng):
    model = make_model(rng)
    summary = keras_fvae.enable_adapter(
        model, CONFIGS["fvae_lora"], ["query", "value"],
        trainable_layer_names=["head"],
    )  # fmt: skip
    lines = str(summary).splitlines()
    assert lines[0] == "FVAE-LoRA of rank 2 on 2 layers, as made:"
    assert [line.split("/")[-1] for line in lines[1:3]] == ["query", "value"]
    assert lines[3:7] == [
        "Train besides:",
        "  head/kernel",
        "  head/bias",
        "Parameters:",
    ]
    move_adapters(model, rng)
    with keras_fvae.adapter_disabled(model):
        text = str(keras_fvae.adapter_summary(model))
    assert "of rank 2 on 2 layers, trained" in text
    assert text.count("(off)") == 2
    keras_fvae.finalize_adapter(model)
    assert "finalized" in str(keras_fvae.adapter_summary(model))
    with pytest.raises(ValueError, match="has no adapted layer"):
        keras_fvae.adapter_summary(make_model(rng))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_summary_knows_what_was_trained(method, rng, x):
    model = make_model(rng)
    keras_fvae.enable_adapter(model, CONFIGS[method], ["query", "value"])
    summary = keras_fvae.adapter_summary(model)
    assert {layer.state for layer in summary.layers} == {"as made"}
    model.compile(keras.optimizers.SGD(0.1), "mse")
    # FVAE-LoRA's B moves in the second step.
    model.fit(x, np.ones((4, 3)), epochs=2, verbose=0)
    summary = keras_fvae.adapter_summary(model)
    assert {layer.state for layer in summary.layers} == {"trained"}


def test_a_new_head_that_does_not_train_is_told(rng):
    model = make_model(rng)
    model.layers[-1].bias.assign(np.zeros(3))
    with pytest.warns(UserWarning, match="'head' looks new and does not train"):
        summary = keras_fvae.enable_adapter(model, CONFIGS["lora"], "query")
    assert summary.fresh == ("head",)
    assert "Warning: The layer 'head' looks new" in str(summary)
    keras_fvae.remove_adapter(model)
    summary = keras_fvae.enable_adapter(
        model, CONFIGS["lora"], "query", trainable_layer_names=["head"]
    )
    assert summary.fresh == ()


@pytest.mark.one_backend
def test_a_backbone_has_no_head_that_could_be_new(rng, recwarn):
    backbone = make_backbone(rng)
    bias = backbone.get_layer("pooled_dense").bias
    bias.assign(np.zeros(bias.shape))
    summary = backbone.enable_adapter(CONFIGS["lora"])
    assert summary.fresh == ()
    assert not [w for w in recwarn if "looks new" in str(w.message)]


def test_the_summary_has_the_word_of_the_monitor(rng, x):
    model = make_model(rng)
    adapt(model, rng)
    model.compile("sgd", "mse")
    model.fit(
        x, np.ones((4, 3)), verbose=0,
        callbacks=[keras_fvae.FVAELoRAMonitor()],
    )  # fmt: skip
    words = {la.health for la in keras_fvae.adapter_summary(model).layers}
    assert words <= {"fine", "collapsed", "drowned", "diverged"}
    assert None not in words


@pytest.mark.one_backend
def test_the_word_of_the_monitor_goes_with_the_weights(rng, x, tmp_path):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model)
    model.save_weights(tmp_path / "model.weights.h5")
    monitor = keras_fvae.FVAELoRAMonitor()
    for set_weights in (
        lambda: keras_fvae.set_adapter(model, state),
        lambda: model.load_weights(tmp_path / "model.weights.h5"),
    ):
        model.compile("sgd", "mse")
        model.fit(x, np.ones((4, 3)), verbose=0, callbacks=[monitor])
        for has_word in (True, False):
            for layer in keras_fvae.adapter_summary(model).layers:
                assert (layer.health is not None) == has_word
            set_weights()


def fit(model, x, callbacks, **options):
    model.compile(keras.optimizers.SGD(0.001), "mse")
    return model.fit(
        x, np.ones((4, 3)), validation_data=(x, np.ones((4, 3))), verbose=0,
        callbacks=callbacks, **options,
    ).history  # fmt: skip


def test_checkpoints_of_each_epoch(rng, x, tmp_path):
    model = make_model(rng)
    adapt(model, rng)
    checkpoint = keras_fvae.AdapterCheckpoint(
        tmp_path / "made" / "{epoch:02d}-{val_loss:.2f}.safetensors"
    )
    history = fit(model, x, [checkpoint], epochs=3)
    assert np.isfinite(history["loss"]).all()
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == [
        f"{epoch:02d}-{loss:.2f}.safetensors"
        for epoch, loss in enumerate(history["val_loss"], 1)
    ]
    after = predict(model, x)
    keras_fvae.load_adapter(model, tmp_path / "made" / names[0])
    assert np.abs(predict(model, x) - after).max() > 1e-4
    keras_fvae.load_adapter(model, tmp_path / "made" / names[-1])
    np.testing.assert_array_equal(predict(model, x), after)


class Scripted(keras.callbacks.Callback):
    """Puts values into the logs, one an epoch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["val_score"] = self.values[epoch]


def test_the_best_checkpoint(rng, x, tmp_path):
    model = make_model(rng)
    adapt(model, rng)
    path = tmp_path / FILE

    def run(values, **options):
        checkpoint = keras_fvae.AdapterCheckpoint(
            path, "val_score", save_best_only=True, mode="max", **options
        )
        fit(model, x, [Scripted(values), checkpoint], epochs=len(values))
        return keras_fvae.read_adapter(path).record["checkpoint"]

    best = run([float("inf"), 0.1, float("nan"), 0.5, 0.3])
    assert best == {"monitor": "val_score", "value": 0.5, "epoch": 4}
    assert "val_score=0.5 after epoch 4" in str(keras_fvae.read_adapter(path))
    # Goes on: what is worse than what is there does not replace it.
    assert run([0.4], resume=True) == best
    assert run([0.6], resume=True)["value"] == 0.6
    assert run([0.2])["value"] == 0.2


def test_a_run_goes_on_with_its_best(rng, x, tmp_path):
    """As one that was killed, with Keras's own backup."""

    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    model = make_model(rng)
    adapt(model, rng)
    values = [0.9, 0.1, 0.5, 0.8]

    def callbacks():
        return [
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            Scripted(values),
            keras_fvae.AdapterCheckpoint(
                tmp_path / FILE, "val_score", save_best_only=True, mode="max",
                resume=True,
            ),
        ]  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        fit(model, x, [*callbacks(), Killed()], epochs=4)
    fit(model, x, callbacks(), epochs=4)
    checkpoint = keras_fvae.read_adapter(tmp_path / FILE).record["checkpoint"]
    assert checkpoint == {"monitor": "val_score", "value": 0.9, "epoch": 1}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "options, message",
    [
        ({"filepath": "task.h5"}, "must end in '.safetensors'"),
        ({"mode": "best"}, "`mode` must be one of"),
        ({"include": "some"}, "`include` must be"),
        ({"monitor": "score", "save_best_only": True}, "Pass `mode='max'`"),
        (
            {
                "filepath": "{epoch}.safetensors",
                "resume": True,
                "save_best_only": True,
            },
            "one name",
        ),
        ({"save_best_only": "no"}, "`save_best_only` must be a boolean"),
        ({"resume": "no"}, "`resume` must be a boolean"),
        ({"resume": True}, "goes with `save_best_only=True`"),
        ({"filepath": "t-{}.safetensors"}, "entries of the logs"),
        ({"filepath": "t-{epoch.safetensors"}, "entries of the logs"),
        ({"monitor": None, "save_best_only": True}, "`monitor` must be"),
    ],
)
def test_checkpoints_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        keras_fvae.AdapterCheckpoint(**{"filepath": FILE, **options})


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "option, message",
    [
        ({"replace": "no"}, "`replace` must be a boolean.*'no'"),
        ({"strict": "no"}, "`strict` must be a boolean.*'no'"),
        ({"only": "head"}, "`only` must be"),
    ],
)
def test_options_that_are_refused(rng, option, message):
    model = make_model(rng)
    adapt(model, rng)
    state = keras_fvae.get_adapter(model)
    with pytest.raises(ValueError, match=message):
        keras_fvae.set_adapter(model, state, **option)


def test_checkpoints_of_models_that_have_none(rng, x, tmp_path):
    path = tmp_path / FILE
    with pytest.raises(ValueError, match="has no adapted layer"):
        fit(make_model(rng), x, [keras_fvae.AdapterCheckpoint(path)])
    model = make_model(rng)
    adapt(model, rng)
    checkpoint = keras_fvae.AdapterCheckpoint(
        path, "val_accuracy", save_best_only=True
    )
    with pytest.raises(ValueError, match="one of what is logged.*'val_loss'"):
        fit(model, x, [checkpoint])
    checkpoint = keras_fvae.AdapterCheckpoint("{nothing}.safetensors")
    with pytest.raises(ValueError, match="names 'nothing'.*'val_loss'"):
        fit(model, x, [checkpoint])
    keras_fvae.save_adapter(model, path)
    checkpoint = keras_fvae.AdapterCheckpoint(
        path, save_best_only=True, resume=True
    )
    with pytest.raises(ValueError, match="was not saved by"):
        fit(model, x, [checkpoint])
    assert pathlib.Path(path).exists()


def train(model, rng, names, targets=("query", "value")):
    """Adapts a model, and moves the adapters and what else trains."""
    keras_fvae.enable_adapter(
        model, CONFIGS["lora"], [*targets], trainable_layer_names=[*names]
    )
    move_adapters(model, rng)
    for weight in model.trainable_weights:
        weight.assign(to_numpy(weight) + rng.normal(size=weight.shape))
    return keras_fvae.get_adapter(model)


def test_states_that_train_other_layers(rng, x):
    model = make_model(rng, ("query", "value", "between"))
    narrow = train(model, rng, ["head"])
    keras_fvae.remove_adapter(model)
    wide = train(model, rng, ["head", "between"])
    expected = predict(model, x)
    with pytest.raises(ValueError, match="'between/.*only in the model"):
        keras_fvae.set_adapter(model, narrow)
    with pytest.warns(UserWarning, match=r"'between/kernel'.*stay as they are"):
        keras_fvae.set_adapter(model, narrow, replace=True)
    assert not model.get_layer("between").trainable_weights
    with pytest.raises(ValueError, match="'between/.*only in the state"):
        keras_fvae.set_adapter(model, wide)
    keras_fvae.set_adapter(model, wide, replace=True)
    np.testing.assert_array_equal(predict(model, x), expected)
    # And it trains, and is saved.
    assert model.get_layer("between").trainable_weights
    again = keras_fvae.get_adapter(model)
    assert again.record["trained"] == wide.record["trained"]
    # Nor is it forgotten when the adapters are removed.
    keras_fvae.remove_adapter(model)
    with pytest.warns(UserWarning, match="'between/kernel'.*stay as they are"):
        keras_fvae.set_adapter(model, narrow)


def test_moving_averages_are_not_forgotten(rng, x):
    def make():
        return keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(6, name="query"),
                keras.layers.BatchNormalization(name="norm"),
                keras.layers.Dense(3, name="head"),
            ]
        )

    base = make()
    set_values(base, np.random.default_rng(2))
    model = make()
    model.set_weights(base.get_weights())
    train(model, rng, ["norm", "head"], ["query"])
    mean = model.get_layer("norm").moving_mean
    mean.assign(to_numpy(mean) + 1)
    keras_fvae.remove_adapter(model)
    state = train(model, rng, ["head"], ["query"])
    assert "norm/moving_mean" in state.record["state"]


@pytest.mark.one_backend
def test_what_samples_is_not_saved_for_inference(rng, tmp_path):
    model = make_model(rng)
    keras_fvae.enable_fvae_lora(
        model, sample_at_inference=True, **FVAE, target_layer_names="query"
    )
    for call in (
        lambda: keras_fvae.get_adapter(model, "inference"),
        lambda: keras_fvae.save_adapter(model, tmp_path / FILE, "inference"),
    ):
        with pytest.raises(ValueError, match="saved for inference alone.*samp"):
            call()
    assert not (tmp_path / FILE).exists()


@pytest.mark.one_backend
def test_a_head_does_not_go_into_a_layer_of_the_backbone(rng):
    def make_backbone():
        return make_model(np.random.default_rng(1), ("query",))

    inputs = keras.Input((5,))
    head = keras.layers.Dense(5, name="head")
    task = keras.Model(inputs, head(make_backbone()(inputs)))
    keras_fvae.enable_adapter(
        task, CONFIGS["lora"], "query",
        trainable_layer_names=lambda layer: layer is head,
    )  # fmt: skip
    state = keras_fvae.get_adapter(task)
    bare = make_backbone()
    before = snapshot(bare)
    with pytest.raises(ValueError, match="only='adapter'"):
        keras_fvae.set_adapter(bare, state)
    assert snapshot(bare) == before
    keras_fvae.set_adapter(bare, state, only="adapter")
    assert not bare.get_layer("head").trainable_weights


@pytest.mark.one_backend
def test_flags_of_what_was_never_adapted_stay(rng):
    task = make_task(make_backbone(rng))
    task.get_layer("logits").trainable = False
    task.backbone.enable_adapter(CONFIGS["lora"])
    keras_fvae.remove_adapter(task)
    assert not task.get_layer("logits").trainable
    # Two parts, one after the other: the first one's notes stay.
    state_of = make_backbone(rng)
    state_of.set_weights(task.backbone.get_weights())
    state_of.enable_adapter(CONFIGS["lora"])
    state = keras_fvae.get_adapter(state_of)
    task = make_task(task.backbone)
    keras_fvae.enable_adapter(task, CONFIGS["lora"], ["logits"])
    keras_fvae.set_adapter(task, state)
    keras_fvae.remove_adapter(task)
    assert all(weight.trainable for weight in task.weights)


@pytest.mark.one_backend
def test_a_known_state_leaves_other_adapters(rng):
    values = make_backbone(rng)
    values.enable_adapter(CONFIGS["lora"])
    move_adapters(values, rng)
    state = keras_fvae.get_adapter(values)
    other = make_backbone(rng)
    for ours, theirs in zip(
        other.weights,
        [w for w in values.weights if "adapter" not in w.path],
        strict=True,
    ):
        ours.assign(theirs)
    task = make_task(other)
    keras_fvae.enable_adapter(task, CONFIGS["lora"], ["logits"])
    keras_fvae.set_adapter(task, state)
    kernel_b = task.get_layer("logits").adapter.kernel_b
    kernel_b.assign(np.full(kernel_b.shape, 7.0))
    keras_fvae.set_adapter(task, state)
    assert to_numpy(kernel_b).min() == 7


@pytest.mark.one_backend
def test_a_state_does_not_keep_a_model_alive(rng):
    layer = keras.layers.Dense(6, name="query")
    layer.build((None, 5))
    keras_fvae.enable_adapter(layer, CONFIGS["lora"], "query")
    state = keras_fvae.get_adapter(layer)
    keras_fvae.set_adapter(layer, state)
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None
    assert "on 1 layer," in str(state)


@pytest.mark.one_backend
def test_another_head_that_does_not_train_is_told(rng):
    model = make_model(rng, ("query", "value"))
    state = train(model, rng, ["head"])
    other = keras.Sequential(
        [
            keras.Input((5,)),
            *(keras.layers.Dense(6, name=n) for n in ("query", "value")),
            keras.layers.Dense(2, name="another"),
        ]
    )
    for layer, theirs in zip(other.layers[:2], model.layers):
        layer.kernel.assign(theirs.kernel)
        layer.bias.assign(theirs.bias)
    with pytest.warns(UserWarning, match="'another' looks new and does not tr"):
        keras_fvae.set_adapter(other, state, only="adapter")


@pytest.mark.one_backend
def test_layers_in_another_order(rng, x):
    class Two(keras.Model):
        def __init__(self, names):
            super().__init__(name="two")
            for name in names:
                setattr(self, name, keras.layers.Dense(5, name=name))

        def call(self, x):
            return self.b_2(self.b_1(x))

    first, second = Two(["b_1", "b_2"]), Two(["b_2", "b_1"])
    for model in (first, second):
        model(x)
        for name in ("b_1", "b_2"):
            weights = np.random.default_rng(int(name[-1])).normal(size=(5, 5))
            getattr(model, name).kernel.assign(weights)
    inputs = keras.Input((5,))
    task = keras.Model(
        inputs, keras.layers.Dense(2, name="head")(first(inputs))
    )
    keras_fvae.enable_adapter(task, CONFIGS["lora"], ["b_1", "b_2"])
    move_adapters(task, rng)
    state, expected = keras_fvae.get_adapter(task), predict(first, x)
    keras_fvae.set_adapter(second, state, only="adapter", strict=True)
    np.testing.assert_allclose(predict(second, x), expected, atol=1e-5)


@pytest.mark.one_backend
def test_a_loss_in_a_loop_is_refused(rng):
    def make(unroll):
        model = keras.Sequential(
            [
                keras.Input((3, 4)),
                keras.layers.RNN(Cell(), unroll=unroll, name="loop"),
            ]
        )
        for weight in model.weights:
            weight.assign(np.ones(weight.shape))
        return model

    class Cell(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.state_size = 4
            self.query = keras.layers.Dense(4, name="query")

        def build(self, input_shape):
            self.query.build(input_shape)

        def call(self, x, states):
            y = self.query(x + states[0])
            return y, [y]

    model = make(True)
    keras_fvae.enable_fvae_lora(model, target_layer_names="query", **FVAE)
    state = keras_fvae.get_adapter(model)
    other = make(False)
    before = snapshot(other)
    with pytest.raises(ValueError, match="in the loop of the recurrent layer"):
        keras_fvae.set_adapter(other, state)
    assert snapshot(other) == before
