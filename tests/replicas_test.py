"""Adapted models on two replicas of TensorFlow."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import move_adapters
from helpers import remove_latent_noise
from helpers import to_numpy

import keras_fvae
from keras_fvae.backend.noise import next_seed
from keras_fvae.backend.noise import noise_and_masks
from keras_fvae.model.lookup import adapted_layers

# Sequences of unequal lengths: the replicas have unequal shares.
LENGTHS = np.array([6, 6, 6, 5, 1, 1, 2, 1, 6, 1, 6, 1, 2, 5, 4, 3])


# One for all: TensorFlow takes the collectives of a second one for the first's.
@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (16, 6))
    tokens[np.arange(6) >= LENGTHS[:, None]] = 0
    return tokens, np.arange(16) % 3


def adapt(model):
    """Adapts it so that latents do not depend on who draws which numbers."""
    keras_fvae.enable_fvae_lora(
        model,
        rank=2,
        decoder_units=(4,),
        dropout=0.0,
        elbo_weight=0.5,
        seed=0,
        trainable_layer_names=["head"],
    )
    move_adapters(model, np.random.default_rng(0))
    remove_latent_noise(model)


def compile_model(model, optimizer=None, **options):
    model.compile(
        optimizer or keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **options,
    )


def fit(model, data):
    history = model.fit(
        *data,
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras_fvae.FVAELoRAMonitor(),
            keras_fvae.FVAELoRASchedule(elbo_weight=lambda step: 0.1 * step),
        ],
    )
    return history.history, [to_numpy(w) for w in model.weights]


@pytest.mark.parametrize(
    "run_eagerly, is_adapted_in_scope",
    [(False, True), (False, False), (True, False)],
)
def test_fits_of_one_device(
    run_eagerly, is_adapted_in_scope, make_attention_model, strategy, data
):
    keras.utils.set_random_seed(0)
    model = make_attention_model()
    start = [to_numpy(w) for w in model.weights]
    adapt(model)
    compile_model(model)
    history, weights = fit(model, data)
    with strategy.scope():
        model = make_attention_model()
        model.set_weights(start)
        if is_adapted_in_scope:
            adapt(model)
    if not is_adapted_in_scope:
        adapt(model)
    with strategy.scope():
        compile_model(model, run_eagerly=run_eagerly)
    assert strategy.num_replicas_in_sync == 2
    replicated_history, replicated_weights = fit(model, data)
    assert {"fvae_loss", "explained_variance"} <= {*history}
    for name, values in history.items():
        # A variance that is the difference of two means has fewer digits.
        rtol = 1e-3 if name == "signal_to_noise" else 1e-4
        np.testing.assert_allclose(
            replicated_history[name], values, rtol=rtol, err_msg=name
        )
    for weight, expected in zip(replicated_weights, weights, strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-5)


def make_riemannian():
    return keras_fvae.optimizers.RiemannianPreconditioning(
        keras.optimizers.Adam(0.05)
    )


def make_lora_rite():
    return keras_fvae.optimizers.LoRARITE(0.05, keras.optimizers.SGD(0.05))


def make_oplora():
    return keras_fvae.optimizers.OPLoRA(
        0.05, keras.optimizers.SGD(0.05), momentum=0.5
    )


def make_scaled_oplora():
    return keras_fvae.optimizers.OPLoRA(
        0.5, keras.optimizers.SGD(0.05), scaled=True, beta_2=0.5
    )


@pytest.mark.parametrize(
    "make_optimizer, config_class",
    [
        (make_riemannian, keras_fvae.LoRAConfig),
        (make_lora_rite, keras_fvae.LoRAConfig),
        (make_oplora, keras_fvae.OPLoRAConfig),
        (
            make_scaled_oplora,
            functools.partial(keras_fvae.OPLoRAConfig, mean_squares=True),
        ),
    ],
)
def test_optimizers_of_pairs(
    make_optimizer, config_class, make_attention_model, strategy, data
):
    def fit():
        keras.utils.set_random_seed(0)
        model = make_attention_model()
        keras_fvae.enable_adapter(
            model,
            config_class(2, seed=0),
            trainable_layer_names=["head"],
        )
        compile_model(model, optimizer=make_optimizer())
        model.fit(*data, batch_size=8, epochs=3, shuffle=False, verbose=0)
        return [to_numpy(w) for w in model.weights]

    expected = fit()
    with strategy.scope():
        weights = fit()
    for weight, expected_weight in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight, expected_weight, atol=1e-5)


@pytest.mark.parametrize("shares", [(5, 3), (8, 0)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_the_mean_over_a_batch_that_is_not_shared_equally(
    shares, has_mask, strategy, config, rng
):
    x = rng.normal(size=(8, 6, 4)).astype("float32")
    mask = (np.arange(6) < LENGTHS[:8, None]).astype("float32")
    if not has_mask:
        mask[:] = 1
    with strategy.scope():
        fvae = keras_fvae.FVAE(config)
        fvae.build((None, 4))

    def loss(x, mask):
        return fvae(
            x,
            training=True,
            mask=mask if has_mask else None,
            noise=(np.zeros((*x.shape[:-1], 3), "float32"),) * 2,
        ).loss

    expected = float(loss(x, mask))

    def share(array):
        parts = np.split(array, [shares[0]])
        return strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    values = strategy.run(loss, args=(share(x), share(mask)))
    mean = strategy.reduce("mean", values, axis=None)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_replicas_draw_different_numbers(strategy):
    def draw(generator):
        seed = next_seed(generator)
        noise, _ = noise_and_masks((), seed, noise_width=1000)
        return noise

    with strategy.scope():
        generator = keras.random.SeedGenerator(3)
    first = strategy.run(lambda: draw(generator))
    ours, theirs = strategy.experimental_local_results(first)
    assert not np.intersect1d(ours, theirs).size > 2
    # The first replica's are those of one device.
    alone = draw(keras.random.SeedGenerator(3))
    np.testing.assert_array_equal(ours, alone)


def test_files_from_and_to_replicas(
    make_attention_model, strategy, data, tmp_path
):
    path = tmp_path / "task.safetensors"
    with strategy.scope():
        model = make_attention_model()
        adapt(model)
        compile_model(model)
    fit(model, data)
    keras_fvae.save_adapter(model, path)
    with strategy.scope():
        loaded = make_attention_model()
    keras_fvae.load_adapter(loaded, path)
    for layer, saved in zip(adapted_layers(loaded), adapted_layers(model)):
        for name, array in layer.adapter.get_arrays().items():
            np.testing.assert_array_equal(
                array, saved.adapter.get_arrays()[name]
            )


@pytest.mark.parametrize(
    "block", [keras_fvae.adapter_disabled, keras_fvae.adapter_sampling]
)
def test_adapters_cannot_be_switched(
    block, make_attention_model, strategy, data
):
    with strategy.scope():
        model = make_attention_model()
        adapt(model)
        compile_model(model)
    with (
        block(model),
        pytest.raises(ValueError, match=f"neither .* `{block.__name__}`"),
    ):
        model.predict(data[0], verbose=0)
    assert model.predict(data[0], verbose=0).shape == (16, 3)


def test_adalora_cannot_see_the_gradients(make_attention_model, strategy, data):
    with strategy.scope():
        model = make_attention_model()
        keras_fvae.enable_adapter(model, keras_fvae.AdaLoRAConfig(2))
        compile_model(model)
        with pytest.raises(ValueError, match="gradients cannot be watched"):
            model.fit(
                *data, callbacks=[keras_fvae.AdaLoRAAllocator()], verbose=0
            )
