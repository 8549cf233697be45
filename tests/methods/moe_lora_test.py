"""MoE-LoRA's router, and what trains it."""

import family
import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.layers.frozen import FrozenCall


def adapt(**options):
    model = family.make_model()
    config = keras_fvae.MoELoRAConfig(2, 4, seed=1, **options)
    keras_fvae.enable_adapter(
        model, config, family.is_target, trainable_layer_names=["head"]
    )
    return model


@pytest.mark.one_backend
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_expert_is_lora(dropout):
    model = adapt(num_experts=1, top_k=1, dropout=dropout)
    lora = family.make_model()
    config = keras_fvae.LoRAConfig(2, 4, dropout=dropout, seed=1)
    keras_fvae.enable_adapter(
        lora, config, family.is_target, trainable_layer_names=["head"]
    )
    np.testing.assert_allclose(
        family.train(model), family.train(lora), rtol=1e-5
    )


def test_each_token_gets_its_experts():
    layer = keras_fvae.AdaptedDense(
        7, keras_fvae.MoELoRAConfig(2, num_experts=5, top_k=3)
    )
    x = family.X.reshape(-1, 6).copy()
    # All experts are equally probable then.
    x[0] = 0
    layer.build(x.shape)
    frozen = FrozenCall(layer, None, ops.convert_to_tensor(x))
    gates = to_numpy(layer.adapter.gates(frozen))
    assert ((gates > 0).sum(axis=1) == 3).all()
    exponentials = np.exp(x @ to_numpy(layer.adapter.kernel_gate))
    kept = np.sort(exponentials, axis=1)[:, -3:]
    np.testing.assert_allclose(
        np.sort(gates, axis=1)[:, -3:],
        kept / kept.sum(axis=1, keepdims=True),
        rtol=1e-4,
    )
    assert (gates[1:].argmax(axis=1) == exponentials[1:].argmax(axis=1)).all()


def test_the_router_has_a_learning_rate_of_its_own():
    def optimizer(gate_learning_rate):
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.AdamW(0.05),
                {".*/kernel_gate": keras.optimizers.AdamW(gate_learning_rate)},
            )
        )

    def steps(optimizer):
        """How far each weight is moved at most, and the losses."""
        model = adapt(num_experts=3, top_k=2)
        before = {w.path: to_numpy(w).copy() for w in model.trainable_weights}
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        losses = model.fit(
            family.X, family.Y, epochs=3, shuffle=False, verbose=0
        ).history["loss"]
        moved = {
            w.path: np.abs(to_numpy(w) - before[w.path]).max()
            for w in model.trainable_weights
        }
        return moved, losses

    moved, losses = steps(optimizer(0.05))
    expected, expected_losses = steps(keras.optimizers.AdamW(0.05))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert moved == pytest.approx(expected, rel=1e-3)
    slow, _ = steps(optimizer(5e-5))
    for path, distance in slow.items():
        factor = 1e-3 if "kernel_gate" in path else 1.0
        assert distance == pytest.approx(factor * moved[path], rel=0.5), path


@pytest.mark.always_one_backend
def test_bad_settings():
    with pytest.raises(ValueError, match="`top_k` must be at most.*top_k=3"):
        keras_fvae.MoELoRAConfig(num_experts=2, top_k=3)
    for name in ("num_experts", "top_k"):
        for wrong in (0, 1.5, "2", None):
            with pytest.raises(ValueError, match=f"`{name}` must be an int"):
                keras_fvae.MoELoRAConfig(**{name: wrong})
    with pytest.raises(ValueError, match="gate_rescaling"):
        keras_fvae.MoELoRAConfig(gate_rescaling=1)
