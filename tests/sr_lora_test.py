"""SRLoRA's restarts, whose definition is this package's own."""

import keras
import numpy as np
import pytest
from family import Killed
from family import X
from family import Y
from family import adapt
from family import frozen_bytes
from family import is_target
from family import kill_before
from family import make_model
from family import predict
from helpers import to_numpy

import keras_fvae
from keras_fvae.layers.adapted import read_kernel
from keras_fvae.model import lookup


def adapted(rank=2, num_fused=2):
    model = make_model()
    keras_fvae.enable_adapter(
        model,
        keras_fvae.SRLoRAConfig(rank, 4, num_fused=num_fused),
        is_target,
        trainable_layer_names=["head"],
    )
    return model


def fit(model, callbacks, epochs=4, optimizer=None):
    model.compile(
        optimizer or keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model.fit(
        X,
        Y,
        batch_size=2,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )


@pytest.mark.one_backend
def test_fusing_changes_nothing_and_starts_the_next_direction():
    model = adapted()
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(weight + 0.2 * rng.normal(size=weight.shape))
    before = predict(model)
    layer = model.get_layer("up")
    adapter, kernel = layer.adapter, read_kernel(layer)
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    for number, rank in enumerate((1, 0)):
        old = adapter.get_arrays()
        adapter.fuse(rank, kernel)
        assert adapter.num_fused == number + 1
        np.testing.assert_allclose(predict(model), before, atol=2e-6)
        new = adapter.get_arrays()
        pair = np.outer(new["kernel_a"][:, rank], new["kernel_b"][rank])
        # By a scale of 2.
        expected = s[2 + number] * np.outer(u[:, 2 + number], vt[2 + number])
        np.testing.assert_allclose(2 * pair, expected, atol=1e-6)
        other = 1 - rank
        np.testing.assert_array_equal(
            new["kernel_a"][:, other], old["kernel_a"][:, other]
        )
    keras_fvae.merge_adapter(model)
    np.testing.assert_allclose(predict(model), before, atol=1e-5)


def test_restarts_while_it_trains():
    model = adapted(num_fused=3)
    frozen = frozen_bytes(model)
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)
    variables = [v.path for v in optimizer.variables]
    history = fit(
        model, [keras_fvae.SRLoRARestarter(3)], optimizer=optimizer
    ).history
    # After 3, 6, 9 and 12 of 16 updates; `up` and the others have room for 3.
    assert history["fused_ranks"] == [1, 2, 3, 3]
    assert frozen_bytes(model) == frozen
    assert [v.path for v in optimizer.variables] == variables
    assert history["loss"][-1] < history["loss"][0]
    assert "experimental" in str(keras_fvae.adapter_summary(model))


@pytest.mark.one_backend
def test_the_least_important_pair_is_fused():
    """By closed form: of one step of SGD the averages are known."""
    model = adapted(rank=3, num_fused=1)
    adapters = [layer.adapter for layer in lookup.adapted_layers(model)]
    before = [a.get_arrays() for a in adapters]
    rate = 0.1
    stop = keras_fvae.SRLoRARestarter(interval=1, total_steps=2)
    fit(model, [stop], epochs=1, optimizer=keras.optimizers.SGD(rate))
    # What the first step made of A and B is kept where they were fused, and
    # in the others changed once more by each of the other three.
    for adapter, old in zip(adapters, before):
        fused = to_numpy(adapter.fused_kernel_a)[:, 1]
        chosen = [
            rank
            for rank in range(3)
            if np.array_equal(old["kernel_a"][:, rank], fused)
        ]
        assert len(chosen) == 1
    # The same step, by hand.
    model = adapted(rank=3, num_fused=1)
    adapters_again = [la.adapter for la in lookup.adapted_layers(model)]
    model.compile(
        keras.optimizers.SGD(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.train_on_batch(X[:2], Y[:2])
    for adapter, again, old in zip(adapters, adapters_again, before):
        scores = np.zeros(3)
        for name, axis in (("kernel_a", 0), ("kernel_b", 1)):
            weight = again.get_arrays()[name]
            gradient = (old[name] - weight) / rate
            value = np.abs(weight * gradient)
            sensitivity = 0.15 * value
            uncertainty = 0.15 * np.abs(value - sensitivity)
            scores += (sensitivity * uncertainty).mean(axis=axis)
        rank = int(np.argmin(scores))
        np.testing.assert_array_equal(
            to_numpy(adapter.fused_kernel_a)[:, 1], old["kernel_a"][:, rank]
        )
        np.testing.assert_allclose(
            to_numpy(adapter.fused_kernel_a)[:, 0],
            again.get_arrays()["kernel_a"][:, rank],
            rtol=1e-5,
        )


@pytest.mark.one_backend
def test_a_killed_run_goes_on(tmp_path):
    def run(kill_after=None):
        model = adapted()
        callbacks = [
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras_fvae.SRLoRARestarter(5),
            kill_before(kill_after),
        ]
        fit(model, callbacks)
        return [
            layer.adapter.get_arrays() for layer in lookup.adapted_layers(model)
        ]

    expected = run()
    with pytest.raises(Killed):
        run(kill_after=2)
    for found, arrays in zip(run(), expected):
        assert arrays["fused_kernel_a"].any()
        for name, array in arrays.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6)


@pytest.mark.one_backend
def test_a_kernel_has_only_so_many_directions():
    model = adapted(rank=6, num_fused=4)
    assert [la.adapter.max_fused for la in lookup.adapted_layers(model)] == [
        0
    ] * 3
    history = fit(model, [keras_fvae.SRLoRARestarter(1)]).history
    assert history["fused_ranks"][-1] == 0


@pytest.mark.one_backend
def test_what_cannot_be_right_is_refused():
    for wrong in (0, 1.5, None):
        with pytest.raises(ValueError, match="num_fused"):
            keras_fvae.SRLoRAConfig(4, num_fused=wrong)
    with pytest.raises(ValueError, match="interval"):
        keras_fvae.SRLoRARestarter(0)
    with pytest.raises(ValueError, match="adapted by SRLoRA.*by LoRA"):
        fit(adapt(make_model(), "LoRA"), [keras_fvae.SRLoRARestarter()])
    with pytest.warns(UserWarning, match="SRLoRARestarter"):
        fit(adapted(), [], epochs=1)
