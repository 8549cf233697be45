"""Flat-LoRA's noise, and how it grows."""

import warnings

import family
import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import JIT_COMPILE
from helpers import CallCounter
from helpers import move_adapters
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.methods import flat_lora

RHO = 0.5
SCHEDULE = keras_fvae.FlatLoRASchedule


def make_model(rng, width=4, units=3, layers=()):
    """One adapted layer, whose update is not 0."""
    query = keras.layers.Dense(units, use_bias=False, name="query")
    model = keras.Sequential([keras.Input((width,)), *layers, query])
    keras_fvae.enable_adapter(
        model, keras_fvae.FlatLoRAConfig(2, 4, rho=RHO, seed=1), "query"
    )
    move_adapters(model, rng)
    return model, query


def merged_norms(layer):
    arrays = layer.adapter.get_arrays()
    update = layer.config.scale * arrays["kernel_a"] @ arrays["kernel_b"]
    return np.linalg.norm(to_numpy(layer.kernel) + update, axis=0)


def fit(model, x, y, callbacks=(), **options):
    """With a learning rate of 0, so that the noise alone moves the loss."""
    model.compile(
        keras.optimizers.SGD(0.0), "mse", jit_compile=options.pop("jit", "auto")
    )
    options = {"epochs": 4, "batch_size": len(x), "verbose": 0, **options}
    return model.fit(x, y, callbacks=[*callbacks], **options).history["loss"]


def test_the_noise_is_that_of_the_merged_kernel(rng):
    width, units = 400, 6
    _, query = make_model(rng, width, units)
    query.adapter.set_progress(1.0)
    # Each row of the kernel twice: the noise is the same for all tokens.
    x = np.concatenate([np.eye(width, dtype="float32")] * 2)
    kernel = to_numpy(query(x))

    def draw():
        noise = to_numpy(query(x, training=True)) - kernel
        np.testing.assert_allclose(noise[:width], noise[width:], atol=1e-6)
        return noise[:width]

    first, second = draw(), draw()
    expected = RHO / np.sqrt(width) * merged_norms(query)
    np.testing.assert_allclose(first.std(axis=0), expected, rtol=0.2)
    assert (np.abs(first.mean(axis=0)) < 5 * expected / np.sqrt(width)).all()
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    query.adapter.set_progress(0.5)
    np.testing.assert_allclose(draw().std(axis=0), expected / 2, rtol=0.2)
    query.adapter.set_progress(0.0)
    np.testing.assert_allclose(draw(), 0, atol=1e-6)


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_it_grows_over_the_steps_of_fit(jit_compile, rng, monkeypatch):
    monkeypatch.setattr(
        flat_lora,
        "noise_and_masks",
        lambda shape, seed, width: (ops.ones((*shape, width)), []),
    )
    model, query = make_model(rng)
    x = rng.normal(size=(6, 4)).astype("float32")
    y = rng.normal(size=(6, 3)).astype("float32")
    base = to_numpy(query(x))
    std = RHO / np.sqrt(4) * merged_norms(query)
    factors = (1 - np.cos(np.pi * np.arange(4) / 4)) / 2
    expected = [
        np.square(base + x.sum(axis=1, keepdims=True) * f * std - y).mean()
        for f in factors
    ]
    for epoch in (0, 2):
        losses = fit(
            model, x, y, [SCHEDULE()], initial_epoch=epoch, jit=jit_compile
        )
        np.testing.assert_allclose(losses, expected[epoch:], rtol=1e-4)
    # Of two steps, each epoch has two of the factors.
    pairs = np.concatenate([x, x]), np.concatenate([y, y])
    losses = fit(
        model, *pairs, [SCHEDULE()], epochs=2, batch_size=6, shuffle=False
    )
    np.testing.assert_allclose(
        losses, np.reshape(expected, (2, 2)).mean(axis=1), rtol=1e-4
    )


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs eagerly here")
def test_nothing_is_compiled_again(rng):
    counts = []
    for callbacks in ([], [SCHEDULE()]):
        counter = CallCounter()
        model, _ = make_model(rng, layers=[counter])
        counter.num_calls = 0
        fit(model, np.ones((6, 4)), np.ones((6, 3)), callbacks, batch_size=2)
        counts.append(counter.num_calls)
    assert counts[0] == counts[1]


def test_a_fit_without_the_schedule_says_so(rng):
    """Each, also after one with it."""
    x, y = np.ones((6, 4)), np.ones((6, 3))
    model, _ = make_model(rng)
    for _ in range(2):
        with pytest.warns(UserWarning, match="pass.*FlatLoRASchedule") as w:
            fit(model, x, y, batch_size=2)
        assert sum("FlatLoRASchedule" in str(each.message) for each in w) == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*FlatLoRASchedule")
            fit(model, x, y, [SCHEDULE()])
            model.predict(x, verbose=0)
        with pytest.raises(family.Killed):
            fit(model, x, y, [SCHEDULE(), family.kill_before(0)])


def test_the_schedule_refuses_what_it_cannot_do(rng):
    x, y = np.ones((6, 4), "float32"), np.ones((6, 3), "float32")
    model, _ = make_model(rng)
    model.compile("sgd", "mse")

    def batches():
        while True:
            yield x, y

    with pytest.raises(ValueError, match="how many steps.*steps_per_epoch"):
        model.fit(batches(), callbacks=[SCHEDULE()], verbose=0)
    model.fit(batches(), steps_per_epoch=2, callbacks=[SCHEDULE()], verbose=0)
    other = family.adapt(family.make_model(), "DropLoRA")
    other.compile("sgd", "mse")
    with pytest.raises(ValueError, match="adapted by Flat-LoRA.*by DropLoRA"):
        other.fit(family.X, family.X[:, 0, :3], callbacks=[SCHEDULE()])


def test_there_is_nothing_to_sample(rng):
    model, _ = make_model(rng)
    with pytest.raises(ValueError, match="Flat-LoRA .* at inference"):
        keras_fvae.predict_samples(model, np.ones((6, 4)))


@pytest.mark.always_one_backend
def test_bad_settings():
    layer = keras_fvae.AdaptedDense(3, keras_fvae.FlatLoRAConfig(2))
    layer.build((None, 4))
    for wrong in (-0.1, 1.1, float("nan"), "0.1", None, True):
        with pytest.raises(ValueError, match=r"`share` must be a number in"):
            layer.adapter.set_progress(wrong)
    for wrong in (-0.1, float("nan"), "0.1", None):
        with pytest.raises(ValueError, match="`rho` must be a number >= 0"):
            keras_fvae.FlatLoRAConfig(rho=wrong)
