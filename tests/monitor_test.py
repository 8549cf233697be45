import csv
import math
import warnings

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import move_adapters
from helpers import remove_latent_noise
from helpers import text_inputs
from helpers import to_numpy

import keras_fvae
from keras_fvae.methods.fvae.layout import REFERENCE_STD
from keras_fvae.model.lookup import adapted_layers

TERMS = ["negative_log_likelihood", "kl_z1", "gamma", "wasserstein"]


def make_model(rng, **options):
    """A quiet model: its latents are the means, whatever is drawn."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, activation="tanh", name="query"),
            keras.layers.Dense(6, activation="tanh", name="value"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    config = {
        "rank": 2,
        "decoder_units": (4,),
        "dropout": 0.0,
        "elbo_weight": 1e-3,
        "seed": 0,
        **options,
    }
    keras_fvae.enable_fvae_lora(model, **config)
    move_adapters(model, rng)
    remove_latent_noise(model)
    return model


@pytest.fixture
def xy(rng):
    x = rng.normal(size=(12, 5)).astype("float32")
    return x, rng.normal(size=(12, 3)).astype("float32")


def fit(model, xy, callbacks, learning_rate=0.0, **options):
    model.compile(
        keras.optimizers.SGD(learning_rate),
        "mse",
        jit_compile=options.pop("jit_compile", BACKEND == "jax"),
    )
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(*xy, callbacks=callbacks, **options).history


def inputs_of_layers(model, x):
    """What each adapted layer is called on."""
    query, value, _ = model.layers
    return {query: x, value: to_numpy(query(x))}


def expected_means(layer, x):
    """The terms of a layer, from the FVAE and NumPy."""
    batches = np.split(x, 3)
    outs = [layer.adapter.fvae(batch) for batch in batches]
    terms = {
        name: np.mean([to_numpy(out.terms[name]) for out in outs])
        for name in TERMS
    }
    terms["fvae_loss"] = np.mean([to_numpy(out.loss) for out in outs])
    means = to_numpy(layer.adapter.fvae(x).z1_mean)
    terms["active_units"] = (means.var(axis=0) > 0.01).sum()
    noise = np.exp([to_numpy(out.z1_log_variance) for out in outs])
    terms["signal_to_noise"] = means.var(axis=0).mean() / noise.mean()
    variance = len(batches) * x.var(axis=0).sum()
    # Of the likelihood of a Gaussian, the squared error is what is left.
    scale = layer.adapter.fvae.get_reference_weights()[REFERENCE_STD] + 1e-5
    assert np.ptp(scale) < 1e-6
    constant = len(scale) * (np.log(scale[0]) + 0.5 * np.log(2 * np.pi))
    squared_error = np.sum(
        [
            to_numpy(out.terms["negative_log_likelihood"]) - constant
            for out in outs
        ]
    ) * (2 * scale[0] ** 2)
    terms["explained_variance"] = 1 - squared_error / variance
    return terms


# JAX would take long without.
@pytest.mark.parametrize(
    "jit_compile", sorted({BACKEND == "jax", BACKEND != "torch"})
)
def test_the_terms_are_those_of_the_fvae(jit_compile, xy, rng):
    model = make_model(rng)
    for layer in adapted_layers(model):
        weights = layer.adapter.fvae.get_reference_weights()
        weights[REFERENCE_STD] = np.full_like(weights[REFERENCE_STD], 0.7)
        layer.adapter.fvae.set_reference_weights(weights)
    monitor = keras_fvae.FVAELoRAMonitor(per_layer=True)
    history = fit(model, xy, [monitor], jit_compile=jit_compile, epochs=2)
    expected = {
        layer: expected_means(layer, x)
        for layer, x in inputs_of_layers(model, xy[0]).items()
    }
    names = [
        *("fvae_loss", *TERMS, "active_units", "signal_to_noise"),
        "explained_variance",
    ]
    for name in names:
        for layer, terms in expected.items():
            np.testing.assert_allclose(
                history[f"{layer.path}/{name}"], terms[name], rtol=2e-3
            )
        mean = np.mean([terms[name] for terms in expected.values()])
        np.testing.assert_allclose(history[name], mean, rtol=2e-3)
    task = np.square(model.predict(xy[0], verbose=0) - xy[1]).mean()
    np.testing.assert_allclose(
        history["loss"], task + 1e-3 * np.array(history["fvae_loss"]), rtol=1e-4
    )


def test_the_task_loss_is_what_is_left_of_the_loss(xy, rng):
    """Also where the weight of the ELBO changes from step to step."""
    model = make_model(rng, elbo_weight=0.5)
    schedule = keras_fvae.FVAELoRASchedule(
        elbo_weight=lambda step: 0.1 * (1 + step)
    )
    history = fit(model, xy, [schedule, keras_fvae.FVAELoRAMonitor()], epochs=2)
    task = np.square(model.predict(xy[0], verbose=0) - xy[1]).mean()
    np.testing.assert_allclose(history["task_loss"], task, rtol=1e-3)
    assert np.abs(np.array(history["loss"]) - task).min() > 0.1


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_layers_do_not_flood_the_progress_bar(verbose, xy, rng, capsys):
    model = make_model(rng)
    monitor = keras_fvae.FVAELoRAMonitor(per_layer=True)
    history = fit(model, xy, [monitor], epochs=2, verbose=verbose)
    path = adapted_layers(model)[0].path
    assert len(history[f"{path}/kl_z1"]) == 2
    printed = capsys.readouterr().out
    assert path not in printed
    assert ("kl_z1" in printed) == (verbose > 0)


def test_every_log_of_keras_has_the_terms(xy, rng, tmp_path, capsys):
    model = make_model(rng)
    callbacks = [
        keras_fvae.FVAELoRAMonitor(),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path / "board"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.weights.h5", monitor="kl_z1", save_best_only=True,
            mode="min", save_weights_only=True,
        ),
    ]  # fmt: skip
    history = fit(model, xy, callbacks, epochs=2, verbose=2, validation_data=xy)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kl_z1"]) for row in rows] == pytest.approx(
        history["kl_z1"]
    )
    assert "active_units: " in capsys.readouterr().out
    [board] = (tmp_path / "board" / "train").iterdir()
    assert b"epoch_explained_variance" in board.read_bytes()
    assert (tmp_path / "best.weights.h5").is_file()
    # Only what trains has them: in validation there is no ELBO.
    assert "val_loss" in history
    assert not [name for name in history if name.startswith("val_kl")]


def test_the_monitor_changes_nothing_and_leaves_nothing(rng, xy):
    with_monitor = make_model(rng)
    start = with_monitor.get_weights()
    variables = [v.path for v in with_monitor.variables]
    first = fit(
        with_monitor, xy, [keras_fvae.FVAELoRAMonitor()], 0.01, epochs=2
    )
    assert [v.path for v in with_monitor.variables] == variables
    without = make_model(rng)
    without.set_weights(start)
    second = fit(without, xy, [], 0.01, epochs=2)
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)
    for one, other in zip(with_monitor.get_weights(), without.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not {*TERMS} & {*fit(with_monitor, xy, [])}


@pytest.mark.one_backend
def test_padding_is_left_out(bert, rng):
    bert.backbone.enable_fvae_lora(rank=2, decoder_units=(4,), dropout=0.0)
    move_adapters(bert, rng)
    remove_latent_noise(bert)
    bert.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")

    def terms(length):
        x = text_inputs(np.random.default_rng(0), (4, 6))
        x = {k: np.pad(v, [(0, 0), (0, length - 6)]) for k, v in x.items()}
        history = bert.fit(
            x,
            np.arange(4) % 3,
            callbacks=[keras_fvae.FVAELoRAMonitor()],
            verbose=0,
        ).history
        history.pop("loss")
        return history

    expected = terms(6)
    assert expected["explained_variance"][0] != 0
    for name, value in terms(9).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4)


def messages(model, xy, monitor=None, **options):
    monitor = monitor or keras_fvae.FVAELoRAMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, xy, [monitor], **options)
    return [
        str(w.message)
        for w in caught
        if str(w.message)[:2] in ("z1", "Th", "Tr")
    ]


def test_no_warning_where_all_is_well(xy, rng):
    model = make_model(rng, elbo_weight=1e-4)
    monitor = keras_fvae.FVAELoRAMonitor()
    assert messages(model, xy, monitor, epochs=3, learning_rate=0.01) == []
    assert {*monitor.health.values()} == {"fine"}


def test_posterior_collapse(xy, rng):
    model = make_model(rng, elbo_weight=1e-4)
    # As it is at the start, when z1 is its prior: no collapse if it moves on.
    for layer in adapted_layers(model):
        fvae = layer.adapter.fvae
        fvae.set_reference_weights(
            {
                name: weight * 0 if "Encoder" in name else weight
                for name, weight in fvae.get_reference_weights().items()
            }
        )
    assert messages(model, xy, epochs=1) == []
    [message] = messages(model, xy, epochs=4)
    assert "collapsed to its prior" in message
    assert all(layer.path in message for layer in adapted_layers(model))
    assert "`kl_weight`" in message


def test_z1_that_drowns_in_its_noise(xy, rng):
    model = make_model(rng, elbo_weight=1e-4)
    for layer in adapted_layers(model):
        fvae = layer.adapter.fvae
        weights = fvae.get_reference_weights()
        weights["views_conditionalGaussianEncoders_list.0.logvar.bias"][:] = 5
        fvae.set_reference_weights(weights)
    monitor = keras_fvae.FVAELoRAMonitor()
    [message] = messages(model, xy, monitor, epochs=3)
    assert "drowns in its noise" in message
    assert "learning rate" in message
    paths = [layer.path for layer in adapted_layers(model)]
    assert monitor.health == dict.fromkeys(paths, "drowned")


def test_what_is_not_finite_is_said(xy, rng):
    model = make_model(rng)
    monitor = keras_fvae.FVAELoRAMonitor()
    found = messages(model, xy, monitor, epochs=2, learning_rate=1e30)
    assert any("diverged" in message for message in found)
    assert {*monitor.health.values()} == {"diverged"}


@pytest.mark.one_backend
@pytest.mark.parametrize("epochs", [1, 4])
def test_divergence_that_stays_finite_is_said(epochs, xy, rng):
    model = make_model(rng)
    monitor = keras_fvae.FVAELoRAMonitor()
    model.compile(keras.optimizers.Adam(5.0), "mse")
    with pytest.warns(UserWarning, match="Training diverged.*learning rate"):
        history = model.fit(
            *xy, epochs=epochs, batch_size=4, verbose=0, callbacks=[monitor]
        ).history
    assert np.isfinite(history["loss"]).all()
    assert "diverged" in monitor.health.values()


@pytest.mark.one_backend
def test_one_row_a_batch_has_its_variance_over_the_epoch(xy, rng):
    x, y = xy
    shares = []
    model = make_model(rng)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    for batch_size in (1, len(x)):
        history = model.fit(
            x, y, batch_size=batch_size, verbose=0,
            callbacks=[keras_fvae.FVAELoRAMonitor()],
        ).history  # fmt: skip
        shares += history["explained_variance"]
    assert shares[0] != 0
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-3)


def test_a_decoder_scale_at_its_floor(xy, rng):
    model = make_model(rng, elbo_weight=1e-12)
    path, fvae = model.layers[1].path, model.layers[1].adapter.fvae
    weights = fvae.get_reference_weights()
    weights[REFERENCE_STD][2] = 1e-9
    fvae.set_reference_weights(weights)
    [message] = messages(model, xy, epochs=3)
    assert f"scale is at its floor of 1e-05 in '{path}'" in message


def test_an_elbo_that_outweighs_the_task(xy, rng):
    model = make_model(rng, elbo_weight=10.0)
    [message] = messages(model, xy, epochs=3)
    assert "outweighs the task" in message
    assert "`elbo_weight`" in message


def test_a_model_without_adapters_is_refused(xy):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="no adapted layer"):
        fit(model, xy, [keras_fvae.FVAELoRAMonitor()])


def test_a_layer_that_is_called_twice_counts_by_the_mean(rng, xy):
    inputs = keras.Input((5,))
    layer = keras.layers.Dense(5, name="query")
    model = keras.Model(inputs, layer(layer(inputs)))
    keras_fvae.enable_fvae_lora(model, rank=2, decoder_units=(4,), dropout=0.0)
    move_adapters(model, rng)
    remove_latent_noise(model)
    x = xy[0]
    history = fit(model, (x, x), [keras_fvae.FVAELoRAMonitor()], batch_size=12)
    fvae = layer.adapter.fvae
    losses = [to_numpy(fvae(v).loss) for v in (x, to_numpy(layer(x)))]
    assert history["fvae_loss"][0] == pytest.approx(np.mean(losses), rel=1e-3)
    assert not math.isnan(history["loss"][0])


def test_the_task_loss_of_batches_of_different_sizes(rng):
    """Keras's mean of the loss has the batches by their size."""
    model = keras.Sequential(
        [keras.Input((4, 6)), keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_fvae_lora(
        model, rank=2, elbo_weight=0.1, decoder_units=(4,)
    )
    # Nothing moves, so that the loss is the same at each step.
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = rng.normal(size=(9, 4, 6)) * np.linspace(1, 9, 9)[:, None, None]
    y = rng.normal(size=(9, 4, 3))
    history = model.fit(
        x,
        y,
        batch_size=8,
        shuffle=False,
        callbacks=[keras_fvae.FVAELoRAMonitor()],
        verbose=0,
    ).history
    expected = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(history["task_loss"], expected, rtol=1e-3)


@pytest.mark.one_backend
def test_layers_of_the_same_path_each_have_a_name(rng):
    def tower(name):
        inputs = keras.Input((6,))
        outputs = keras.layers.Dense(3, name="query")(inputs)
        return keras.Model(inputs, outputs, name=name)

    inputs = keras.Input((6,))
    model = keras.Model(inputs, [tower("a")(inputs), tower("b")(0 * inputs)])
    keras_fvae.enable_fvae_lora(model, rank=2)
    model.compile("adam", ["mse", "mse"])
    monitor = keras_fvae.FVAELoRAMonitor(per_layer=True)
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 3))
    history = model.fit(x, [y, y], callbacks=[monitor], verbose=0).history
    assert [*monitor.health] == ["query", "query:2"]
    # All inputs of the second are 0, and so the same.
    assert history["query/active_units"][0] >= 0
    assert history["query:2/active_units"] == [0]


@pytest.mark.one_backend
def test_a_killed_run_counts_no_longer(rng):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_fvae_lora(model, rank=2)
    model.compile("adam", "mse")
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 3))
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(
            x, y, callbacks=[keras_fvae.FVAELoRAMonitor(), stop], verbose=0
        )
    assert model.get_layer("query").adapter.fvae.totals is None
