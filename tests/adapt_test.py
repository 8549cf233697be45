import re
import threading

import keras
import numpy as np
import pytest
from helpers import snapshot
from helpers import text_inputs
from helpers import to_numpy
from small_models import Encoder

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

SMALL = {"rank": 2, "decoder_units": (4,)}


def names(layers):
    return [layer.name for layer in layers]


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = Encoder(name="encoder")
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.encoder(x))


@pytest.fixture
def subclassed():
    model = Subclassed(name="subclassed")
    model(np.ones((1, 5, 8)))
    return model


@pytest.fixture
def sequential():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="relu", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def test_finds_targets_at_any_depth(subclassed):
    summary = keras_fvae.enable_fvae_lora(subclassed, **SMALL)
    assert summary.layer_paths == (
        "subclassed/encoder/attention_0/query",
        "subclassed/encoder/attention_0/value",
        "subclassed/encoder/attention_1/query",
        "subclassed/encoder/attention_1/value",
    )


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("head", ["head"]),
        (["up", "head"], ["up", "head"]),
        (re.compile(r"attention_1/.*(query|key)"), ["query", "key"]),
        ([re.compile("feedforward/"), "head"], ["up", "down", "head"]),
        (
            lambda layer: (
                isinstance(layer, keras.layers.Dense) and layer.units > 8
            ),
            ["up"],
        ),
        ({"head"}, ["head"]),
    ],
)
def test_target_layer_names(subclassed, targets, expected):
    keras_fvae.enable_fvae_lora(subclassed, target_layer_names=targets, **SMALL)
    assert names(adapted_layers(subclassed)) == expected


def test_sequential(sequential, rng):
    x = rng.normal(size=(4, 8))
    before = sequential.predict(x, verbose=0)
    keras_fvae.enable_fvae_lora(
        sequential, target_layer_names=["hidden"], **SMALL
    )
    np.testing.assert_array_equal(sequential.predict(x, verbose=0), before)
    sequential.compile("sgd", "mse")
    history = sequential.fit(x, np.ones((4, 3)), verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_adapts_in_place(bert, rng):
    inputs = text_inputs(rng)
    before = bert.predict(inputs, verbose=0)
    layers = bert._flatten_layers()
    state = [(id(layer), layer.name, layer.path) for layer in layers]
    classes = [type(layer).__mro__ for layer in layers]
    weights = {id(w): (w.path, to_numpy(w)) for w in bert.weights}
    query = bert.backbone.transformer_layers[0]._self_attention_layer

    bert.backbone.enable_fvae_lora(**SMALL)

    np.testing.assert_array_equal(bert.predict(inputs, verbose=0), before)
    assert state == [(id(lyr), lyr.name, lyr.path) for lyr in layers]
    for layer, mro in zip(layers, classes):
        assert isinstance(layer, mro[0])
        if not isinstance(layer, keras.layers.EinsumDense):
            assert type(layer).__name__ == mro[0].__name__
    by_id = {id(weight): weight for weight in bert.weights}
    for identity, (path, value) in weights.items():
        assert by_id[identity].path == path
        np.testing.assert_array_equal(to_numpy(by_id[identity]), value)
    assert isinstance(query._query_dense, keras_fvae.AdaptedEinsumDense)
    assert query._query_dense in adapted_layers(bert)


def test_adapter_weights_have_full_paths(bert):
    bert.backbone.enable_fvae_lora(**SMALL)
    layer = adapted_layers(bert)[0]
    assert layer.adapter.kernel_b.path == f"{layer.path}/adapter/kernel_b"
    assert (
        layer.adapter.fvae.feature_weights.path
        == f"{layer.path}/adapter/fvae/feature_weights"
    )


def trainable_names(model):
    return {w.path.split("/adapter/")[0] for w in model.trainable_weights}


def test_everything_else_is_frozen(subclassed):
    summary = keras_fvae.enable_fvae_lora(
        subclassed, target_layer_names=["up"], **SMALL
    )
    assert trainable_names(subclassed) == set(summary.layer_paths)


def test_weights_of_the_model_itself_are_frozen():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.query = keras.layers.Dense(3, name="query")

        def build(self, input_shape):
            self.offset = self.add_weight(shape=(3,), name="offset")
            self.query.build(input_shape)

        def call(self, x):
            return self.query(x) + self.offset

    model = Model()
    model.build((None, 4))
    keras_fvae.enable_fvae_lora(model, **SMALL)
    assert trainable_names(model) == {model.query.path}


def test_the_head_of_a_task_stays_as_it_was(bert):
    summary = bert.backbone.enable_fvae_lora(**SMALL)
    assert trainable_names(bert) == {
        *summary.layer_paths,
        "logits/kernel",
        "logits/bias",
    }


def test_trainable_layer_names(bert):
    summary = bert.backbone.enable_fvae_lora(
        trainable_layer_names=["pooled_dense", re.compile("_0/.*layer_norm$")],
        **SMALL,
    )
    norms = [
        f"transformer_layer_0/{norm}/{weight}"
        for norm in ("self_attention_layer_norm", "feedforward_layer_norm")
        for weight in ("gamma", "beta")
    ]
    assert trainable_names(bert.backbone) == {
        *summary.layer_paths,
        "pooled_dense/kernel",
        "pooled_dense/bias",
        *norms,
    }


def test_a_trainable_layer_keeps_adapted_kernels_frozen(bert):
    bert.backbone.enable_fvae_lora(
        trainable_layer_names=["transformer_layer_0"], **SMALL
    )
    trainable = trainable_names(bert.backbone)
    attention = "transformer_layer_0/self_attention_layer"
    assert f"{attention}/key/kernel" in trainable
    assert f"{attention}/query/kernel" not in trainable
    assert f"{attention}/query" in trainable


def test_a_shared_layer_is_adapted_once(rng):
    shared = keras.layers.Dense(4, name="query")

    def tower(name):
        inputs = keras.Input((4,))
        return keras.Model(inputs, shared(inputs), name=name)

    left, right = tower("left"), tower("right")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, left(inputs) + right(inputs))
    summary = keras_fvae.enable_fvae_lora(model, **SMALL)
    assert len(summary.layer_paths) == 1
    x = rng.normal(size=(2, 4))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)


def test_one_objective_and_one_seed_for_each_layer(bert):
    bert.backbone.enable_fvae_lora(elbo_weight=0.4, seed=10, **SMALL)
    configs = [layer.config for layer in adapted_layers(bert)]
    assert [c.elbo_weight for c in configs] == [0.4] * 4
    weights = [la.adapter.fvae.loss_weight for la in adapted_layers(bert)]
    np.testing.assert_allclose([float(w) for w in weights], [0.1] * 4)
    assert [c.seed for c in configs] == [10, 11, 12, 13]
    kernels = [to_numpy(lyr.adapter.kernel_b) for lyr in adapted_layers(bert)]
    assert not np.allclose(kernels[0], kernels[1])


def test_config_and_options_reach_the_layers(bert):
    config = keras_fvae.FVAELoRAConfig(rank=3, alpha=6)
    bert.backbone.enable_fvae_lora(config=config, dropout=0.5)
    for layer in adapted_layers(bert):
        assert (layer.config.rank, layer.config.scale) == (3, 2.0)
        assert layer.config.dropout == 0.5


def test_summary_counts_parameters():
    # The figures of the paper: 24 layers of ViT-B/16 at rank 16.
    inputs = keras.Input((768,))
    model = keras.Model(inputs, keras.layers.Dense(768, name="query")(inputs))
    config = keras_fvae.FVAELoRAConfig.from_paper(rank=16)
    summary = keras_fvae.enable_adapter(model, config)
    assert 24 * summary.inference_parameters == 596_736
    encoder = 768 * 16 + 16 + 2 * (16 * 16 + 16)
    decoder = 32 * 128 + 128 + 2 * (128 * 128 + 128) + 128 * 768 + 2 * 768
    adapter = 16 * 768 + 2 * encoder + decoder
    assert summary.trainable_parameters == adapter
    assert summary.base_parameters == 768 * 768 + 768
    assert summary.total_parameters == summary.base_parameters + adapter
    text = str(summary)
    assert "FVAE-LoRA of rank 16 on 1 layers, as made" in text
    assert "  query\n" in text
    assert "24,864  (4.21 % of the base model)" in text


@pytest.mark.one_backend
def test_what_two_models_hold_stays_frozen():
    def make():
        inputs = keras.Input((4,))
        query = keras.layers.Dense(3, name="query")
        norm = keras.layers.BatchNormalization()
        model = keras.Model(inputs, norm(query(inputs)))
        # As KerasHub's detectors hold their image encoders.
        model.encoder = keras.Sequential([query, norm])
        return model, norm

    model, norm = make()
    keras_fvae.enable_fvae_lora(model, rank=2)
    state = keras_fvae.get_adapter(model)
    pairs = [(model, norm), make()]
    keras_fvae.set_adapter(pairs[1][0], state)
    for model, norm in pairs:
        assert not norm.trainable
        before = norm.get_weights()
        model.compile("sgd", "mse")
        model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
        for weight, value in zip(norm.get_weights(), before):
            np.testing.assert_array_equal(weight, value)
        keras_fvae.remove_adapter(model)
        assert norm.trainable and len(norm.trainable_weights) == 2


def unbuilt():
    return keras.Sequential([keras.layers.Dense(3, name="query")])


def with_dense(**options):
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, **options)]
    )


def with_lora():
    model = with_dense(name="query")
    model.layers[0].enable_lora(2)
    return model


def adapted():
    model = with_dense(name="query")
    keras_fvae.enable_fvae_lora(model, **SMALL)
    return model


def quantized():
    model = with_dense(name="query")
    model.quantize("float8")
    return model


def with_equation():
    inputs = keras.Input((3, 4), batch_size=2)
    layer = keras.layers.EinsumDense("ebd,edf->ebf", (None, 3), name="query")
    return keras.Model(inputs, layer(inputs))


class Custom(keras.layers.Dense):
    """Not exactly a Dense: it computes something else."""

    def call(self, inputs, training=None):
        return super().call(2 * inputs, training)


def with_custom():
    return keras.Sequential([keras.Input((4,)), Custom(3, name="query")])


def unbuilt_subclass():
    return WithAttribute()


class WithAttribute(keras.Model):
    """Its layer has no name but that of the attribute."""

    def __init__(self):
        super().__init__()
        self.to_q = keras.layers.Dense(3)

    def call(self, x):
        return self.to_q(x)


def with_attribute():
    model = WithAttribute()
    model(np.ones((1, 4)))
    return model


def without_names():
    return with_dense(name="projection")


def with_constraint():
    return with_dense(name="query", kernel_constraint="non_neg")


def with_query():
    return with_dense(name="query")


REFUSED_MODELS = [
    (without_names, r"no query or value.*\['projection'\]"),
    (with_custom, r"no `Dense`.* derive from those.*'query' \(`Custom`\)"),
    (unbuilt, "is not built, so its layers have no weights"),
    (unbuilt_subclass, "is not built, so its layers have no weights"),
    (with_attribute, r"can name are: \['to_q'\]"),
    (with_lora, "LoRA is enabled on the layer '.*query'"),
    (adapted, "adapted by FVAE-LoRA already: 1 layers"),
    (quantized, "quantized in the mode 'float8'"),
    (with_constraint, "has a kernel constraint"),
    (with_equation, "No adapter fits the einsum equation 'ebd,edf->ebf'"),
]
TARGETS, TRAINABLE = "target_layer_names", "trainable_layer_names"
REFUSED_OPTIONS = [
    ({"rank": 0}, "`rank` must be an integer >= 1"),
    ({"rank": -4}, "`rank` must be an integer >= 1"),
    ({"rank": 1.5}, "`rank` must be an integer >= 1"),
    ({TARGETS: ["value"]}, r"'value' matches no layer.*\['query'\]"),
    ({TARGETS: ["query", "q"]}, "'q' matches no layer"),
    ({TARGETS: re.compile("^q$")}, "matches no layer"),
    ({TARGETS: lambda layer: False}, "matches no layer"),
    ({TARGETS: []}, "nothing to adapt"),
    ({TRAINABLE: ["norm"]}, "'norm' matches no layer"),
    ({"kl_weight": 0.1}, "smaller than `kl_weight`"),
]


@pytest.mark.parametrize(
    "make, options, message",
    [(make, {}, message) for make, message in REFUSED_MODELS]
    + [(with_query, options, message) for options, message in REFUSED_OPTIONS],
)
def test_refusals_change_nothing(make, options, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        keras_fvae.enable_fvae_lora(model, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"target_layer_names": 3},
            "`target_layer_names` must be a layer name",
        ),
        ({"target_layer_names": [3]}, "`target_layer_names` takes layer names"),
        ({"ranks": 4}, "no option `ranks`"),
        ({"config": "small"}, "must be a `keras_fvae.FVAELoRAConfig`"),
    ],
)
def test_arguments_of_other_types(arguments, message):
    model = with_dense(name="query")
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        keras_fvae.enable_fvae_lora(model, **arguments)
    assert snapshot(model) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_model_that_runs_is_not_changed(name, in_thread, rng, tmp_path):
    path = tmp_path / "task.safetensors"
    source = with_query()
    keras_fvae.enable_fvae_lora(source, encoder_units=(), **SMALL)
    keras_fvae.save_adapter(source, path)
    x, y = rng.normal(size=(8, 4)), np.zeros((8, 3))
    for is_adapted, act in (
        (False, lambda model: keras_fvae.enable_fvae_lora(model, **SMALL)),
        (False, lambda m: keras_fvae.load_adapter(m, path)),
        (True, keras_fvae.finalize_adapter),
        (True, keras_fvae.merge_adapter),
    ):
        model = with_query()
        if is_adapted:
            keras_fvae.enable_fvae_lora(model, encoder_units=(), **SMALL)
        model.compile("sgd", "mse")
        errors = []

        def try_to(logs=None, model=model, act=act, errors=errors):
            try:
                act(model)
            except ValueError as error:
                errors.append(str(error))

        def act_at_the_end(logs=None, try_to=try_to):
            if in_thread:
                thread = threading.Thread(target=try_to)
                thread.start()
                thread.join()
            else:
                try_to()

        callback = keras.callbacks.Callback()
        callback.on_test_end = callback.on_predict_end = act_at_the_end
        callback.on_epoch_end = lambda epoch, logs=None: act_at_the_end()
        arguments = (x,) if name == "predict" else (x, y)
        getattr(model, name)(*arguments, verbose=0, callbacks=[callback])
        [message] = errors
        assert f"is in the middle of `{name}`" in message
        assert np.isfinite(model.predict(x, verbose=0)).all()
        # And once it has ended, it can be done.
        act(model)


def test_a_model_of_another_type():
    with pytest.raises(TypeError, match="must be a Keras model or layer"):
        keras_fvae.enable_fvae_lora("model")


def test_a_refusal_after_some_layers_would_do_changes_nothing():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="query")(inputs)
    x = keras.layers.Dense(4, name="value", kernel_constraint="non_neg")(x)
    model = keras.Model(inputs, x)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="layer 'value' has a kernel constraint"
    ):
        keras_fvae.enable_fvae_lora(model)
    assert snapshot(model) == before


def test_a_quantized_layer_elsewhere_does_not_matter():
    inputs = keras.Input((4,))
    other = keras.layers.Dense(4, name="other", dtype="int8_from_float32")
    x = keras.layers.Dense(4, name="query")(other(inputs))
    model = keras.Model(inputs, x)
    assert len(keras_fvae.enable_fvae_lora(model, **SMALL).layer_paths) == 1
