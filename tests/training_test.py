import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import JIT_COMPILE
from helpers import move_adapters
from helpers import remove_latent_noise
from helpers import text_inputs
from helpers import to_numpy

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

SMALL = {"rank": 2, "decoder_units": (4,)}
LABELS = np.arange(4) % 3


def compile_model(model, **options):
    model.compile(
        keras.optimizers.AdamW(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **options,
    )


@pytest.fixture
def inputs(rng):
    return text_inputs(rng)


@pytest.fixture
def dense_model(rng):
    """One adapted layer, whose loss can be told from outside."""
    inputs = keras.Input((5,))
    outputs = keras.layers.Dense(3, name="query")(inputs)
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_fit_trains_the_adapters_and_the_head_alone(bert, inputs, jit_compile):
    bert.backbone.enable_fvae_lora(**SMALL)
    compile_model(bert, jit_compile=jit_compile)
    before = {w.path: (w.trainable, to_numpy(w)) for w in bert.weights}
    predictions = bert.predict(inputs, verbose=0)
    history = bert.fit(
        inputs,
        LABELS,
        epochs=4,
        batch_size=2,
        verbose=0,
        validation_data=(inputs, LABELS),
    ).history
    assert history["val_loss"][-1] < history["val_loss"][0]
    for weight in bert.weights:
        trainable, value = before[weight.path]
        is_same = np.array_equal(to_numpy(weight), value)
        # Bit for bit, what is frozen; and nothing that trains stays.
        assert is_same != trainable, weight.path
    moved = bert.predict(inputs, verbose=0)
    assert np.abs(moved - predictions).max() > 1e-3
    np.testing.assert_array_equal(bert.predict(inputs, verbose=0), moved)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="no other has traces")
@pytest.mark.parametrize("kind", ["arrays", "dataset", "generator", "batch"])
@pytest.mark.parametrize("is_task", [False, True])
@pytest.mark.parametrize(
    "metrics", [None, pytest.param(["accuracy"], marks=pytest.mark.slow)]
)
def test_a_step_is_traced_once(
    metrics, is_task, kind, bert, attention_model, inputs
):
    import tensorflow as tf

    if is_task:
        model, whole = bert, bert.backbone
        # Of dicts KerasHub's tasks take no generator.
        kind = "arrays" if kind == "generator" else kind
    else:
        model = whole = attention_model
        inputs = inputs["token_ids"]
    keras_fvae.enable_fvae_lora(whole, **SMALL)
    compile_model(model, metrics=metrics, weighted_metrics=metrics)
    num_traces, num_batches = 0, 0
    train_step = model.train_step

    def count_traces(data):
        nonlocal num_traces
        num_traces += 1
        return train_step(data)

    def generate():
        nonlocal num_batches
        for _ in range(3):
            num_batches += 1
            yield data

    model.train_step = count_traces
    data = inputs, LABELS
    if kind == "arrays":
        model.fit(*data, batch_size=2, verbose=0)
    elif kind == "dataset":
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(2)
        model.fit(dataset, verbose=0)
    elif kind == "generator":
        model.fit(generate(), verbose=0)
        # Nor is a batch of data lost to find out its shape.
        assert model.optimizer.iterations >= num_batches == 3
    else:
        model.train_on_batch(*data)
    assert num_traces == 1


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_the_loss_in_fit_is_that_of_the_task_and_the_elbo(
    dense_model, run_eagerly, rng
):
    x = rng.normal(size=(8, 5)).astype("float32")
    y = rng.normal(size=(8, 3)).astype("float32")
    keras_fvae.enable_fvae_lora(
        dense_model, dropout=0.0, elbo_weight=0.5, **SMALL
    )
    move_adapters(dense_model, rng)
    remove_latent_noise(dense_model)
    dense_model.compile("sgd", "mse", run_eagerly=run_eagerly)
    dense_model.optimizer.learning_rate = 0.0
    task = np.square(dense_model.predict(x, verbose=0) - y).mean()
    (layer,) = adapted_layers(dense_model)
    elbo = 0.5 * to_numpy(layer.adapter.fvae(x).loss)
    assert elbo > 0.1
    losses = {
        "fit": dense_model.fit(x, y, verbose=0).history["loss"][0],
        "train_on_batch": dense_model.train_on_batch(x, y),
    }
    for name, loss in losses.items():
        assert loss == pytest.approx(task + elbo, rel=1e-3), name
    # The task's alone, in evaluation.
    evaluated = {
        "evaluate": dense_model.evaluate(x, y, verbose=0),
        "test_on_batch": dense_model.test_on_batch(x, y),
        "validation": dense_model.fit(
            x, y, validation_data=(x, y), verbose=0
        ).history["val_loss"][0],
    }
    for name, loss in evaluated.items():
        assert loss == pytest.approx(task, rel=1e-5), name


def make_training_step(model, optimizer, x, y):
    """A step of a loop written by hand; it returns the layers' losses."""
    if BACKEND == "jax":
        import jax

        @jax.jit
        def gradient_step(trainable, non_trainable):
            def compute_loss(trainable):
                outputs, updates, losses = model.stateless_call(
                    trainable,
                    non_trainable,
                    x,
                    training=True,
                    return_losses=True,
                )
                task = keras.ops.mean(keras.ops.square(outputs - y))
                return task + sum(losses), (updates, losses)

            return jax.grad(compute_loss, has_aux=True)(trainable)

        def step():
            gradients, (updates, losses) = gradient_step(
                [v.value for v in model.trainable_variables],
                [v.value for v in model.non_trainable_variables],
            )
            for variable, value in zip(model.non_trainable_variables, updates):
                variable.assign(value)
            optimizer.apply(gradients, model.trainable_variables)
            return losses

    elif BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                outputs = model(x, training=True)
                losses = model.losses
                task = tf.reduce_mean(tf.square(outputs - y))
                loss = task + sum(losses)
            variables = model.trainable_variables
            gradients = tape.gradient(loss, [v.value for v in variables])
            optimizer.apply(gradients, variables)
            return losses

    else:
        import torch

        def step():
            model.zero_grad()
            outputs = model(x, training=True)
            losses = model.losses
            loss = ((outputs - torch.tensor(y)) ** 2).mean() + sum(losses)
            loss.backward()
            variables = model.trainable_variables
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in variables], variables)
            return losses

    return step


def test_a_loop_by_hand_sees_the_elbo(dense_model, rng):
    x = rng.normal(size=(64, 5)).astype("float32")
    y = rng.normal(size=(64, 3)).astype("float32")
    keras_fvae.enable_fvae_lora(dense_model, elbo_weight=1.0, **SMALL)
    optimizer = keras.optimizers.Adam(3e-2)
    optimizer.build(dense_model.trainable_variables)
    step = make_training_step(dense_model, optimizer, x, y)
    elbos = [sum(float(to_numpy(elbo)) for elbo in step()) for _ in range(60)]
    assert np.mean(elbos[-10:]) < np.mean(elbos[:10]) - 0.3


def test_inference_touches_neither_decoder_nor_z2(bert, inputs, rng):
    bert.backbone.enable_fvae_lora(**SMALL)
    move_adapters(bert, rng)
    predictions = bert.predict(inputs, verbose=0)
    for layer in adapted_layers(bert):
        fvae = layer.adapter.fvae
        weights = fvae.get_reference_weights()
        z1_mean = "views_conditionalGaussianEncoders_list.0."
        for name, weight in weights.items():
            if not name.startswith(z1_mean) or "logvar" in name:
                weight[...] = np.nan
        fvae.set_reference_weights(weights)
    compile_model(bert)
    np.testing.assert_array_equal(bert.predict(inputs, verbose=0), predictions)
    assert np.isfinite(bert.evaluate(inputs, LABELS, verbose=0)[0])


def test_enabling_after_compile(bert, inputs):
    compile_model(bert)
    bert.backbone.enable_fvae_lora(**SMALL)
    frozen = {w.path: to_numpy(w) for w in bert.weights if not w.trainable}
    bert.fit(inputs, LABELS, verbose=0)
    assert {w.path for w in bert.weights if not w.trainable} == set(frozen)
    for weight in bert.weights:
        if not weight.trainable:
            np.testing.assert_array_equal(to_numpy(weight), frozen[weight.path])
    number = len(bert.optimizer.variables)
    # Two slots for each of three weights in four layers and of the head's
    # two, the iterations and the learning rate.
    assert number == 2 * (4 * 3 + 2) + 2


def test_enabling_after_predict_and_evaluate(bert, inputs, rng):
    compile_model(bert)
    before = bert.predict(inputs, verbose=0)
    evaluated = bert.evaluate(inputs, LABELS, verbose=0)
    bert.backbone.enable_fvae_lora(**SMALL)
    # The compiled functions are not those of the plain model.
    np.testing.assert_array_equal(bert.predict(inputs, verbose=0), before)
    move_adapters(bert, rng)
    assert np.abs(bert.predict(inputs, verbose=0) - before).max() > 1e-3
    assert bert.evaluate(inputs, LABELS, verbose=0)[0] != evaluated[0]
    bert.fit(inputs, LABELS, verbose=0)


def test_enabling_after_fit_asks_to_compile_again(bert, inputs):
    compile_model(bert)
    bert.fit(inputs, LABELS, verbose=0)
    with pytest.warns(UserWarning, match=r"Call `compile\(\)` again"):
        bert.backbone.enable_fvae_lora(**SMALL)
    with pytest.raises(ValueError, match=r"call `compile\(\)`"):
        bert.fit(inputs, LABELS, verbose=0)
    frozen = {w.path: to_numpy(w) for w in bert.weights if not w.trainable}
    compile_model(bert)
    bert.fit(inputs, LABELS, verbose=0)
    for weight in bert.weights:
        if not weight.trainable:
            np.testing.assert_array_equal(to_numpy(weight), frozen[weight.path])


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_a_run_repeats_exactly(make_attention_model, jit_compile, rng):
    tokens = rng.integers(1, 50, (4, 6))

    def run(seed):
        keras.utils.set_random_seed(seed)
        model = make_attention_model()
        keras_fvae.enable_fvae_lora(model, **SMALL)
        compile_model(model, jit_compile=jit_compile)
        history = model.fit(tokens, LABELS, epochs=2, batch_size=2, verbose=0)
        return history.history["loss"]

    first = run(1)
    assert run(1) == first
    assert run(2) != first


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "dtype", ["mixed_float16", "mixed_bfloat16", "bfloat16"]
)
def test_fit_in_lower_precision(dtype, rng):
    x = rng.normal(size=(8, 5)).astype("float32")
    inputs = keras.Input((5,))
    outputs = keras.layers.Dense(3, name="query", dtype=dtype)(inputs)
    model = keras.Model(inputs, outputs)
    before = model.predict(x, verbose=0)
    keras_fvae.enable_fvae_lora(model, **SMALL)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    compile_model(model)
    history = model.fit(x, np.arange(8) % 3, epochs=5, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    (layer,) = adapted_layers(model)
    assert {w.dtype for w in layer.adapter.weights} == {"float32"}
    assert np.abs(model.predict(x, verbose=0) - before).max() > 1e-3


@pytest.mark.skipif(BACKEND != "torch", reason="what only PyTorch has")
def test_torch_sees_every_trainable_weight_as_a_parameter(
    bert, attention_model
):
    bert.backbone.enable_fvae_lora(**SMALL)
    keras_fvae.enable_fvae_lora(attention_model, **SMALL)
    for model in (bert, bert.backbone, attention_model):
        parameters = {id(parameter) for parameter in model.parameters()}
        for weight in model.trainable_weights:
            assert id(weight.value) in parameters, weight.path


def make_tower(name):
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8, name="query")], name=name
    )


def around(layers):
    inputs = keras.Input((8,))
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def loss_weights(model):
    return [
        float(layer.adapter.fvae.loss_weight) for layer in adapted_layers(model)
    ]


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "kind", ["at once", "by parts", "by parts, before", "as layers"]
)
def test_layers_share_the_weight_however_they_were_adapted(kind, rng):
    options = {"elbo_weight": 0.6, **SMALL}
    towers = [make_tower(name) for name in "abc"]
    if kind == "as layers":
        config = keras_fvae.FVAELoRAConfig(**options)
        towers = [keras_fvae.FVAELoRADense(8, config=config) for _ in "abc"]
    if kind == "by parts, before":
        for tower in towers:
            keras_fvae.enable_fvae_lora(tower, **options)
    model = around(towers)
    if kind == "at once":
        keras_fvae.enable_fvae_lora(model, **options)
    if kind == "by parts":
        for tower in towers:
            keras_fvae.enable_fvae_lora(tower, **options)
    x = rng.normal(size=(4, 8)).astype("float32")
    # As in a loop of one's own.
    model(x, training=True)
    assert loss_weights(model) == pytest.approx([0.2] * 3)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((4, 3)), verbose=0)
    assert loss_weights(model) == pytest.approx([0.2] * 3)
    if kind != "as layers":
        # What trains by itself has the whole weight.
        towers[0].compile("sgd", "mse")
        towers[0].fit(x, x, verbose=0)
        assert loss_weights(towers[0]) == pytest.approx([0.6])
        model.fit(x, np.zeros((4, 3)), verbose=0)


@pytest.mark.parametrize("samples_at_inference", [False, True])
def test_several_draws_a_token_of_sequences(samples_at_inference, rng):
    """Of layers whose tokens have more than one axis, as in attention."""
    inputs = keras.Input((5, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_fvae.enable_fvae_lora(
        model,
        num_samples=3,
        sample_at_inference=samples_at_inference,
        trainable_layer_names="head",
        **{**SMALL, "dropout": 0.0},
    )
    move_adapters(model, rng)
    remove_latent_noise(model)
    x = rng.normal(size=(4, 5, 8)).astype("float32")
    # Without noise each draw is the mean, and so is theirs.
    outputs = to_numpy(model(x, training=True))
    np.testing.assert_allclose(outputs, to_numpy(model(x)), atol=3e-4)
    model.compile("sgd", "mse", jit_compile=BACKEND == "jax")
    history = model.fit(x, np.zeros((4, 5, 3)), verbose=0).history
    assert np.isfinite(history["loss"]).all()
