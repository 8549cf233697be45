"""How layers come to be called: again and again, in others, recomputed."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy
from keras import ops
from short_training import LABELS
from short_training import SMALL
from short_training import TOKENS
from short_training import adapt_without_dropout
from short_training import assert_same_moves
from short_training import cross_entropy
from short_training import make_attention_model
from short_training import make_nested
from short_training import train

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

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


@pytest.mark.shared_out
@pytest.mark.parametrize("name", CALLED_AGAIN)
def test_a_layer_counts_once_however_often_it_is_called(name):
    keras.utils.set_random_seed(0)
    model = CALLED_AGAIN[name]()
    adapt_without_dropout(model, trainable_layer_names=["head"])
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


def test_a_method_without_loss_or_noise_trains_in_a_loop():
    losses = []
    for unroll in (False, True):
        keras.utils.set_random_seed(0)
        rnn = keras.layers.RNN(Cell(), return_sequences=True, unroll=unroll)
        model = make_functional(rnn)
        config = keras_fvae.LoRAConfig(rank=2, seed=0)
        keras_fvae.enable_adapter(model, config, "query")
        model.compile(keras.optimizers.Adam(0.1), "mse")
        history = model.fit(FEATURES, FEATURES[:, -1, :3], epochs=3, verbose=0)
        losses.append(history.history["loss"])
    looped, unrolled = losses
    assert looped[-1] < 0.99 * looped[0]
    assert looped == pytest.approx(unrolled, rel=1e-4)


@pytest.mark.shared_out
@pytest.mark.parametrize("caller_class", [Caller, TrainingCaller])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_model_that_says_nothing_of_training(caller_class, run_eagerly):
    model = make_caller(caller_class, make_query())
    adapt_without_dropout(model)
    (loss,), _ = train(model, data=(FEATURES, LABELS), run_eagerly=run_eagerly)
    evaluated = model.evaluate(FEATURES, LABELS, verbose=0)
    assert loss > evaluated + 1.0


@pytest.mark.shared_out
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
    adapt_without_dropout(model)
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


@pytest.mark.shared_out
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


def make_dense(dtype, sparse=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,), dtype=dtype, sparse=sparse)
    return keras.Model(inputs, make_query()(inputs))


@pytest.mark.shared_out
@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool", "float16"])
def test_inputs_of_other_dtypes(dtype, rng):
    """The update is what it is on the same numbers as floats."""
    x = rng.integers(0, 2 if dtype == "bool" else 4, (6, 8))
    models = make_dense("float32"), make_dense(dtype)
    for model in models:
        adapt_without_dropout(model, seed=0)
    expected, other = (
        (to_numpy(model(array, training=False)), model(array, training=True))
        for model, array in zip(models, (x.astype("float32"), x.astype(dtype)))
    )
    np.testing.assert_allclose(other[0], expected[0], atol=2e-3)
    losses = [to_numpy(model.losses[0]) for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] > 0.1
    layer = models[1].layers[-1]
    out = layer.adapter.fvae(x.astype(dtype))
    assert to_numpy(out.loss) == pytest.approx(losses[0] / 0.5, rel=1e-3)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse ones there")
def test_sparse_inputs(rng):
    x = rng.integers(0, 2, (6, 8)).astype("float32")
    model = make_dense("float32", sparse=True)
    adapt_without_dropout(model)
    if BACKEND == "jax":
        from jax.experimental import sparse

        sparse_x = sparse.BCOO.fromdense(x)
    else:
        import tensorflow as tf

        sparse_x = tf.sparse.from_dense(x)
    expected = to_numpy(model(x))
    np.testing.assert_allclose(to_numpy(model(sparse_x)), expected, atol=1e-5)
    model(x, training=True)
    [expected_loss] = [to_numpy(loss) for loss in model.losses]
    model(sparse_x, training=True)
    [loss] = [to_numpy(loss) for loss in model.losses]
    assert loss == pytest.approx(expected_loss, rel=1e-4)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_to_call_on(shape):
    inputs = keras.Input((*[None] * (len(shape) - 2), 8))
    model = keras.Model(inputs, make_query()(inputs))
    adapt_without_dropout(model)
    x = np.zeros(shape, "float32")
    for training in (False, True):
        outputs = model(x, training=training)
        assert tuple(outputs.shape) == (*shape[:-1], 5)
    assert [float(to_numpy(loss)) for loss in model.losses] in ([], [0.0])
    assert np.isfinite(to_numpy(model.layers[-1].adapter.fvae(x).loss))


def freeze_layer(layer):
    layer.trainable = False


def freeze_adapter(layer):
    layer.adapter.trainable = False


def freeze_fvae(layer):
    for weight in layer.adapter.fvae.weights:
        weight.trainable = False


@pytest.mark.shared_out
@pytest.mark.parametrize("freeze", [freeze_layer, freeze_adapter, freeze_fvae])
def test_what_is_frozen_draws_nothing_and_adds_no_loss(freeze):
    model = make_functional(make_query())
    keras_fvae.enable_fvae_lora(
        model, trainable_layer_names=["head"], elbo_weight=10.0, **SMALL
    )
    move_adapters(model, np.random.default_rng(0))
    (layer,) = adapted_layers(model)
    freeze(layer)
    model.compile(keras.optimizers.SGD(1e-12), cross_entropy)
    task = model.evaluate(FEATURES, LABELS, verbose=0)
    (loss,) = model.fit(FEATURES, LABELS, verbose=0).history["loss"]
    assert loss == pytest.approx(task, rel=1e-4)


class Untold(keras.Model):
    """A model around an adapted one, whose `call` takes no `training`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.inner(x))


class UntoldInItsLoss(Untold):
    """It calls itself once more in its loss, as the base model."""

    def compute_loss(self, x=None, *args, **kwargs):
        self.inner(x, training=False)
        with keras_fvae.adapter_disabled(self.inner):
            self.inner(x)
        return super().compute_loss(x, *args, **kwargs)


@pytest.mark.parametrize("is_built", [True, False])
def test_a_model_without_an_argument_for_training(is_built):
    inputs = keras.Input((4, 5))
    inner = keras.Model(inputs, make_query()(inputs)[:, -1])
    adapt_without_dropout(inner)
    (layer,) = adapted_layers(inner)
    model = Untold(inner)
    if is_built:
        model(FEATURES)
    elbo = 0.5 * to_numpy(layer.adapter.fvae(FEATURES).loss)
    # Nor has it a loss where nothing trains.
    model(FEATURES)
    assert model.losses == []
    model.compile(keras.optimizers.SGD(1e-12), cross_entropy)
    history = model.fit(
        FEATURES,
        LABELS,
        batch_size=16,
        verbose=0,
        validation_data=(FEATURES, LABELS),
        callbacks=[keras_fvae.FVAELoRAMonitor()],
    ).history
    assert history["loss"][0] == pytest.approx(
        history["val_loss"][0] + elbo, rel=1e-3
    )
    assert "kl_z1" in history


def test_in_a_loss_a_model_evaluates_if_it_is_told_so():
    inputs = keras.Input((4, 5))
    inner = keras.Model(inputs, make_query()(inputs)[:, -1])
    adapt_without_dropout(inner)
    (layer,) = adapted_layers(inner)
    model = UntoldInItsLoss(inner)
    elbo = 0.5 * to_numpy(layer.adapter.fvae(FEATURES).loss)
    model.compile(keras.optimizers.SGD(1e-12), cross_entropy)
    task = model.evaluate(FEATURES, LABELS, verbose=0)
    fit = {"batch_size": 16, "verbose": 0}
    (loss,) = model.fit(FEATURES, LABELS, **fit).history["loss"]
    # Of the one call in training alone.
    assert loss == pytest.approx(task + elbo, rel=1e-3)


TRANSFORMED = {
    "cond": lambda layer, x: ops.cond(
        ops.mean(x) > -1e9, lambda: layer(x), lambda: x
    ),
    "map": lambda layer, x: ops.map(lambda row: layer(row), x),
    "loop": lambda layer, x: ops.fori_loop(0, 2, lambda _, t: layer(t), x),
    "vectorized_map": lambda layer, x: ops.vectorized_map(
        lambda row: layer(row), x
    ),
    "while_loop": lambda layer, x: ops.while_loop(
        lambda i, _: i < 2, lambda i, t: (i + 1, layer(t)), (0, x)
    )[1],
}
if BACKEND == "jax":
    import jax

    TRANSFORMED["jit"] = lambda layer, x: jax.jit(lambda t: layer(t))(x)
    TRANSFORMED["checkpoint"] = lambda layer, x: jax.checkpoint(
        lambda t: layer(t)
    )(x)
    TRANSFORMED["vmap"] = lambda layer, x: jax.vmap(lambda t: layer(t))(x)
if BACKEND == "tensorflow":
    import tensorflow as tf

    TRANSFORMED["function"] = lambda layer, x: tf.function(lambda t: layer(t))(
        x
    )


class Transforms(keras.layers.Layer):
    """Calls a layer inside a function that the backend may transform."""

    def __init__(self, name):
        super().__init__()
        self.way = TRANSFORMED[name]
        self.query = make_query()

    def build(self, input_shape):
        self.query.build(input_shape)

    def call(self, x):
        return self.way(self.query, x)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_layer_in_a_transformed_function_trains_or_is_refused(name):
    inputs = keras.Input((4, 5))
    x = Transforms(name)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x[:, -1]))
    adapt_without_dropout(model, trainable_layer_names=["head"])
    predictions = model.predict(FEATURES, verbose=0)
    assert predictions.shape == (16, 3)
    model.compile(keras.optimizers.SGD(1e-12), cross_entropy)
    task = model.evaluate(FEATURES, LABELS, verbose=0)
    try:
        fit = {"batch_size": 16, "verbose": 0}
        (loss,) = model.fit(FEATURES, LABELS, **fit).history["loss"]
    except ValueError as error:
        assert "query' is called inside a function that" in str(error)
        assert "leave it out of `target_layer_names`" in str(error)
        np.testing.assert_allclose(
            model.predict(FEATURES, verbose=0), predictions, atol=1e-6
        )
    else:
        # PyTorch runs Python, where others transform.
        assert BACKEND == "torch"
        (layer,) = adapted_layers(model)
        calls = [FEATURES]
        if "loop" in name:
            calls.append(to_numpy(layer(FEATURES)))
        elbos = [to_numpy(layer.adapter.fvae(x).loss) for x in calls]
        assert loss == pytest.approx(task + 0.5 * np.mean(elbos), rel=1e-3)
