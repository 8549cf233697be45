"""Predictions under what adapters draw."""

import contextlib

import family
import keras
import numpy as np
import pytest
import small_models
from helpers import BACKEND
from helpers import CallCounter
from helpers import move_adapters
from helpers import to_numpy

import keras_fvae

RANDOM = ["FVAE-LoRA", "linear FVAE-LoRA", "LoRA with dropout", "DropLoRA"]
CHOSEN = [
    name if name in family.KINDS else pytest.param(name, marks=pytest.mark.slow)
    for name in RANDOM
]


def adapted(name, rng):
    """A model whose adapters matter."""
    model = family.adapt(family.make_model(), name)
    move_adapters(model, rng, scale=0.5)
    return model


def predict(model):
    return model.predict(family.X, verbose=0)


def test_samples_have_the_mean_and_covariance_of_q1(rng):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_fvae_lora(model, rank=2, alpha=3, decoder_units=(4,))
    move_adapters(model, rng, scale=0.5)
    x = np.tile(rng.normal(size=(1, 6)), (2000, 1)).astype("float32")
    samples = keras_fvae.predict_samples(model, x, 4, batch_size=500)
    assert samples.shape == (4, 2000, 3)
    rows = samples.reshape(-1, 3).astype("float64")
    query = model.get_layer("query")
    (latents,) = keras_fvae.latents(model, x[:1]).values()
    variance = np.exp(latents.z1_log_variance[0])
    kernel_b = query.config.scale * to_numpy(query.adapter.kernel_b)
    covariance = kernel_b.T @ np.diag(variance) @ kernel_b
    scale = np.sqrt(np.diag(covariance))
    # Of 8,000 draws.
    error = np.abs(rows.mean(axis=0) - model.predict(x[:1], verbose=0)[0])
    assert (error < 5 * scale / np.sqrt(len(rows))).all()
    np.testing.assert_allclose(
        np.cov(rows.T), covariance, atol=0.07 * scale.max() ** 2
    )


@pytest.mark.parametrize("name", CHOSEN)
def test_samples_differ_and_come_back_by_seed(name, rng):
    model = adapted(name, rng)
    before = predict(model)
    samples = keras_fvae.predict_samples(model, family.X, 3, seed=5)
    assert np.abs(np.diff(samples, axis=0)).max(axis=(1, 2)).min() > 1e-4
    assert np.abs(samples - before).max() > 1e-4
    again = keras_fvae.predict_samples(model, family.X, 3, seed=5)
    np.testing.assert_array_equal(samples, again)
    others = keras_fvae.predict_samples(model, family.X, 3, seed=6)
    assert np.abs(samples - others).max() > 1e-4
    np.testing.assert_array_equal(predict(model), before)


def test_training_draws_what_it_would_have_drawn():
    def losses(samples):
        model = adapted("FVAE-LoRA", np.random.default_rng(3))
        if samples:
            keras_fvae.predict_samples(model, family.X, 2)
        return family.train(model, epochs=1)

    assert losses(samples=True) == losses(samples=False)


def test_blocks_that_are_nested_or_overlap(rng):
    model = adapted("FVAE-LoRA", rng)
    generator = model.get_layer("query").adapter.fvae.seed_generator
    before = to_numpy(generator.state)
    with keras_fvae.adapter_sampling(model, seed=2):
        expected = predict(model)
    with contextlib.ExitStack() as stack:
        with keras_fvae.adapter_sampling(model, seed=1):
            with keras_fvae.adapter_sampling(model, seed=3):
                pass
            stack.enter_context(keras_fvae.adapter_sampling(model, seed=2))
        # The one that was entered last is still there.
        np.testing.assert_array_equal(predict(model), expected)
    np.testing.assert_array_equal(to_numpy(generator.state), before)


def test_dropout_of_the_model_stays_off(rng):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dropout(0.9),
            keras.layers.Dense(3, name="query"),
        ]
    )
    keras_fvae.enable_fvae_lora(model, rank=2, decoder_units=(4,))
    x = np.ones((64, 6), "float32")
    # B is small at first, and nothing else is drawn.
    samples = keras_fvae.predict_samples(model, x, 2)
    assert np.abs(samples - model.predict(x, verbose=0)).max() < 0.3
    with keras_fvae.adapter_sampling(model):
        assert model.losses == []


def test_several_inputs_and_outputs(rng):
    inputs = keras.Input((5, 6), name="tokens")
    x = keras.layers.Dense(4, name="query")(inputs)
    model = keras.Model(inputs, {"one": x, "two": [x[:, 0], x[:, 1]]})
    keras_fvae.enable_fvae_lora(model, rank=2, decoder_units=(4,))
    samples = keras_fvae.predict_samples(model, {"tokens": family.X}, 2)
    assert samples["one"].shape == (2, 8, 5, 4)
    assert samples["two"][1].shape == (2, 8, 4)
    np.testing.assert_array_equal(samples["two"][0], samples["one"][:, :, 0])

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (family.X[4 * index : 4 * index + 4],)

    samples = keras_fvae.predict_samples(model, Batches(), 2)
    assert samples["one"].shape == (2, 8, 5, 4)


def test_generation_is_sampled(rng):
    model = small_models.make_causal_lm()
    keras_fvae.enable_fvae_lora(model.backbone, rank=2, decoder_units=(4,))
    move_adapters(model, rng, scale=2.0)
    model.compile(sampler="greedy")
    prompts, _ = small_models.data("causal_lm")
    prompts["padding_mask"][:, 3:] = 0

    def generate():
        return to_numpy(
            model.generate(prompts, stop_token_ids=None)["token_ids"]
        )

    plain = generate()
    samples = []
    for seed in (1, 2, 1):
        with keras_fvae.adapter_sampling(model, seed):
            samples.append(generate())
    assert (samples[0] != samples[1]).any()
    np.testing.assert_array_equal(samples[0], samples[2])
    np.testing.assert_array_equal(generate(), plain)


@pytest.mark.skipif(BACKEND == "torch", reason="It runs Python each time")
def test_nothing_is_compiled_for_each_sample(rng):
    counter = CallCounter()
    inputs = keras.Input((5, 6))
    model = adapted("FVAE-LoRA", rng)
    counted = keras.Model(inputs, model(counter(inputs)))
    keras_fvae.predict_samples(counted, family.X, 2)
    expected = counter.num_calls
    keras_fvae.predict_samples(counted, family.X, 3, seed=1)
    assert counter.num_calls == expected


@pytest.mark.parametrize("name", ["LoRA", "DoRA with gradient", "Shift"])
def test_methods_without_a_random_part_are_refused(name):
    model = family.adapt(family.make_model(), name)
    with pytest.raises(ValueError, match="all samples would be the same"):
        keras_fvae.predict_samples(model, family.X)


def test_bad_input_is_refused(rng):
    model = adapted("FVAE-LoRA", rng)
    generators = [
        layer.adapter.fvae.seed_generator
        for layer in model.layers
        if hasattr(layer, "adapter")
    ]
    states = [to_numpy(generator.state) for generator in generators]

    def refuse(error, match, model=model, x=family.X, **options):
        with pytest.raises(error, match=match):
            keras_fvae.predict_samples(model, x, **options)

    for number in (0, -1, 1.5, True, "3", None):
        refuse(ValueError, "num_samples", num_samples=number)
    for seed in (-1, 0.5, None):
        refuse(ValueError, "seed", seed=seed)
    refuse(TypeError, "generator", x=(batch for batch in [family.X]))
    if BACKEND == "torch":
        import torch

        x = torch.utils.data.DataLoader(family.X, batch_size=2, shuffle=True)
        refuse(ValueError, "shuffle=True", x=x)
    refuse(TypeError, "keras.Model", model=keras.layers.Dense(3))
    refuse(ValueError, "no adapted layer", model=family.make_model())
    with keras_fvae.adapter_disabled(model):
        refuse(ValueError, "turned off")
    for generator, state in zip(generators, states):
        np.testing.assert_array_equal(to_numpy(generator.state), state)
    keras_fvae.finalize_adapter(model)
    refuse(ValueError, "finalized")
    merged = adapted("linear FVAE-LoRA", rng)
    keras_fvae.merge_adapter(merged)
    refuse(ValueError, "no adapted layer", model=merged)
