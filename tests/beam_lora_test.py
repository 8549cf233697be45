"""BeamLoRA's pruning: alone, and through `fit`."""

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
from helpers import ROOT
from helpers import to_numpy

import keras_fvae
from keras_fvae.callbacks import beam_lora
from keras_fvae.model import lookup

REFERENCE = ROOT / "tests" / "reference" / "methods" / "beamlora_pruning.npz"


def adapted(rank=4):
    model = make_model()
    keras_fvae.enable_adapter(
        model,
        keras_fvae.BeamLoRAConfig(rank, seed=0),
        is_target,
        trainable_layer_names=["head"],
    )
    return model


def fit(model, callbacks, epochs=6, optimizer=None, data=None, **kwargs):
    model.compile(
        optimizer or keras.optimizers.Adam(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model.fit(
        *(data or (X, Y)),
        batch_size=None if data else 2,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )


def arrays_of(model):
    return [
        layer.adapter.get_arrays() for layer in lookup.adapted_layers(model)
    ]


def theirs(file, prefix, index):
    names = {"kernel_a": "lora_a", "kernel_b": "lora_b", "gate": "gate"}
    return {
        ours: file[f"{prefix}_{name}"][index].astype("float32")
        for ours, name in names.items()
    }


def test_it_prunes_as_the_authors_do():
    with np.load(REFERENCE) as loaded:
        file = {name: loaded[name] for name in loaded}
    found = beam_lora.pruned([*file["scores"]], 0.8)
    np.testing.assert_array_equal(found, file["pruned"])
    for index in range(2):
        layer = keras.layers.Dense(6, name="query")
        model = keras.Sequential([keras.Input((6,)), layer])
        keras_fvae.enable_adapter(model, keras_fvae.BeamLoRAConfig(6, 12))
        adapter = layer.adapter
        adapter.set_arrays(theirs(file, "before", index))
        scores = to_numpy(adapter.scores)
        np.testing.assert_allclose(scores, file["scores"][index], rtol=1e-5)
        expected = {
            child: parent
            for child, parent in enumerate(file["parents"][index].tolist())
            if parent >= 0
        }
        rng = np.random.default_rng(0)
        chosen = beam_lora.parents(scores, found[index], rng)
        assert {*chosen} == {*expected}
        assert {*chosen.values()} == {*expected.values()}
        # Theirs is another order.
        beam_lora.start_anew(adapter, expected, theirs(file, "cached", index))
        after = theirs(file, "after", index)
        for name, array in adapter.get_arrays().items():
            np.testing.assert_allclose(array, after[name], rtol=1e-6)


def test_one_rank_stays_and_parents_do():
    """Where more than half of a layer is pruned, and where all would be."""
    low, high = np.array([0.1, 0.2, 0.3]), np.array([9.0, 8.0, 7.0])
    first, second = beam_lora.pruned([low, high], 0.5)
    assert first.tolist() == [True, True, False]
    assert second.tolist() == [False, True, True]
    rng = np.random.default_rng(0)
    assert beam_lora.parents(low, first, rng) == {0: 2, 1: 2}
    assert beam_lora.parents(high, second, rng) == {1: 0, 2: 0}


class Spy(keras.callbacks.Callback):
    """A, B, gates and the gates' moments after each step."""

    def __init__(self):
        super().__init__()
        self.arrays, self.moments = [], []

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.arrays.append(
            [
                {name: array.copy() for name, array in arrays.items()}
                for arrays in arrays_of(self.model)
            ]
        )
        self.moments.append(
            [
                np.abs(to_numpy(v)).max()
                for v in self.model.optimizer.variables
                if "gate_" in v.path
            ]
        )


@pytest.mark.parametrize("accumulated", [False, True])
def test_ranks_start_anew_while_it_trains(accumulated):
    """With what was there half an interval before; what is frozen stays."""
    model = adapted()
    frozen = frozen_bytes(model)
    optimizer = keras.optimizers.Adam(
        0.05, gradient_accumulation_steps=2 if accumulated else None
    )
    optimizer.build(model.trainable_variables)
    variables = [v.path for v in optimizer.variables]
    before, after = Spy(), Spy()
    pruner = keras_fvae.BeamLoRAPruner(4, first_share=0.6, last_step=100)
    history = fit(model, [before, pruner, after], optimizer=optimizer).history
    steps = 1 + accumulated
    num_updates = 24 // steps
    prunings = 0
    for update in range(1, num_updates + 1):
        step = update * steps - 1
        for index in range(3):
            a, b = (spy.arrays[step][index] for spy in (before, after))
            changed = np.flatnonzero((a["kernel_a"] != b["kernel_a"]).any(0))
            assert changed.size == 0 or update % 4 == 0
            copies = before.arrays[step - 2 * steps][index]
            for rank in changed:
                parent = np.flatnonzero(
                    (b["kernel_a"][:, rank] == copies["kernel_a"].T).all(1)
                )
                assert parent.size == 1 and parent[0] not in changed
                np.testing.assert_array_equal(
                    b["kernel_b"][rank], copies["kernel_b"][parent[0]]
                )
            prunings += changed.size
        if update % 4 == 0 and update <= num_updates - 4:
            assert max(after.moments[step]) == 0
    assert prunings == sum(history["pruned_ranks"]) > 3
    assert frozen_bytes(model) == frozen
    assert [v.path for v in optimizer.variables] == variables


@pytest.mark.one_backend
def test_a_killed_run_goes_on(tmp_path):
    def run(kill_after=None):
        model = adapted()
        callbacks = [
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            # A pruning soon after each epoch, of copies from before.
            keras_fvae.BeamLoRAPruner(5, first_share=0.6, last_step=100),
            kill_before(kill_after),
        ]
        fit(model, callbacks)
        return arrays_of(model)

    expected = run()
    with pytest.raises(Killed):
        run(kill_after=2)
    for found, arrays in zip(run(), expected):
        for name, array in arrays.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6)


def test_nobody_forgets_the_callback():
    with pytest.warns(UserWarning, match=r"pass `keras_fvae.BeamLoRAPruner"):
        fit(adapted(), [], epochs=1)


@pytest.mark.one_backend
def test_what_cannot_be_right_is_refused():
    for wrong in (0, -1, "x", None):
        with pytest.raises(ValueError, match="temperature"):
            keras_fvae.BeamLoRAConfig(4, temperature=wrong)
    for name, wrong in (
        ("interval", 1),
        ("last_step", 0),
        ("total_steps", 1.5),
        ("first_share", 0),
        ("first_share", 1.1),
    ):
        with pytest.raises(ValueError, match=name):
            keras_fvae.BeamLoRAPruner(**{name: wrong})
    with pytest.raises(ValueError, match="adapted by BeamLoRA.*by LoRA"):
        fit(adapt(make_model(), "LoRA"), [keras_fvae.BeamLoRAPruner()])
    batches = ((X, Y) for _ in range(3))
    with pytest.raises(ValueError, match="total_steps.*BeamLoRAPruner"):
        fit(adapted(), [keras_fvae.BeamLoRAPruner()], data=(batches,))
