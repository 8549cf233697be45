"""How layers come to be called: again and again, in others, recomputed."""

import contextlib

import keras
import numpy as np
import pytest
from fits import LABELS
from fits import SMALL
from fits import TOKENS
from fits import adapt_quietly
from fits import assert_same_moves
from fits import cross_entropy
from fits import make_attention_model
from fits import make_nested
from fits import train
from helpers import BACKEND
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy

import keras_fvae
from keras_fvae.lookup import adapted_layers

FEATURES = np.random.default_rng(0).normal(size=(16, 4, 5)).astype("float32")
MODES = [
    {"mode": "full"},
    {"mode": "activations"},
    {"mode": "larger_than", "output_size_threshold": 1},
    {
        "mode": "list_of_layers",
        "layer_names": ["attention", "query", "value", "adapter", "fvae"],
    },
]


class Caller(keras.Model):
    """Calls a layer several times; says nothing of `training`."""

    def __init__(self, layer, num_calls=1):
        super().__init__()
        self.layer = layer
        self.num_calls = num_calls
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x):
        for _ in range(self.num_calls):
            x = self.layer(x)
        return self.head(x[:, -1])


class TrainingCaller(Caller):
    """The same, with an argument that it does not pass on."""

    def call(self, x, training=None):
        return super().call(x)


class Cell(keras.Layer):
    state_size = output_size = 5

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = keras.layers.Dense(5, name="query")

    def build(self, input_shape):
        self.query.build(input_shape)

    def call(self, x, states, training=None):
        x = self.query(x)
        return x, [x]


def make_query():
    return keras.layers.Dense(5, name="query")


def make_functional(layer, num_calls=1):
    inputs = x = keras.Input((4, 5))
    for _ in range(num_calls):
        x = layer(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x[:, -1]))


def make_caller(caller_class, *args):
    model = caller_class(*args)
    model(FEATURES)
    return model


CALLED_AGAIN = {
    "once": lambda: make_functional(make_query()),
    "functional": lambda: make_functional(make_query(), 3),
    "model": lambda: make_functional(
        keras.Sequential([keras.Input((4, 5)), make_query()]), 3
    ),
    "subclassed": lambda: make_caller(Caller, make_query(), 3),
    "subclassed_training": lambda: make_caller(TrainingCaller, make_query(), 3),
    "time_distributed": lambda: make_functional(
        keras.layers.TimeDistributed(make_query())
    ),
    "time_distributed_model": lambda: make_functional(
        keras.layers.TimeDistributed(
            keras.Sequential([keras.Input((5,)), make_query()])
        )
    ),
    "rnn": lambda: make_functional(
        keras.layers.RNN(Cell(), return_sequences=True, unroll=True)
    ),
}


@pytest.mark.parametrize("name", CALLED_AGAIN)
def test_a_layer_counts_once_however_often_it_is_called(name):
    keras.utils.set_random_seed(0)
    model = CALLED_AGAIN[name]()
    adapt_quietly(model, trainable_layer_names=["head"])
    (layer,) = adapted_layers(model)
    # What the layer is called on: all time steps again and again, or one
    # after the other.
    if name in ("functional", "model", "subclassed", "subclassed_training"):
        inputs = [FEATURES, layer(FEATURES), layer(layer(FEATURES))]
    elif name == "once":
        inputs = [FEATURES]
    else:
        inputs = [FEATURES[:, step] for step in range(4)]
    elbos = [to_numpy(layer.adapter.fvae(x).loss) for x in inputs]
    task = np.mean(to_numpy(cross_entropy(LABELS, model(FEATURES))))
    (loss,), _ = train(model, data=(FEATURES, LABELS), fit={"batch_size": 16})
    assert loss == pytest.approx(task + 0.5 * np.mean(elbos), rel=1e-3)


def test_a_layer_in_a_loop_is_refused():
    inputs = keras.Input((4, 5))
    rnn = keras.layers.RNN(Cell(), name="recurrent")
    model = keras.Model(inputs, rnn(inputs))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'recurrent', out of .*`unroll=True`"):
        keras_fvae.enable_fvae_lora(model, **SMALL)
    assert snapshot(model) == before


@pytest.mark.parametrize("caller_class", [Caller, TrainingCaller])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_model_that_says_nothing_of_training(caller_class, run_eagerly):
    model = make_caller(caller_class, make_query())
    adapt_quietly(model)
    (loss,), _ = train(model, data=(FEATURES, LABELS), run_eagerly=run_eagerly)
    evaluated = model.evaluate(FEATURES, LABELS, verbose=0)
    assert loss > evaluated + 1.0


@pytest.mark.parametrize("name", ["nested", "attention", "sequential", "bert"])
def test_clones_train_as_the_model_does(name, make_bert):
    data = (FEATURES[:, 0], LABELS)
    if name == "nested":
        model = make_nested()
    elif name == "attention":
        model, data = make_attention_model(), (TOKENS, LABELS)
    elif name == "sequential":
        model = keras.Sequential([keras.Input((5,)), make_query()])
    else:
        inputs = dict.fromkeys(("token_ids", "segment_ids"), TOKENS)
        inputs["segment_ids"] = np.zeros_like(TOKENS)
        inputs["padding_mask"] = np.ones_like(TOKENS)
        model, data = make_bert(), (inputs, LABELS)
    adapt_quietly(model)
    clones = [keras.models.clone_model(model)]
    if name == "bert":
        clones.append(type(model).from_config(model.get_config()))
    for clone in clones:
        clone.set_weights(model.get_weights())
    expected_losses, expected_moves = train(model, data=data)
    for clone in clones:
        losses, moves = train(clone, data=data)
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        # The seeds differ, and a little variance is left.
        assert_same_moves(moves, expected_moves, tolerance=0.02)


@pytest.mark.parametrize(
    "scope, where",
    [*((scope, "build") for scope in MODES), (MODES[0], "enable")],
    ids=str,
)
def test_rematerialization_changes_nothing(scope, where):
    # In a graph of TensorFlow, Keras's own layers fail: keras#21207.
    run_eagerly = BACKEND == "tensorflow"

    def run(scopes):
        with scopes.get("build", contextlib.nullcontext()):
            model = make_attention_model()
        with scopes.get("enable", contextlib.nullcontext()):
            keras_fvae.enable_fvae_lora(model, elbo_weight=0.5, **SMALL)
        move_adapters(model, np.random.default_rng(0))
        return train(model, run_eagerly=run_eagerly)

    expected_losses, expected_moves = run({})
    losses, moves = run({where: keras.RematScope(**scope)})
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert_same_moves(moves, expected_moves)


@pytest.mark.skipif(
    BACKEND == "jax", reason="In a scope, KerasHub's models cannot be called."
)
def test_rematerialization_around_the_backbone(make_bert):
    inputs = {
        "token_ids": TOKENS,
        "segment_ids": np.zeros_like(TOKENS),
        "padding_mask": np.ones_like(TOKENS),
    }

    def run(scope):
        keras.utils.set_random_seed(0)
        with scope:
            bert = make_bert()
        bert.backbone.enable_fvae_lora(elbo_weight=0.5, **SMALL)
        move_adapters(bert, np.random.default_rng(0))
        return train(bert, data=(inputs, LABELS))

    expected_losses, expected_moves = run(contextlib.nullcontext())
    names = ["bert_backbone", "bert_text_classifier", "query", "value"]
    scope = keras.RematScope(mode="full")
    if BACKEND == "tensorflow":
        scope = keras.RematScope(mode="list_of_layers", layer_names=names)
    losses, moves = run(scope)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert_same_moves(moves, expected_moves)
