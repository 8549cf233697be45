"""Adapters switched off for a while: in which thread, model and step."""

import gc
import threading
import time

import keras
import numpy as np
import pytest
import small_models
from helpers import BACKEND
from helpers import CallCounter
from helpers import move_adapters
from helpers import to_numpy

import keras_fvae

SMALL = {"rank": 2, "decoder_units": (4,)}
X, Y = small_models.data("sequential")


@pytest.fixture
def model(rng):
    """An adapted model, compiled, whose adapters matter."""
    model = small_models.make_sequential()
    keras_fvae.enable_fvae_lora(model, trainable_layer_names=["head"], **SMALL)
    move_adapters(model, rng, scale=1.0)
    small_models.compile_model(model, "sequential")
    return model


def predict(model):
    return model.predict(X, verbose=0)


def moves(model, fit=None):
    """How far the adapter and the head go in a fit."""
    layers = model.get_layer("query").adapter, model.get_layer("head")
    before = [[to_numpy(w) for w in layer.weights] for layer in layers]
    (fit or small_models.fit)(model, "sequential")
    return [
        max(np.abs(to_numpy(w) - b).max() for w, b in zip(la.weights, values))
        for la, values in zip(layers, before)
    ]


def train_on_batches(model, name):
    for _ in range(2):
        model.train_on_batch(X, Y)


@pytest.mark.parametrize("fit", [small_models.fit, train_on_batches])
def test_what_trains_inside_leaves_the_adapters_as_they_are(fit, model):
    model.compile(
        # Whose momentum and decay move what has no gradient.
        keras.optimizers.AdamW(0.03, weight_decay=0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for _ in range(2):
        with keras_fvae.adapter_disabled(model):
            adapter, head = moves(model, fit)
        assert adapter == 0 and head > 0
        adapter, head = moves(model, fit)
        assert adapter > 0 and head > 0


def test_a_loss_inside_has_no_elbo(model):
    with keras_fvae.adapter_disabled(model):
        loss = model.evaluate(X, Y, verbose=0)
        model.optimizer.learning_rate = 0.0
        history = model.fit(X, Y, verbose=0).history
    assert history["loss"][0] == pytest.approx(loss, rel=1e-4)


def test_nothing_is_compiled_anew(model):
    counter = CallCounter()
    counted = keras.Sequential([keras.Input((8,)), counter, *model.layers])
    small_models.compile_model(counted, "sequential")

    def use():
        predict(counted)
        counted.evaluate(X, Y, verbose=0)
        small_models.fit(counted, "sequential")

    def use_both():
        use()
        with keras_fvae.adapter_disabled(counted):
            use()

    use_both()
    if BACKEND == "torch":
        # It runs Python each time: what is kept are the functions.
        return
    expected = counter.num_calls
    use_both()
    assert counter.num_calls == expected


def test_blocks_nest_and_overlap(model):
    on = predict(model)
    with keras_fvae.adapter_disabled(model):
        off = predict(model)
        with keras_fvae.adapter_disabled(model):
            np.testing.assert_array_equal(predict(model), off)
        np.testing.assert_array_equal(predict(model), off)
    assert np.abs(on - off).max() > 0.1
    first, second = (keras_fvae.adapter_disabled(model) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    np.testing.assert_array_equal(predict(model), off)
    second.__exit__(None, None, None)
    np.testing.assert_array_equal(predict(model), on)


def test_one_of_two_models(model, rng):
    other = small_models.make_sequential()
    keras_fvae.enable_fvae_lora(other, **SMALL)
    move_adapters(other, rng, scale=1.0)
    on, other_on = predict(model), predict(other)
    with keras_fvae.adapter_disabled(other):
        np.testing.assert_array_equal(predict(model), on)
        with keras_fvae.adapter_disabled(model):
            assert not np.array_equal(predict(model), on)
        assert not np.array_equal(predict(other), other_on)
    np.testing.assert_array_equal(predict(other), other_on)


def test_a_block_holds_for_its_thread(model):
    """While others are in the middle of theirs, and after."""

    def call():
        # On JAX, Keras does not predict in two threads at once.
        return to_numpy(model(X))

    on, inside, outside = call(), {}, {}
    ready = threading.Barrier(3, timeout=60)

    def disabled(name, leave_first):
        with keras_fvae.adapter_disabled(model):
            ready.wait()
            if not leave_first:
                ready.wait()
            inside[name] = call()
        if leave_first:
            ready.wait()
        outside[name] = call()

    threads = [
        threading.Thread(target=disabled, args=("first", True)),
        threading.Thread(target=disabled, args=("second", False)),
    ]
    for thread in threads:
        thread.start()
    ready.wait()
    np.testing.assert_array_equal(call(), on)
    ready.wait()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(inside["first"], inside["second"])
    assert np.abs(inside["first"] - on).max() > 0.1
    for predictions in (call(), *outside.values()):
        np.testing.assert_array_equal(predictions, on)


class Around(keras.Model):
    """A model around another, which says nothing of `training`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return 2 * self.inner(x)


def make_functional(model):
    inputs = keras.Input((8,))
    return keras.Model(inputs, 2 * model(inputs))


def make_part(model):
    """Of the model's own layers, the first alone."""
    return keras.Model(model.inputs, model.layers[0].output)


@pytest.mark.parametrize("make", [Around, make_functional, make_part])
@pytest.mark.parametrize("is_used_before", [True, False])
def test_models_that_were_made_around_adapted_layers(
    make, is_used_before, model
):
    outer = make(model)
    on = to_numpy(outer(X))
    if is_used_before:
        np.testing.assert_allclose(predict(outer), on, atol=1e-6)
    with keras_fvae.adapter_disabled(model):
        off = to_numpy(outer(X))
        np.testing.assert_allclose(predict(outer), off, atol=1e-6)
    assert np.abs(on - off).max() > 0.1
    np.testing.assert_allclose(predict(outer), on, atol=1e-6)
    with keras_fvae.adapter_disabled(model):
        np.testing.assert_allclose(predict(outer), off, atol=1e-6)


def test_models_that_the_garbage_collector_does_not_list(model):
    outer = make_functional(model)
    on = predict(outer)
    gc.freeze()
    try:
        with keras_fvae.adapter_disabled(model):
            assert np.abs(predict(outer) - on).max() > 0.1
        np.testing.assert_array_equal(predict(outer), on)
    finally:
        gc.unfreeze()


def test_a_block_costs_little():
    inputs = keras.Input((4,))
    x = inputs
    for index in range(24):
        x = keras.layers.Dense(4, name=f"query_{index}")(x)
    model = keras.Model(inputs, x)
    keras_fvae.enable_fvae_lora(model, 2, lambda layer: True)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        with keras_fvae.adapter_disabled(model):
            pass
        seconds.append(time.perf_counter() - begin)
    assert np.median(seconds) < 5e-3


def test_compiling_anew_forgets_what_was_compiled_inside(model):
    with keras_fvae.adapter_disabled(model):
        model.evaluate(X, Y, verbose=0)
    model.compile("sgd", "mse")
    targets = np.zeros((len(X), 3))
    with keras_fvae.adapter_disabled(model):
        loss = model.evaluate(X, targets, verbose=0)
        assert loss == pytest.approx(np.square(predict(model)).mean(), rel=1e-4)
