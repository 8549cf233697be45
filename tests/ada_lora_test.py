"""AdaLoRA's allocation of ranks, through `fit`."""

import json
import warnings

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
from helpers import ROOT
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.model import lookup

REFERENCE = ROOT / "tests" / "reference" / "methods" / "adalora_allocation.npz"


def adapted(rank=4, **kwargs):
    model = make_model()
    keras_fvae.enable_adapter(
        model,
        keras_fvae.AdaLoRAConfig(rank, seed=0, **kwargs),
        is_target,
        trainable_layer_names=["head"],
    )
    return model


def compile_model(model, optimizer=None, **kwargs):
    model.compile(
        optimizer or keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )


def singular_values(model):
    return np.stack(
        [
            to_numpy(layer.adapter.singular_values)
            for layer in lookup.adapted_layers(model)
        ]
    )


class Recorder(keras.callbacks.Callback):
    """What is there after each epoch, of one step."""

    def __init__(self):
        super().__init__()
        self.weights, self.state = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(
            {
                name: np.stack(
                    [
                        to_numpy(getattr(layer.adapter, name))
                        for layer in lookup.adapted_layers(self.model)
                    ]
                )
                for name in ("kernel_a", "kernel_b", "singular_values")
            }
        )
        self.state.append(
            {v.path: to_numpy(v) for v in self.model.optimizer.variables}
        )


def reference_model(file, settings):
    x = inputs = keras.Input((8,))
    for name, activation in (("a", "tanh"), ("b", "tanh"), ("c", None)):
        x = keras.layers.Dense(8, activation, use_bias=False, name=name)(x)
    model = keras.Model(inputs, x)
    for layer, kernel in zip(model.layers[1:], file["kernels"]):
        layer.kernel.assign(kernel)
    config = keras_fvae.AdaLoRAConfig(
        settings["init_r"],
        settings["alpha"],
        target_rank=settings["target_r"],
        orthogonality_weight=settings["orth_reg_weight"],
    )
    keras_fvae.enable_adapter(model, config, ["a", "b", "c"])
    for index, layer in enumerate(model.layers[1:]):
        adapter = layer.adapter
        adapter.kernel_a.assign(file["initial_lora_a"][index])
        adapter.kernel_b.assign(file["initial_lora_b"][index])
        adapter.singular_values.assign(file["initial_lora_e"][index])
    return model


@pytest.mark.parametrize("accumulated", [False, True])
def test_it_allocates_as_the_authors_do(accumulated):
    """E, A and B after each of twelve updates, and the averages of the last.

    Accumulated, each update takes two steps on the same data.
    """
    with np.load(REFERENCE) as loaded:
        file = {name: loaded[name] for name in loaded}
    settings = json.loads(str(file["config"]))
    model = reference_model(file, settings)
    model.compile(
        keras.optimizers.SGD(
            settings["learning_rate"],
            gradient_accumulation_steps=2 if accumulated else None,
        ),
        lambda y, predicted: 0.5 * ops.mean(ops.square(predicted - y)),
    )
    allocator = keras_fvae.AdaLoRAAllocator(
        settings["tinit"], settings["tfinal"], settings["deltaT"]
    )
    recorder = Recorder()
    model.fit(
        np.concatenate([file["x"]] * (1 + accumulated)),
        np.concatenate([file["target"]] * (1 + accumulated)),
        batch_size=len(file["x"]),
        epochs=settings["total_step"],
        shuffle=False,
        callbacks=[allocator, recorder],
        verbose=0,
    )
    for step, weights in enumerate(recorder.weights):
        for letter, name in zip("abe", weights):
            np.testing.assert_allclose(
                weights[name],
                file[f"lora_{letter}" if letter != "e" else "lora_e"][step],
                rtol=1e-4,
                atol=2e-6,
                err_msg=f"{name} after step {step + 1}",
            )
    last = settings["total_step"] - settings["tfinal"] - 2
    state = recorder.state[last]
    for average in ("sensitivity", "uncertainty"):
        found = {key: value for key, value in state.items() if average in key}
        for letter, name in zip("abe", weights):
            np.testing.assert_allclose(
                np.stack([v for k, v in found.items() if name in k]),
                file[f"{average}_{letter}"][last],
                rtol=1e-3,
                atol=1e-7,
            )
    ranks = [sum(ranks.values()) for ranks in allocator.history]
    nonzero = np.count_nonzero(file["lora_e"].reshape(12, -1), axis=1)
    assert ranks == nonzero.tolist()


def test_ranks_fall_and_are_dropped(tmp_path):
    """To the target, in logs and summary; the rest of the optimizer stays."""
    model = adapted(target_rank=2)
    frozen = frozen_bytes(model)
    compile_model(model)
    model.optimizer.build(model.trainable_variables)
    variables = [v.path for v in model.optimizer.variables]
    allocator = keras_fvae.AdaLoRAAllocator()
    history = model.fit(
        X, Y, batch_size=4, epochs=10, callbacks=[allocator], verbose=0
    ).history
    assert history["mean_rank"][0] == 4
    assert history["mean_rank"][-5:] == [2] * 5
    assert np.count_nonzero(singular_values(model)) == 6
    assert [v.path for v in model.optimizer.variables] == variables
    assert frozen_bytes(model) == frozen
    ranks = np.count_nonzero(singular_values(model), axis=1)
    assert [*allocator.history[-1].values()] == ranks.tolist()
    summary = str(keras_fvae.adapter_summary(model))
    for rank in {*ranks} - {4}:
        assert f"{rank} ranks left" in summary
    before = predict(model)
    keras_fvae.save_adapter(
        model, tmp_path / "a.safetensors", include="inference"
    )
    loaded = make_model()
    keras_fvae.load_adapter(loaded, tmp_path / "a.safetensors")
    keras_fvae.finalize_adapter(model)
    for part in (model, loaded):
        np.testing.assert_allclose(predict(part), before, atol=1e-5)
        layers = lookup.adapted_layers(part)
        found = [layer.adapter.kernel_a.shape[1] for layer in layers]
        assert found == np.maximum(ranks, 1).tolist()


OPTIMIZERS = {
    "clipped": lambda: keras.optimizers.SGD(0.5, global_clipnorm=1.0),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.02)
    ),
    "scaled and accumulated": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.02, gradient_accumulation_steps=2)
    ),
    "preconditioned": lambda: keras_fvae.optimizers.RiemannianPreconditioning(
        keras.optimizers.Adam(0.02), gradient_accumulation_steps=2
    ),
    "averaged": lambda: keras.optimizers.AdamW(0.02, use_ema=True),
}


@pytest.mark.shared_out
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_any_optimizer(name):
    model = adapted(target_rank=2)
    compile_model(model, OPTIMIZERS[name]())
    model.fit(
        X,
        Y,
        batch_size=4,
        epochs=10,
        callbacks=[keras_fvae.AdaLoRAAllocator()],
        verbose=0,
    )
    assert np.count_nonzero(singular_values(model)) == 6


def test_a_killed_run_goes_on(tmp_path):
    def run(kill_after=None):
        model = adapted(target_rank=2)
        compile_model(model)
        # Whatever their order.
        callbacks = [
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras_fvae.AdaLoRAAllocator(),
            kill_before(kill_after),
        ]
        model.fit(
            X,
            Y,
            batch_size=4,
            epochs=8,
            shuffle=False,
            callbacks=callbacks,
            verbose=0,
        )
        return singular_values(model)

    expected = run()
    with pytest.raises(Killed):
        run(kill_after=3)
    np.testing.assert_allclose(run(), expected, rtol=1e-5, atol=1e-7)
    assert np.count_nonzero(expected) == 6


def test_nobody_forgets_the_callback():
    model = adapted()
    compile_model(model)
    with pytest.warns(UserWarning, match=r"pass `keras_fvae.AdaLoRAAllocator"):
        model.fit(X, Y, verbose=0)
    assert np.count_nonzero(singular_values(model)) == 12


@pytest.mark.one_backend
def test_what_cannot_be_right_is_refused():
    for wrong in (0, 5, 1.5, "2", True):
        with pytest.raises(ValueError, match="target_rank"):
            keras_fvae.AdaLoRAConfig(4, target_rank=wrong)
    with pytest.raises(ValueError, match="orthogonality_weight"):
        keras_fvae.AdaLoRAConfig(4, orthogonality_weight=-1)
    for name, wrong in (
        ("initial_steps", -1),
        ("final_steps", 1.5),
        ("interval", 0),
        ("total_steps", True),
        ("beta_1", 1),
        ("beta_2", "x"),
    ):
        with pytest.raises(ValueError, match=name):
            keras_fvae.AdaLoRAAllocator(**{name: wrong})

    def fit(model, allocator, data=(X, Y)):
        compile_model(model)
        model.fit(*data, callbacks=[allocator], verbose=0)

    with pytest.raises(ValueError, match="adapted by AdaLoRA.*by LoRA"):
        fit(adapt(make_model(), "LoRA"), keras_fvae.AdaLoRAAllocator())
    with pytest.raises(ValueError, match="1 updates.*initial_steps=1"):
        fit(adapted(), keras_fvae.AdaLoRAAllocator(initial_steps=1))
    batches = ((X, Y) for _ in range(3))
    with pytest.raises(ValueError, match="total_steps"):
        fit(adapted(), keras_fvae.AdaLoRAAllocator(), (batches,))
    several = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.Adam())
    )
    model = adapted()
    compile_model(model, several)
    with pytest.raises(ValueError, match="MultiOptimizer"):
        model.fit(X, Y, callbacks=[keras_fvae.AdaLoRAAllocator()])
    for layer in lookup.adapted_layers(model):
        layer.trainable = False
    with pytest.raises(ValueError, match="frozen"):
        fit(model, keras_fvae.AdaLoRAAllocator())
    # Nor is it missed then.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*AdaLoRAAllocator")
        compile_model(model)
        model.fit(X, Y, verbose=0)


@pytest.mark.one_backend
def test_a_run_that_was_stopped_leaves_nothing_behind():
    """The next one begins anew, with and without the callback."""
    model = adapted(target_rank=2)
    compile_model(model)
    model.optimizer.build(model.trainable_variables)
    num_variables = len(model.optimizer.variables)
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: 1 / 0)
    for _ in range(2):
        allocator = keras_fvae.AdaLoRAAllocator()
        with pytest.raises(ZeroDivisionError):
            model.fit(
                X, Y, batch_size=1, callbacks=[allocator, stop], verbose=0
            )
        assert len(model.optimizer.variables) == num_variables
    before = np.count_nonzero(singular_values(model))
    with pytest.warns(UserWarning, match="AdaLoRAAllocator"):
        model.fit(X, Y, batch_size=1, epochs=2, verbose=0)
    # None is set to 0 any more, and what was trains again.
    assert np.count_nonzero(singular_values(model)) == 12 > before
    allocator = keras_fvae.AdaLoRAAllocator()
    model.fit(X, Y, batch_size=1, callbacks=[allocator], verbose=0)
    assert np.count_nonzero(singular_values(model)) == 6
    assert len(model.optimizer.variables) == num_variables
