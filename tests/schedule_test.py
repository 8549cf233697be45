import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import JIT_COMPILE
from helpers import to_numpy
from monitor_test import fit
from monitor_test import make_model

import keras_fvae
from keras_fvae.model.lookup import adapted_layers


@pytest.fixture
def xy(rng):
    x = rng.normal(size=(12, 5)).astype("float32")
    return x, rng.normal(size=(12, 3)).astype("float32")


def weights_of(model):
    return [
        to_numpy(layer.adapter.fvae.coefficients.variable).tolist()
        for layer in adapted_layers(model)
    ]


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_the_loss_follows_the_schedules(jit_compile, xy, rng):
    model = make_model(rng, reconstruction_weight=0.5)
    task = np.square(model.predict(xy[0], verbose=0) - xy[1]).mean()
    steps = []

    def elbo_weight(step):
        steps.append(step)
        return 0.1 * (step // 3 + 1)

    schedule = keras_fvae.FVAELoRASchedule(
        elbo_weight=elbo_weight,
        kl_weight=keras.optimizers.schedules.PiecewiseConstantDecay(
            [2], [1.0, 3.0]
        ),
        gamma_weight=lambda step: (0.5, 0.25 if step < 3 else 0.0),
    )
    history = fit(
        model,
        xy,
        [schedule, keras_fvae.FVAELoRAMonitor()],
        jit_compile=jit_compile,
        epochs=2,
    )
    # Three steps an epoch.
    assert steps == [0, 1, 2, 3, 4, 5]
    part = np.array([0.1, 0.2]) * history["fvae_loss"]
    np.testing.assert_allclose(history["loss"], task + part, rtol=1e-4)
    # In the second epoch b = 3 and c = (0.5, 0).
    x = np.split(xy[0], 3)
    query, value, _ = model.layers
    losses = []
    for batch in x:
        for layer, tokens in ((query, batch), (value, query(batch))):
            out = layer.adapter.fvae(tokens)
            z1, log_variance = to_numpy(out.z1_mean), out.z1_log_variance
            second_moment = z1**2 + np.exp(to_numpy(log_variance))
            log_p1 = -0.5 * (second_moment + np.log(2 * np.pi)).sum(-1).mean()
            losses.append(
                0.5 * to_numpy(out.terms["negative_log_likelihood"])
                + 3 * to_numpy(out.terms["kl_z1"])
                + 0.5 * log_p1
            )
    assert history["fvae_loss"][1] == pytest.approx(np.mean(losses), rel=2e-3)
    np.testing.assert_allclose(weights_of(model), [[0.2, 3.0, 0.5, 0.0]] * 2)


class CountTraces(keras.layers.Layer):
    """Counts how often Python comes by."""

    count = 0

    def call(self, x, training=None):
        self.count += bool(training)
        return x


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs eagerly here")
def test_nothing_is_compiled_again(xy):
    counter = CountTraces()
    model = keras.Sequential(
        [keras.Input((5,)), counter, keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_fvae_lora(model, rank=2, decoder_units=(4,))
    fit(model, xy, [], epochs=2)
    expected, counter.count = counter.count, 0
    schedule = keras_fvae.FVAELoRASchedule(elbo_weight=lambda s: 0.1 * s)
    fit(model, xy, [schedule], epochs=2)
    assert counter.count == expected


def test_a_second_fit_goes_on_with_the_optimizers_steps(xy, rng):
    model = make_model(rng)
    steps = []
    schedule = keras_fvae.FVAELoRASchedule(
        elbo_weight=lambda step: steps.append(step) or 0.1
    )
    fit(model, xy, [schedule])
    model.fit(*xy, batch_size=6, callbacks=[schedule], verbose=0)
    assert steps == [0, 1, 2, 3, 4]


def test_files_keep_the_weights_of_the_config(xy, rng, tmp_path):
    model = make_model(rng)
    before = weights_of(model)
    fit(model, xy, [keras_fvae.FVAELoRASchedule(elbo_weight=lambda step: 1.0)])
    assert weights_of(model) != before
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert weights_of(loaded) == before
    np.testing.assert_array_equal(
        to_numpy(loaded(xy[0])), to_numpy(model(xy[0]))
    )


def test_weights_that_are_not_allowed_stop_the_fit(xy, rng):
    model = make_model(rng)
    # Without a kl_weight above it, gamma has no bound.
    schedule = keras_fvae.FVAELoRASchedule(
        kl_weight=lambda step: 1.0 if step < 2 else 0.1
    )
    with pytest.raises(ValueError, match="At step 2: .*gamma_weight"):
        fit(model, xy, [schedule])
    assert [kl for _, kl, _, _ in weights_of(model)] == [1.0, 1.0]
    for value in (-1.0, float("nan")):
        schedule = keras_fvae.FVAELoRASchedule(
            elbo_weight=lambda step, v=value: v
        )
        with pytest.raises(ValueError, match="At step 0: `elbo_weight` must"):
            fit(model, xy, [schedule])


@pytest.mark.parametrize(
    "name, value", [("elbo_weight", None), ("elbo_weight", (1, 2)),
                    ("kl_weight", "a"), ("gamma_weight", (1, "a")),
                    ("elbo_weight", "0.5"), ("kl_weight", True),
                    ("gamma_weight", (1, False)), ("elbo_weight", [])],
)  # fmt: skip
def test_what_is_no_number_stops_the_fit(name, value, xy, rng):
    schedule = keras_fvae.FVAELoRASchedule(**{name: lambda step: value})
    with pytest.raises(TypeError, match=f"step 0: the schedule of `{name}`"):
        fit(make_model(rng), xy, [schedule])


def test_bad_arguments():
    with pytest.raises(ValueError, match="needs a schedule for one of"):
        keras_fvae.FVAELoRASchedule()
    with pytest.raises(TypeError, match="`kl_weight` must be a"):
        keras_fvae.FVAELoRASchedule(kl_weight=0.1)


def test_a_model_without_adapters_is_refused(xy):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    schedule = keras_fvae.FVAELoRASchedule(elbo_weight=lambda step: 1.0)
    with pytest.raises(ValueError, match="no adapted layer"):
        fit(model, xy, [schedule])


@pytest.mark.one_backend
def test_each_schedule_changes_its_own_weights_alone():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_fvae_lora(model, rank=2)
    model.compile("adam", "mse")
    x, y = np.ones((8, 6)), np.ones((8, 3))
    schedules = [
        keras_fvae.FVAELoRASchedule(elbo_weight=lambda step: 0.5),
        keras_fvae.FVAELoRASchedule(kl_weight=lambda step: 9.0),
    ]
    model.fit(x, y, callbacks=schedules, verbose=0)
    coefficients = model.get_layer("query").adapter.fvae.coefficients
    assert to_numpy(coefficients.variable)[:2].tolist() == [0.5, 9.0]
    # And in another `fit`.
    later = keras_fvae.FVAELoRASchedule(kl_weight=lambda step: 2.0)
    model.fit(x, y, callbacks=[later], verbose=0)
    assert to_numpy(coefficients.variable)[:2].tolist() == [0.5, 2.0]
