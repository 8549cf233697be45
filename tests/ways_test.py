"""Ways of training: what comes out is what another way comes to."""

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import JIT_COMPILE
from helpers import move_adapters
from helpers import text_inputs
from helpers import to_numpy
from short_training import LABELS
from short_training import SMALL
from short_training import TOKENS
from short_training import Recorder
from short_training import adapt_without_dropout
from short_training import assert_same_moves
from short_training import cross_entropy
from short_training import elbo_of
from short_training import make_adapted
from short_training import make_attention_model
from short_training import make_nested
from short_training import plain_run
from short_training import plain_step
from short_training import train

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

# On PyTorch, Keras refuses the one and compiles slowly by the other, which is
# tried once, below.
COMPILED = (
    [{"steps_per_execution": 3}, {"jit_compile": True}]
    if BACKEND != "torch"
    else []
)
# TensorFlow's XLA draws other numbers from the same seed.
SAME_NOISE = {
    "jax": COMPILED,
    "tensorflow": COMPILED[:1],
    # By the other, PyTorch takes minutes to compile.
    "torch": [
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
    ],
}[BACKEND]


@pytest.mark.parametrize(
    "options",
    [
        {"run_eagerly": True},
        {"jit_compile": False},
        *COMPILED,
    ],
    ids=str,
)
def test_ways_to_compile(options):
    # Four steps: the last of several executions is not a full one.
    expected_losses, expected_moves, _ = plain_run()
    losses, moves = train(make_adapted(), **options)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert_same_moves(moves, expected_moves)


@pytest.mark.parametrize("options", SAME_NOISE, ids=str)
def test_ways_to_compile_draw_the_same_noise(options):
    def run(**options):
        return train(adapt_attention_model(), **options)

    expected_losses, expected_moves = run()
    losses, moves = run(**options)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert_same_moves(moves, expected_moves)


@pytest.mark.skipif(BACKEND != "torch", reason="Of PyTorch's compiler")
def test_torch_compile_traces_a_model():
    """What takes minutes is what comes after, in the test above."""
    import torch

    results = []
    for backend in (None, "eager"):
        model = adapt_attention_model()

        def step(tokens, model=model):
            return model(tokens, training=True), model.losses

        if backend is not None:
            step = torch.compile(step, backend=backend)
        outputs, losses = step(torch.tensor(TOKENS))
        results.append([to_numpy(outputs), float(sum(losses))])
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def adapt_attention_model():
    model = make_attention_model()
    keras_fvae.enable_fvae_lora(model, **SMALL)
    move_adapters(model, np.random.default_rng(0))
    return model


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_rematerialized_adapters_train_the_same(jit_compile):
    def run(rematerialize):
        model = make_attention_model()
        keras_fvae.enable_fvae_lora(
            model, rematerialize=rematerialize, seed=1, **SMALL
        )
        move_adapters(model, np.random.default_rng(0))
        # The last batch is smaller, and the monitor counts.
        monitor = keras_fvae.FVAELoRAMonitor()
        fit = {"batch_size": 6, "callbacks": [monitor]}
        keras.utils.set_random_seed(1)
        return train(model, jit_compile=jit_compile, fit=fit)

    expected_losses, expected_moves = run(rematerialize=False)
    losses, moves = run(rematerialize=True)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert_same_moves(moves, expected_moves)


def test_gradient_accumulation_is_a_larger_batch():
    expected_moves, _ = plain_step()
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=4)
    _, moves = train(make_adapted(), optimizer)
    assert_same_moves(moves, expected_moves)


@pytest.mark.parametrize("initial_scale", [None, 2.0**8])
def test_loss_scaling(initial_scale):
    x = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")

    def run(policy):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        try:
            inputs = keras.Input((8,))
            outputs = keras.layers.Dense(3, name="query")(inputs)
            model = keras.Model(inputs, outputs)
            adapt_without_dropout(model)
        finally:
            keras.config.set_dtype_policy("float32")
        assert {w.dtype for w in model.trainable_weights} == {"float32"}
        optimizer = keras.optimizers.SGD(0.01)
        if policy == "mixed_float16" and initial_scale is not None:
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale
            )
        losses, moves = train(model, optimizer, (x, LABELS))
        return losses, moves, model.optimizer

    losses, moves, optimizer = run("mixed_float16")
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if initial_scale is not None:
        # Too low to leave a step out, as the default may at first.
        assert float(to_numpy(optimizer.dynamic_scale)) == initial_scale
        expected_losses, expected_moves, _ = run("float32")
        assert losses == pytest.approx(expected_losses, rel=1e-2)
        assert_same_moves(moves, expected_moves, tolerance=0.05)


def test_moving_averages():
    _, _, (start, averages, *steps) = plain_run()
    for values in steps:
        averages = [0.7 * a + 0.3 * v for a, v in zip(averages, values)]
    optimizer = keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.7)
    # `fit` leaves the averages in the model.
    _, moves = train(make_adapted(), optimizer)
    assert_same_moves(moves, [a - b for a, b in zip(averages, start)])


def test_moving_averages_overwrite_the_weights():
    _, _, (start, first, second, *_) = plain_run()
    optimizer = keras.optimizers.SGD(
        0.01, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=2
    )
    recorder = Recorder()
    train(make_adapted(), optimizer, fit={"callbacks": [recorder]})
    averages = [0.7 * a + 0.3 * b for a, b in zip(first, second)]
    assert_same_moves(
        [a - b for a, b in zip(recorder.weights[2], start)],
        [a - b for a, b in zip(averages, start)],
    )


def test_moving_averages_are_evaluated():
    model = make_adapted()
    fit = {
        "epochs": 2,
        "validation_data": (TOKENS, LABELS),
        "callbacks": [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
    }
    optimizer = keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.7)
    train(model, optimizer, fit=fit)
    val_losses = model.history.history["val_loss"]
    evaluated = model.evaluate(TOKENS, LABELS, verbose=0)
    assert evaluated == pytest.approx(val_losses[-1], rel=1e-4)


@pytest.mark.shared_out
@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_clipping(name):
    gradients, _ = plain_step()
    norms = [np.linalg.norm(g) for g in gradients]
    if name == "clipnorm":
        limit = np.median(norms)
        expected_moves = [
            g * min(1, limit / norm) for g, norm in zip(gradients, norms)
        ]
    elif name == "global_clipnorm":
        # What is frozen is no part of it.
        limit = np.linalg.norm(norms) / 2
        expected_moves = [g / 2 for g in gradients]
    else:
        limit = np.median(np.abs(gradients[0]))
        expected_moves = [np.clip(g, -limit, limit) for g in gradients]
    optimizer = keras.optimizers.SGD(1.0, **{name: float(limit)})
    _, moves = train(make_adapted(), optimizer, fit={"batch_size": 16})
    assert_same_moves(moves, expected_moves)


def test_weight_decay():
    plain_moves, start = plain_step()
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.1)
    _, moves = train(make_adapted(), optimizer, fit={"batch_size": 16})
    expected_moves = [m - 0.1 * w for m, w in zip(plain_moves, start)]
    assert_same_moves(moves, expected_moves)


@pytest.mark.parametrize("name", ["sample_weight", "class_weight"])
def test_weights_of_samples_do_not_weight_the_elbo(name):
    model = make_adapted()
    by_class = np.array([0.5, 2.0, 3.0], "float32")
    value = by_class[LABELS]
    if name == "class_weight":
        value = {index: float(w) for index, w in enumerate(by_class)}
    embedded = model.get_layer("embedding")(TOKENS)
    elbo = elbo_of(model, embedded)
    logits = model.predict(TOKENS, verbose=0)
    log_sums = np.log(np.exp(logits).sum(axis=-1))
    losses = log_sums - logits[np.arange(16), LABELS]
    task = (losses * by_class[LABELS]).mean()
    # The whole data in one batch: the loss is that before the step.
    (loss,), _ = train(model, fit={"batch_size": 16, name: value})
    assert elbo > 0.1
    assert loss == pytest.approx(task + elbo, rel=1e-3)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return TOKENS[4 * index :][:4], LABELS[4 * index :][:4]


def make_tensorflow_dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((TOKENS, LABELS)).batch(4)


def make_torch_loader():
    import torch

    pairs = torch.utils.data.TensorDataset(
        torch.tensor(TOKENS), torch.tensor(LABELS)
    )
    return torch.utils.data.DataLoader(pairs, batch_size=4)


def make_generator():
    batches = Batches()
    yield from (batches[index] for index in range(len(batches)))


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "make_data",
    [Batches, make_tensorflow_dataset, make_torch_loader, make_generator],
)
def test_sources_of_data(make_data):
    expected_losses, expected_moves, _ = plain_run()
    losses, moves = train(
        make_adapted(), data=(make_data(),), fit={"batch_size": None}
    )
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert_same_moves(moves, expected_moves)


def test_batches_of_other_shapes_compile_no_more_than_before():
    traces = []

    class Counter(keras.layers.Layer):
        def call(self, x):
            traces.append(tuple(x.shape))
            return x

    def make_batches():
        for size, length in [(4, 6), (4, 3), (2, 6), (4, 3), (4, 6)]:
            yield TOKENS[:size, :length], LABELS[:size]

    def count_traces(is_adapted):
        inputs = keras.Input((None,), dtype="int32")
        outputs = make_attention_model()(Counter()(inputs))
        model = keras.Model(inputs, outputs)
        if is_adapted:
            keras_fvae.enable_fvae_lora(model, **SMALL)
        data = make_batches()
        if BACKEND == "tensorflow":
            import tensorflow as tf

            signature = (
                tf.TensorSpec((None, None), "int32"),
                tf.TensorSpec((None,), "int32"),
            )
            data = tf.data.Dataset.from_generator(
                make_batches, output_signature=signature
            )
        model.compile("sgd", "sparse_categorical_crossentropy")
        traces.clear()
        model.fit(data, verbose=0)
        return len(traces)

    expected = count_traces(is_adapted=False)
    assert count_traces(is_adapted=True) == expected
    # Of TensorFlow, one trace for all.
    if BACKEND == "tensorflow":
        assert set(traces) == {(None, None)}


def test_the_last_batch_is_a_smaller_one():
    model = make_adapted()
    elbo = elbo_of(model, model.get_layer("embedding")(TOKENS))
    # Without a step in between, the loss is that of all samples together.
    model.compile(keras.optimizers.SGD(1e-12), cross_entropy)
    task = model.evaluate(TOKENS, LABELS, verbose=0)
    history = model.fit(TOKENS, LABELS, batch_size=6, verbose=0).history
    assert history["loss"][0] == pytest.approx(task + elbo, rel=1e-3)


def test_nested_models(rng):
    x = rng.normal(size=(16, 5)).astype("float32")
    model = make_nested()
    adapt_without_dropout(model, trainable_layer_names=["head"])
    assert len(adapted_layers(model)) == 3
    elbo, features = 0.0, x
    for layer in adapted_layers(model):
        elbo += 0.5 / 3 * to_numpy(layer.adapter.fvae(features).loss)
        features = layer(features)
    task = np.mean(to_numpy(cross_entropy(LABELS, model(x))))
    (total,), _ = train(model, data=(x, LABELS), fit={"batch_size": 16})
    assert total == pytest.approx(task + elbo, rel=1e-3)


class CustomLoss(keras.Model):
    """A model with a loss of its own, as Keras's guides have it."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        task = keras.ops.mean(keras.ops.square(y_pred - y))
        return 2.0 * task + sum(self.losses)


class CustomStep(keras.Model):
    """A model with a step of its own, as Keras's guides have it."""

    def train_step(self, *args):
        return getattr(self, f"_{BACKEND}_step")(*args)

    def _jax_step(self, state, data):
        import jax

        trainable, non_trainable, optimizer_variables, metrics = state
        x, y = data

        def compute_loss(trainable, non_trainable):
            y_pred, non_trainable, losses = self.stateless_call(
                trainable, non_trainable, x, training=True, return_losses=True
            )
            task = keras.ops.mean(keras.ops.square(y_pred - y))
            return 2.0 * task + sum(losses), non_trainable

        (loss, non_trainable), gradients = jax.value_and_grad(
            compute_loss, has_aux=True
        )(trainable, non_trainable)
        trainable, optimizer_variables = self.optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        state = (trainable, non_trainable, optimizer_variables, metrics)
        return {"total": loss}, state

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            task = tf.reduce_mean(tf.square(y_pred - y))
            loss = 2.0 * task + sum(self.losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"total": loss}

    def _torch_step(self, data):
        import torch

        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = 2.0 * torch.mean((y_pred - y) ** 2) + sum(self.losses)
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        return {"total": loss}


@pytest.mark.parametrize("model_class", [CustomLoss, CustomStep])
def test_custom_losses_and_steps(model_class, rng):
    x = rng.normal(size=(16, 5)).astype("float32")
    y = rng.normal(size=(16, 3)).astype("float32")
    inputs = keras.Input((5,))
    outputs = keras.layers.Dense(3, name="query")(inputs)
    model = model_class(inputs, outputs)
    adapt_without_dropout(model)
    task = np.square(model.predict(x, verbose=0) - y).mean()
    elbo = elbo_of(model, x)
    (loss,), _ = train(model, data=(x, y), fit={"batch_size": 16}, loss="mse")
    assert loss == pytest.approx(2 * task + elbo, rel=1e-3)


def test_validation_has_no_elbo():
    fit = {"validation_data": (TOKENS, LABELS), "epochs": 2}
    model = make_adapted()
    losses, _ = train(model, fit=fit)
    val_losses = model.history.history["val_loss"]
    evaluated = model.evaluate(TOKENS, LABELS, verbose=0)
    assert evaluated == pytest.approx(val_losses[-1], rel=1e-4)
    task = np.mean(to_numpy(cross_entropy(LABELS, model(TOKENS))))
    assert evaluated == pytest.approx(task, rel=1e-4)
    assert min(losses) > max(val_losses) + 1.0
    # Training again adds it again.
    again = model.fit(TOKENS, LABELS, verbose=0).history["loss"][0]
    assert again > evaluated + 1.0


def test_a_frozen_adapter_stays_and_the_other_trains():
    model = make_adapted()
    frozen, other = adapted_layers(model)
    frozen.trainable = False
    # `train` checks that nothing moves but what is trainable.
    train(model)
    assert not frozen.trainable_weights
    assert len(other.trainable_weights) == 3
    # Its base weights stay frozen.
    frozen.trainable = True
    assert len(frozen.trainable_weights) == 3


def test_everything_at_once(bert, rng):
    bert.backbone.enable_fvae_lora(**SMALL)
    inputs = text_inputs(rng, (16, 8))
    inputs["padding_mask"][::2, 5:] = 0
    optimizer = keras.optimizers.AdamW(
        1e-2,
        weight_decay=0.01,
        global_clipnorm=1.0,
        gradient_accumulation_steps=2,
        use_ema=True,
        ema_momentum=0.5,
    )
    losses, _ = train(
        bert,
        optimizer,
        (inputs, LABELS),
        {"batch_size": 3, "epochs": 3, "sample_weight": 1.0 + LABELS},
        steps_per_execution=1 if BACKEND == "torch" else 2,
    )
    assert losses[-1] < losses[0]
