"""The zeros beside each kernel, whose gradient is that of the kernel."""

import family
import keras
import numpy as np
import pytest
from helpers import JIT_COMPILE
from helpers import move_adapters
from helpers import to_numpy

import keras_fvae
from keras_fvae.model import lookup


def train_on_batch(model, **options):
    model.compile(
        keras.optimizers.SGD(1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **options,
    )
    model.train_on_batch(family.X, family.Y)


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_their_gradient_is_the_kernels(jit_compile):
    model, plain = family.make_model(), family.make_model()
    family.adapt(model, "OPLoRA")
    before = {
        name: to_numpy(plain.get_layer(name).kernel)
        for name in ("query", "output", "up")
    }
    for each in (model, plain):
        train_on_batch(each, jit_compile=jit_compile)
    for name, kernel in before.items():
        step = to_numpy(plain.get_layer(name).kernel) - kernel
        zeros = to_numpy(model.get_layer(name).adapter.zero_kernel)
        assert np.abs(step).max() > 1e-3
        np.testing.assert_allclose(zeros, step.reshape(zeros.shape), atol=1e-6)


def test_they_change_nothing_where_another_optimizer_moved_them():
    model = family.adapt(family.make_model(), "OPLoRA")
    lora = family.make_model()
    keras_fvae.enable_adapter(
        lora,
        keras_fvae.LoRAConfig(2, seed=1),
        family.is_target,
        trainable_layer_names=["head"],
    )
    assert family.train(model) == pytest.approx(family.train(lora), rel=1e-5)
    np.testing.assert_allclose(
        family.predict(model), family.predict(lora), atol=1e-6
    )


@pytest.mark.one_backend
def test_they_are_in_no_file(rng, tmp_path):
    lora = family.make_model()
    keras_fvae.enable_adapter(
        lora, keras_fvae.LoRAConfig(2, seed=1), family.is_target
    )
    move_adapters(lora, rng)
    model = family.make_model()
    summary = keras_fvae.enable_adapter(
        model, keras_fvae.OPLoRAConfig(2), family.is_target
    )
    assert summary.inference_parameters == (
        keras_fvae.adapter_summary(lora).inference_parameters
    )
    for layer in lookup.adapted_layers(model):
        assert {*layer.adapter.get_arrays()} == {"kernel_a", "kernel_b"}
    # So that the weights of the one are those of the other.
    lora.save_weights(tmp_path / "lora.weights.h5")
    model.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_array_equal(family.predict(model), family.predict(lora))
    model.save_weights(tmp_path / "model.weights.h5")
    sizes = [
        (tmp_path / f"{name}.weights.h5").stat().st_size
        for name in ("lora", "model")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.one_backend
def test_there_is_no_scale():
    with pytest.raises(TypeError, match="alpha"):
        keras_fvae.OPLoRAConfig(2, alpha=4)
    model = family.adapt(family.make_model(), "OPLoRA")
    with pytest.raises(ValueError, match="no `alpha`"):
        keras_fvae.adapter_scale(model, 2.0)
