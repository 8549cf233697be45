"""Updates that weigh more, or less, when they are used."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import CallCounter
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy

import keras_fvae

CONFIGS = {
    "fvae_lora": keras_fvae.FVAELoRAConfig(2, decoder_units=(4,)),
    "linear_fvae_lora": keras_fvae.FVAELoRAConfig(
        2, decoder_units=(4,), encoder_units=()
    ),
    "lora": keras_fvae.LoRAConfig(2, alpha=3),
    "rslora": keras_fvae.RSLoRAConfig(2),
    "pissa": keras_fvae.PiSSAConfig(2),
}


def make_model(rng, config):
    counter = CallCounter()
    model = keras.Sequential(
        [keras.Input((5,)), counter, keras.layers.Dense(6, name="query")]
    )
    keras_fvae.enable_adapter(model, config)
    move_adapters(model, rng)
    return model, counter


def predict(model, x):
    return to_numpy(model(x, training=False)).astype("float64")


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 5)).astype("float32")


@pytest.mark.parametrize("method", CONFIGS)
def test_the_update_is_scaled(method, rng, x, tmp_path):
    model, _ = make_model(rng, CONFIGS[method])
    whole = predict(model, x)
    with keras_fvae.adapter_disabled(model):
        base = predict(model, x)
    for factor in (0.5, 2.0):
        with keras_fvae.adapter_scale(model, factor):
            np.testing.assert_allclose(
                predict(model, x), base + factor * (whole - base), atol=1e-4
            )
    np.testing.assert_array_equal(predict(model, x), whole)
    # For good, and what becomes of the model has it.
    keras_fvae.adapter_scale(model, 0.5)
    expected = predict(model, x)
    np.testing.assert_allclose(expected, (base + whole) / 2, atol=1e-4)
    state = keras_fvae.get_adapter(model)
    if method != "fvae_lora":
        keras_fvae.merge_adapter(model)
        np.testing.assert_allclose(predict(model, x), expected, atol=1e-5)
    else:
        keras_fvae.finalize_adapter(model)
        np.testing.assert_allclose(predict(model, x), expected, atol=1e-5)
    assert state.configs["query"].scale == 0.5 * CONFIGS[method].scale


def test_a_scale_is_compiled_once(rng, x):
    model, counter = make_model(rng, CONFIGS["lora"])
    model.compile("sgd", "mse", jit_compile=BACKEND == "jax")
    outputs, calls = {}, []
    for factor in (None, 0.5, None, 2.0, 0.5, 2.0, None):
        before = counter.num_calls
        if factor is None:
            output = model.predict(x, verbose=0)
        else:
            with keras_fvae.adapter_scale(model, factor):
                output = model.predict(x, verbose=0)
        np.testing.assert_array_equal(
            output, outputs.setdefault(factor, output)
        )
        calls.append(counter.num_calls - before)
    if BACKEND != "torch":
        assert [number > 0 for number in calls] == [
            *(True, True, False, True),
            *(False, False, False),
        ]
    assert np.abs(outputs[0.5] - outputs[2.0]).max() > 0.01


def test_training_inside_has_the_scale(rng, x):
    model, _ = make_model(rng, CONFIGS["lora"])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    targets = np.ones((4, 6))
    model.evaluate(x, targets, verbose=0)
    with keras_fvae.adapter_scale(model, 0.25):
        expected = np.square(predict(model, x) - 1).mean()
        loss = model.train_on_batch(x, targets)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    loss = model.evaluate(x, targets, verbose=0)
    assert loss == pytest.approx(
        np.square(predict(model, x) - 1).mean(), rel=1e-4
    )


def test_blocks_that_are_nested_or_overlap(rng, x):
    model, _ = make_model(rng, CONFIGS["lora"])
    layer, config = model.layers[-1], model.layers[-1].config
    with keras_fvae.adapter_scale(model, 0.3):
        with keras_fvae.adapter_scale(model, 7.0):
            pass
        assert layer.config == config.scaled(0.3)
    assert layer.config is config
    with contextlib.ExitStack() as stack:
        with keras_fvae.adapter_scale(model, 2.0):
            stack.enter_context(keras_fvae.adapter_scale(model, 0.5))
            assert layer.config.scale == pytest.approx(config.scale)
        assert layer.config.scale == pytest.approx(0.5 * config.scale)
    assert layer.config.scale == pytest.approx(config.scale)
    # For good, inside a block of another factor.
    with keras_fvae.adapter_scale(model, 2.0):
        keras_fvae.adapter_scale(model, 3.0)
    assert layer.config.scale == pytest.approx(3.0 * config.scale)


def test_what_is_removed_or_finalized_inside(rng, x):
    model, _ = make_model(rng, CONFIGS["lora"])
    with keras_fvae.adapter_scale(model, 0.5):
        keras_fvae.remove_adapter(model)
    model, _ = make_model(rng, CONFIGS["lora"])
    with keras_fvae.adapter_scale(model, 0.5):
        keras_fvae.finalize_adapter(model)
        expected = predict(model, x)
    np.testing.assert_array_equal(predict(model, x), expected)


def test_summaries_show_the_scale(rng):
    model, _ = make_model(rng, CONFIGS["rslora"])
    keras_fvae.adapter_scale(model, 0.5)
    text = str(keras_fvae.adapter_summary(model))
    assert text.startswith(
        "rsLoRA of rank 2, scale 0.707107 on 1 layers, trained"
    )


def test_methods_without_an_alpha(rng):
    model, _ = make_model(rng, keras_fvae.HiRAConfig(2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="HiRA has no `alpha`"):
        keras_fvae.adapter_scale(model, 0.5)
    assert snapshot(model) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), "2", None])
def test_factors_that_are_refused(factor, rng):
    model, _ = make_model(rng, CONFIGS["lora"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="`factor` must be a positive number"):
        keras_fvae.adapter_scale(model, factor)
    assert snapshot(model) == before


def test_new_adapters_have_steps_of_their_own(rng, x):
    model, _ = make_model(rng, CONFIGS["lora"])
    model.compile("sgd", "mse", jit_compile=BACKEND == "jax")
    keras_fvae.adapter_scale(model, 2.0)
    model.predict(x, verbose=0)
    keras_fvae.remove_adapter(model)
    keras_fvae.enable_adapter(model, CONFIGS["lora"])
    move_adapters(model, rng)
    for factor in (1.0, 2.0):
        with keras_fvae.adapter_scale(model, factor):
            np.testing.assert_allclose(
                model.predict(x, verbose=0), predict(model, x), atol=1e-4
            )
        np.testing.assert_allclose(
            model.predict(x, verbose=0), predict(model, x), atol=1e-4
        )


def test_a_finalized_dora_is_not_scaled(rng):
    model, _ = make_model(rng, keras_fvae.DoRAConfig(2))
    keras_fvae.finalize_adapter(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be scaled.*Scale it before"):
        keras_fvae.adapter_scale(model, 2.0)
    assert snapshot(model) == before
