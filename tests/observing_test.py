"""What holds for all callbacks that see the gradients of a method."""

import warnings

import keras
import numpy as np
import pytest
from family import X
from family import Y
from family import is_target
from family import make_model
from family import predict
from helpers import to_numpy

import keras_fvae
from keras_fvae.callbacks import observing
from keras_fvae.model import lookup

METHODS = {
    "AdaLoRA": (
        lambda: keras_fvae.AdaLoRAConfig(4, target_rank=2, seed=0),
        keras_fvae.AdaLoRAAllocator,
    ),
    "BeamLoRA": (
        lambda: keras_fvae.BeamLoRAConfig(4, seed=0),
        lambda: keras_fvae.BeamLoRAPruner(3, 0.6, last_step=100),
    ),
    "SRLoRA": (
        lambda: keras_fvae.SRLoRAConfig(2, num_fused=4),
        lambda: keras_fvae.SRLoRARestarter(3),
    ),
}
WITH_FLAT_LORA = {
    **METHODS,
    "Flat-LoRA": (
        lambda: keras_fvae.FlatLoRAConfig(2, rho=0.2, seed=0),
        keras_fvae.FlatLoRASchedule,
    ),
}


def adapted(name, targets=is_target):
    model = make_model()
    config = WITH_FLAT_LORA[name][0]()
    if isinstance(targets, dict):
        targets = {key: value or config for key, value in targets.items()}
    keras_fvae.enable_adapter(
        model, config, targets, trainable_layer_names=["head"]
    )
    return model


def compile_model(model, optimizer=None):
    model.compile(
        optimizer or keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


def fit(model, callbacks, **kwargs):
    settings = {"batch_size": 2, "epochs": 4, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, callbacks=callbacks, **{**settings, **kwargs})


def adapters_of(model):
    return [layer.adapter for layer in lookup.adapted_layers(model)]


class FusedAfter(keras.callbacks.Callback):
    """After how many updates a pair was fused, each time."""

    def __init__(self):
        super().__init__()
        self.updates, self.num_fused = [], 0

    def on_train_batch_end(self, batch, logs=None):
        adapter = adapters_of(self.model)[0]
        if adapter.num_fused > self.num_fused:
            self.num_fused = adapter.num_fused
            self.updates.append(int(to_numpy(self.model.optimizer.iterations)))


OPTIMIZERS = {
    # 4 steps an epoch are no multiple of 3, and fewer than 8.
    "3 accumulated": (
        lambda: keras.optimizers.Adam(0.02, gradient_accumulation_steps=3),
        12,
    ),
    "8 accumulated": (
        lambda: keras.optimizers.Adam(0.02, gradient_accumulation_steps=8),
        32,
    ),
    # Which overflows in the first steps, with the weights below.
    "scaled": (
        lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.02), initial_scale=2.0**127
        ),
        6,
    ),
}


@pytest.mark.shared_out
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_that_were_made(name):
    make_optimizer, epochs = OPTIMIZERS[name]
    model = adapted("SRLoRA", "up")
    compile_model(model, make_optimizer())
    fused_after = FusedAfter()
    callbacks = [METHODS["SRLoRA"][1](), fused_after]
    fit(model, callbacks, epochs=epochs, sample_weight=np.full(8, 100.0))
    num_updates = int(to_numpy(model.optimizer.iterations))
    assert num_updates < 4 * epochs
    assert fused_after.updates == [3, 6, 9, 12] and num_updates >= 15


@pytest.mark.one_backend
def test_ranks_do_not_start_from_copies_that_were_never_made():
    model = adapted("BeamLoRA")
    compile_model(model, OPTIMIZERS["scaled"][0]())
    pruner = keras_fvae.BeamLoRAPruner(3, 0.6, last_step=7)
    fit(model, [pruner], sample_weight=np.full(8, 100.0))
    for adapter in adapters_of(model):
        arrays = adapter.get_arrays()
        assert np.linalg.norm(arrays["kernel_a"], axis=0).all()


@pytest.mark.shared_out
@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_in_the_middle_of_training_has_all_of_it(name, tmp_path):
    """The loaded optimizer goes on, without the callback or with it."""
    model = adapted(name)
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 100)
    compile_model(
        model,
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(schedule)),
    )
    path = tmp_path / "model.keras"
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    fit(model, [METHODS[name][1](), checkpoint], epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping variable loading")
        loaded = keras.saving.load_model(path)
    pairs = zip(
        loaded.optimizer.variables, model.optimizer.variables, strict=True
    )
    for variable, expected in pairs:
        np.testing.assert_array_equal(to_numpy(variable), to_numpy(expected))
    assert int(to_numpy(loaded.optimizer.iterations)) == 8
    # Its own again, as any optimizer's.
    loaded.save(path)
    assert "save_own_variables" not in vars(model.optimizer)
    fit(loaded, [METHODS[name][1]()])


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["BeamLoRA", "SRLoRA"])
def test_averages_of_weights_begin_anew_with_them(name):
    """With steps of nearly 0 the weights and their averages are the same."""

    def trained(**kwargs):
        model = adapted(name)
        compile_model(model, keras.optimizers.Adam(1e-12, **kwargs))
        history = fit(model, [METHODS[name][1]()]).history
        assert max(history.get("pruned_ranks", history.get("fused_ranks"))) > 0
        return model

    plain, averaged = trained(), trained(use_ema=True, ema_momentum=0.9)
    np.testing.assert_allclose(predict(averaged), predict(plain), atol=1e-5)
    for adapter, expected in zip(adapters_of(averaged), adapters_of(plain)):
        for key, array in expected.get_arrays().items():
            np.testing.assert_allclose(
                adapter.get_arrays()[key], array, atol=1e-5
            )


@pytest.mark.shared_out
@pytest.mark.parametrize("initial_epoch", [0, 2])
@pytest.mark.parametrize("accumulated", [None, 3])
def test_a_fit_that_begins_later_reaches_its_target(initial_epoch, accumulated):
    model = adapted("AdaLoRA")
    optimizer = keras.optimizers.Adam(
        0.02, gradient_accumulation_steps=accumulated
    )
    compile_model(model, optimizer)
    callback = keras_fvae.AdaLoRAAllocator()
    history = fit(
        model, [callback], epochs=8, initial_epoch=initial_epoch
    ).history
    assert history["mean_rank"][-1] == 2 < history["mean_rank"][0]
    # Half of all updates, as it says, are made with the last choice.
    num_updates = (8 - initial_epoch) * 4 // (accumulated or 1)
    table = callback.observer.table
    assert table.last_choice == num_updates - num_updates // 2


def test_a_layer_can_lose_all_its_ranks(tmp_path):
    """And so differs from a new one, of which none is lost."""
    inputs = keras.Input((6,))
    query = keras.layers.Dense(3, name="query")(inputs)
    # It hardly matters.
    value = keras.layers.Dense(3, name="value")(inputs)
    model = keras.Model(inputs, query + 1e-4 * value)
    keras_fvae.enable_adapter(
        model, keras_fvae.AdaLoRAConfig(3, target_rank=1, seed=0)
    )
    adapters = {la.name: la.adapter for la in lookup.adapted_layers(model)}
    assert {a.num_ranks for a in adapters.values()} == {3}
    assert "as made" in str(keras_fvae.adapter_summary(model))
    rng = np.random.default_rng(0)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    allocator = keras_fvae.AdaLoRAAllocator()
    history = model.fit(
        rng.normal(size=(12, 6)),
        rng.normal(size=(12, 3)),
        batch_size=2,
        epochs=8,
        callbacks=[allocator],
        verbose=0,
    ).history
    assert allocator.history[-1] == {"query": 2, "value": 0}
    assert history["mean_rank"][-1] == 1
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        summary = keras_fvae.adapter_summary(each)
        assert {la.path: la.num_ranks for la in summary.layers} == {
            "query": 2,
            "value": 0,
        }
        assert "0 ranks left" in str(summary)
        assert "as made" not in str(summary)
    before = loaded.count_params()
    keras_fvae.finalize_adapter(loaded)
    assert loaded.count_params() < before


@pytest.mark.shared_out
@pytest.mark.parametrize("name", WITH_FLAT_LORA)
def test_evaluating_with_a_callback_is_no_training(name):
    model = adapted(name)
    make_callback = WITH_FLAT_LORA[name][1]
    model.predict(X, callbacks=[make_callback()], verbose=0)
    compile_model(model)
    model.optimizer.build(model.trainable_variables)
    variables = [v.path for v in model.optimizer.variables]
    model.evaluate(X, Y, callbacks=[make_callback()], verbose=0)
    assert [v.path for v in model.optimizer.variables] == variables
    assert {adapter.callback for adapter in adapters_of(model)} == {None}
    with pytest.warns(UserWarning, match="without which|noise"):
        fit(model, [])
    # In `fit`, it evaluates too.
    fit(model, [make_callback()], validation_data=(X, Y))
    assert {adapter.callback for adapter in adapters_of(model)} == {None}
    with pytest.warns(UserWarning, match="without which|noise"):
        fit(model, [])


@pytest.mark.shared_out
@pytest.mark.parametrize("name", WITH_FLAT_LORA)
def test_layers_may_have_different_methods(name):
    model = adapted(name, {"query": None, "up": keras_fvae.LoRAConfig(2)})
    compile_model(model)
    with pytest.warns(UserWarning, match="pass `keras_fvae"):
        fit(model, [])
    model = adapted(name, {"query": None, "up": keras_fvae.LoRAConfig(2)})
    compile_model(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*pass `keras_fvae")
        fit(model, [WITH_FLAT_LORA[name][1]()])
    assert not np.array_equal(predict(model), predict(adapted(name)))


@pytest.mark.one_backend
def test_layers_with_the_same_path_are_told_apart():
    """As in towers that were built by themselves."""

    def tower(name):
        inputs = keras.Input((6,))
        outputs = keras.layers.Dense(8, name="query")(inputs)
        return keras.Model(inputs, outputs, name=name)

    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(6, name="mix")(inputs)
    model = keras.Model(inputs, tower("a")(inputs) + tower("b")(hidden))
    keras_fvae.enable_adapter(model, keras_fvae.SRLoRAConfig(2), "query")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    callback = keras_fvae.SRLoRARestarter(interval=100, total_steps=1000)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 6)), rng.normal(size=(12, 8))

    def restart_the_second(batch, logs):
        if batch != 3:
            return
        layers = callback.layers
        assert layers[0].path == layers[1].path
        before = {
            id(v): to_numpy(v) for v in callback.model.optimizer.variables
        }
        callback.layers = layers[1:]
        importance = callback.observer.importance
        callback.observer.importance = importance[1:]
        callback._restart()
        callback.layers, callback.observer.importance = layers, importance
        changed.update(
            index
            for index, v in enumerate(callback.model.optimizer.variables)
            if not np.array_equal(before[id(v)], to_numpy(v))
        )

    changed = set()
    spy = keras.callbacks.LambdaCallback(on_train_batch_end=restart_the_second)
    model.fit(x, y, batch_size=2, callbacks=[callback, spy], verbose=0)
    # Adam has two moments of A and B of each tower, after the number of steps
    # and the learning rate, in pairs.
    weights = [id(v) for v in model.trainable_variables]
    second = [
        weights.index(id(getattr(callback.layers[1].adapter, name)))
        for name in ("kernel_a", "kernel_b")
    ]
    of_adam = {index for index in changed if index < 2 + 2 * len(weights)}
    assert of_adam == {
        2 + 2 * index + moment for index in second for moment in (0, 1)
    }


@pytest.mark.shared_out
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("other", ["SRLoRA", "BeamLoRA"])
def test_several_callbacks_see_the_same_gradients(is_first, other):
    model = adapted("AdaLoRA", {"query": None, "up": METHODS[other][0]()})
    compile_model(model)
    model.optimizer.build(model.trainable_variables)
    variables = [v.path for v in model.optimizer.variables]
    callbacks = [keras_fvae.AdaLoRAAllocator(), METHODS[other][1]()]
    history = fit(model, callbacks if is_first else callbacks[::-1]).history
    assert history["mean_rank"][-1] == 2
    assert max(history.get("fused_ranks", history.get("pruned_ranks"))) > 0
    assert [v.path for v in model.optimizer.variables] == variables
    assert "_backend_update_step" not in vars(model.optimizer)


@pytest.mark.one_backend
@pytest.mark.parametrize("is_first", [True, False])
def test_the_best_weights_are_restored_as_they_were(is_first, tmp_path):
    model = adapted("AdaLoRA")
    compile_model(model)
    path = tmp_path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, "loss", save_best_only=True, save_weights_only=True, mode="max"
    )
    early = keras.callbacks.EarlyStopping(
        "loss", patience=100, restore_best_weights=True, mode="max"
    )
    callbacks = [keras_fvae.AdaLoRAAllocator(), early]
    callbacks = callbacks if is_first else callbacks[::-1]
    fit(model, [*callbacks, checkpoint])
    restored = predict(model)
    ranks = [a.num_ranks for a in adapters_of(model)]
    model.load_weights(path)
    assert ranks == [a.num_ranks for a in adapters_of(model)]
    # More than the target, because the first epoch was the best.
    assert sum(ranks) > 6
    np.testing.assert_allclose(restored, predict(model), atol=1e-6)


@pytest.mark.one_backend
@pytest.mark.parametrize("frequency", [None, 4])
def test_averages_of_pruned_ranks_are_pruned(frequency):
    model = adapted("AdaLoRA")
    optimizer = keras.optimizers.Adam(
        0.02, use_ema=True, ema_overwrite_frequency=frequency
    )
    compile_model(model, optimizer)
    history = fit(model, [keras_fvae.AdaLoRAAllocator()], epochs=6).history
    assert history["mean_rank"][-2:] == [2, 2]
    assert sum(a.num_ranks for a in adapters_of(model)) == 6


@pytest.mark.one_backend
def test_paths_that_optimizers_write_alike_are_told_apart():
    x = np.random.default_rng(0).normal(size=(8, 6))
    inputs = keras.Input((6,))

    class Block(keras.layers.Layer):
        def __init__(self, inner_name, **kwargs):
            super().__init__(**kwargs)
            self.inner = keras.layers.Dense(8, name=inner_name)

        def call(self, x):
            return self.inner(x)

    outputs = Block("b_c", name="a")(inputs) + Block("c", name="a_b")(inputs)
    model = keras.Model(inputs, outputs)
    keras_fvae.enable_adapter(model, keras_fvae.SRLoRAConfig(2), ["b_c", "c"])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, np.ones((8, 8)), batch_size=4, verbose=0)
    a, b = (layer.adapter.kernel_a for layer in lookup.adapted_layers(model))
    assert a.path != b.path
    assert a.path.replace("/", "_") == b.path.replace("/", "_")
    slots = [observing.slots_of(model.optimizer, weight) for weight in (a, b)]
    ids = [{id(slot) for slot in each.values()} for each in slots]
    assert [len(each) for each in ids] == [2, 2] and not ids[0] & ids[1]


@pytest.mark.one_backend
def test_an_optimizer_of_ones_own_saves_itself(tmp_path):
    class Own(keras.optimizers.Adam):
        def save_own_variables(self, store):
            super().save_own_variables(store)
            saved.append(len(store.keys()))

    saved = []
    model = adapted("SRLoRA")
    compile_model(model, Own(0.02))
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "x.weights.h5", save_weights_only=True
    )
    fit(model, [METHODS["SRLoRA"][1](), checkpoint], epochs=1)
    assert saved == [len(model.optimizer.variables)]


@pytest.mark.one_backend
@pytest.mark.parametrize("name", METHODS)
def test_a_list_of_callbacks_serves_one_fit(name):
    model = adapted(name)
    compile_model(model)
    callbacks = keras.callbacks.CallbackList(
        [METHODS[name][1]()],
        add_history=True,
        model=model,
        epochs=4,
        steps=4,
        verbose=0,
    )
    fit(model, callbacks)
    before = predict(model)
    with pytest.raises(ValueError, match="has left the model.*CallbackList"):
        fit(model, callbacks)
    np.testing.assert_array_equal(predict(model), before)


@pytest.mark.one_backend
def test_layers_of_the_same_path_are_all_counted():
    def tower(name):
        inputs = keras.Input((6,))
        return keras.Model(
            inputs, keras.layers.Dense(8, name="query")(inputs), name=name
        )

    inputs = keras.Input((6,))
    model = keras.Model(inputs, [tower("a")(inputs), tower("b")(inputs)])
    keras_fvae.enable_adapter(model, keras_fvae.AdaLoRAConfig(3))
    model.compile(keras.optimizers.Adam(0.01), ["mse", "mse"])
    x, y = np.ones((8, 6)), np.ones((8, 8))
    allocator = keras_fvae.AdaLoRAAllocator()
    model.fit(x, [y, y], batch_size=1, callbacks=[allocator], verbose=0)
    [ranks] = allocator.history
    assert [*ranks] == ["query", "query:2"]
    assert [*ranks.values()] == [a.num_ranks for a in adapters_of(model)]


@pytest.mark.one_backend
def test_the_losses_of_a_method_are_shared_among_what_trains_by_it():
    """Each method's is a mean over its own layers."""

    def loss(targets, frozen=()):
        model = make_model()
        keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2), targets)
        for name in frozen:
            model.get_layer(name).trainable = False
        compile_model(model)
        model.make_train_function()
        return float(sum(map(float, model.losses)))

    ada = keras_fvae.AdaLoRAConfig(4, orthogonality_weight=1.0, seed=0)
    alone = loss({"up": ada})
    assert alone > 0.1
    fvae = keras_fvae.FVAELoRAConfig(2)
    assert loss({"up": ada, "query": fvae}) == pytest.approx(alone, 0.01)
    both = loss({"up": ada, "query": ada}, frozen=["query"])
    assert both == pytest.approx(alone, 0.01)


@pytest.mark.one_backend
def test_a_fit_that_stops_before_the_ranks_are_chosen_says_so():
    model = adapted("AdaLoRA")
    compile_model(model)

    def stop(epoch, logs):
        model.stop_training = epoch == 1

    early = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    with pytest.warns(UserWarning, match="after 8 updates.*after 16, so"):
        fit(model, [keras_fvae.AdaLoRAAllocator(), early], epochs=8)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", WITH_FLAT_LORA)
def test_another_model_is_evaluated_by_the_way(name):
    """With the same callback, in the middle of `fit`."""
    model, other = adapted(name), adapted(name)
    compile_model(model)
    compile_model(other)
    callback = WITH_FLAT_LORA[name][1]()
    evaluate = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: other.evaluate(
            X, Y, callbacks=[callback], verbose=0
        )
    )
    history = fit(model, [callback, evaluate]).history
    expected = adapted(name)
    compile_model(expected)
    expected_history = fit(expected, [WITH_FLAT_LORA[name][1]()]).history
    for key, values in expected_history.items():
        np.testing.assert_allclose(history[key], values, rtol=1e-6)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", WITH_FLAT_LORA)
def test_a_fit_without_an_epoch_changes_nothing(name):
    """As where a run goes on that was at its end."""
    model = adapted(name)
    compile_model(model)
    before = predict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, [WITH_FLAT_LORA[name][1]()], epochs=4, initial_epoch=4)
    np.testing.assert_array_equal(predict(model), before)
    assert {adapter.callback for adapter in adapters_of(model)} == {None}
