"""What the callbacks of the ablation change in a step."""

import keras
import numpy as np
import pytest
from helpers import BACKEND

import keras_fvae
from examples.paper.ablated_steps import ClipEachVariable
from examples.paper.ablated_steps import OtherRateBesideQ1


def changes_of_a_step(xy, optimizer, *callbacks):
    """Dict of the arrays of an adapter to what a step changed."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(3, name="adapted")(inputs)
    model = keras.Model(inputs, outputs)
    config = keras_fvae.FVAELoRAConfig(
        rank=2, encoder_units=(4,), zero_at_start="kernel_b", seed=0
    )
    keras_fvae.enable_adapter(model, config, ["adapted"])
    adapter = model.get_layer("adapted").adapter
    # So that there is a gradient everywhere.
    adapter.kernel_b.assign(np.ones((2, 3)))
    before = adapter.get_arrays()
    model.compile(optimizer, "mse")
    model.fit(*xy, batch_size=16, verbose=0, callbacks=[*callbacks])
    after = adapter.get_arrays()
    return {name: after[name] - before[name] for name in before}


@pytest.fixture
def xy(rng):
    return rng.normal(size=(16, 8)), rng.normal(size=(16, 3))


@pytest.mark.skipif(BACKEND != "jax", reason="it is refused elsewhere")
def test_q2_and_the_decoder_have_another_rate(xy):
    plain = changes_of_a_step(xy, keras.optimizers.Adam(1e-3))
    changed = changes_of_a_step(
        xy, keras.optimizers.Adam(1e-3), OtherRateBesideQ1(3.0)
    )
    # The first layers of the encoders wait for what is zero at the start.
    for name, change in plain.items():
        expected = change * (1 if name == "kernel_b" else 3)
        if name.startswith("encoder"):
            expected[..., 0, :] = change[..., 0, :]
        np.testing.assert_allclose(
            changed[name], expected, rtol=1e-2, atol=1e-6
        )
    assert np.abs(plain["encoder_kernel_1"][:, 1]).max() > 5e-4
    assert np.abs(plain["decoder_output_kernel"]).max() > 5e-4


@pytest.mark.skipif(BACKEND == "jax", reason="it is for JAX")
def test_another_rate_is_refused(xy):
    with pytest.raises(ValueError, match="are for JAX"):
        changes_of_a_step(
            xy, keras.optimizers.Adam(1e-3), OtherRateBesideQ1(3.0)
        )


def test_each_variable_is_clipped_by_itself(xy):
    def optimizer():
        return keras.optimizers.SGD(1.0, global_clipnorm=1e-3)

    plain = changes_of_a_step(xy, optimizer())
    changed = changes_of_a_step(xy, optimizer(), ClipEachVariable())

    def norm(changes, *names):
        return np.sqrt(sum(np.sum(changes[name] ** 2) for name in names))

    # The step is as long as the norm that is clipped to.
    assert norm(plain, *plain) == pytest.approx(1e-3, rel=1e-2)
    assert norm(changed, "kernel_b") == pytest.approx(1e-3, rel=1e-2)
    assert norm(changed, *changed) == pytest.approx(1e-3 * 3**0.5, rel=1e-2)
