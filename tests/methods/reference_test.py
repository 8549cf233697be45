"""Each method against what PEFT and the authors' own code compute."""

import json

import keras
import numpy as np
import pytest
from helpers import ROOT
from helpers import to_numpy
from helpers import value_and_gradients
from keras import ops

import keras_fvae
from keras_fvae.layers.attach import merged_weights
from keras_fvae.methods import drop_lora
from keras_fvae.methods import flat_lora

REFERENCE = ROOT / "tests" / "reference" / "methods"
NAMES = {
    "lora_a": "kernel_a",
    "lora_b": "kernel_b",
    "lora_e": "singular_values",
    "gate": "gate",
    "magnitude": "magnitude",
    "gate_kernel": "kernel_gate",
}


def make_config(name, settings):
    rank, alpha = settings.get("rank"), settings.get("alpha")
    if name.startswith("dora"):
        return keras_fvae.DoRAConfig(
            rank, alpha, gradient_through_norm=name == "dora_full_gradient"
        )
    if name == "hira":
        return keras_fvae.HiRAConfig(rank)
    if name == "adalora":
        weight = settings["orth_reg_weight"]
        return keras_fvae.AdaLoRAConfig(
            settings["init_r"], alpha, orthogonality_weight=weight
        )
    if name.startswith("moe_lora"):
        return keras_fvae.MoELoRAConfig(
            rank,
            alpha,
            num_experts=settings["num_experts"],
            top_k=settings["top_k"],
            gate_rescaling=name == "moe_lora_moe_riemannian",
        )
    if name == "flat_lora":
        return keras_fvae.FlatLoRAConfig(rank, alpha, rho=settings["rho"])
    return {
        "beamlora": keras_fvae.BeamLoRAConfig,
        "lora": keras_fvae.LoRAConfig,
        "rslora": keras_fvae.RSLoRAConfig,
        "ffa_lora": keras_fvae.FFALoRAConfig,
        "pissa": keras_fvae.PiSSAConfig,
        "olora": keras_fvae.OLoRAConfig,
        "droplora": keras_fvae.DropLoRAConfig,
    }[name](rank, alpha)


class Layer:
    """An adapted layer with a reference's weights, of either class.

    As `EinsumDense` the 12 inputs are on two axes, and so are the 10 outputs,
    with the axis of the tokens between those.
    """

    def __init__(self, name, is_einsum):
        with np.load(REFERENCE / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file if key != "config"}
            self.settings = json.loads(str(file["config"]))
        self.is_einsum = is_einsum
        config = make_config(name, self.settings)
        use_bias = "bias" in self.arrays
        if is_einsum:
            bias_axes = "uv" if use_bias else None
            self.layer = keras.layers.EinsumDense(
                "bxty,xyuv->btuv", (5, 2, 5), bias_axes=bias_axes
            )
        else:
            self.layer = keras.layers.Dense(10, use_bias=use_bias)
        x = self.inputs(self.arrays["x"])
        model = keras.Sequential([keras.Input(x.shape[1:]), self.layer])
        self.layer.kernel.assign(
            self.arrays["kernel"].reshape(self.layer.kernel.shape)
        )
        if use_bias:
            bias = self.arrays["bias"].reshape(self.layer.bias.shape)
            self.layer.bias.assign(bias)
        keras_fvae.enable_adapter(model, config, lambda layer: True)
        self.adapter = self.layer.adapter
        self.weights = {weight.name: weight for weight in self.adapter.weights}

    def set_weights(self):
        for theirs, ours in NAMES.items():
            if theirs in self.arrays and ours in self.weights:
                self.weights[ours].assign(self.arrays[theirs])

    def inputs(self, x):
        if not self.is_einsum:
            return x.astype("float32")
        x = x.reshape(2, 5, 3, 4)
        return x.transpose(0, 2, 1, 3).astype("float32")

    def outputs(self, name):
        shape = (2, 5, 2, 5) if self.is_einsum else (2, 5, 10)
        return self.arrays[name].reshape(shape)

    def loss_and_gradients(self, training):
        target = ops.convert_to_tensor(self.outputs("target"), "float32")

        def loss(x):
            difference = self.layer(x, training=training) - target
            return 0.5 * ops.sum(ops.square(difference))

        variables = [
            weight for weight in self.weights.values() if weight.trainable
        ]
        value, gradients, (of_x,) = value_and_gradients(
            loss, variables, [self.inputs(self.arrays["x"])]
        )
        if self.is_einsum:
            of_x = of_x.transpose(0, 2, 1, 3).reshape(2, 5, 12)
        found = {v.name: g for v, g in zip(variables, gradients)}
        return value, {**found, "x": of_x}

    def check(self, training=False):
        """Loss, gradients, outputs and the merged kernel."""
        loss, gradients = self.loss_and_gradients(training)
        assert_close(loss, self.arrays["loss"])
        assert_close(gradients.pop("x"), self.arrays["grad_x"])
        expected = {
            ours: self.arrays[f"grad_{theirs}"]
            for theirs, ours in NAMES.items()
            if f"grad_{theirs}" in self.arrays
        }
        assert {*gradients} == {*expected}
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name])
        if "merged_kernel" not in self.arrays:
            return
        kernel, bias = merged_weights(self.layer)
        assert bias is None
        assert_close(kernel.reshape(12, 10), self.arrays["merged_kernel"])

    def predict(self):
        return to_numpy(self.layer(self.inputs(self.arrays["x"])))


def assert_close(found, expected):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


on_both_classes = pytest.mark.parametrize("is_einsum", [False, True])


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "rslora",
        "ffa_lora",
        "dora",
        "dora_no_bias",
        "dora_full_gradient",
        "hira",
        "adalora",
        "beamlora",
    ],
)
@on_both_classes
def test_methods_compute_what_theirs_do(name, is_einsum):
    layer = Layer(name, is_einsum)
    if "initial_magnitude" in layer.arrays:
        assert_close(
            to_numpy(layer.weights["magnitude"]),
            layer.arrays["initial_magnitude"],
        )
    layer.set_weights()
    layer.check()
    assert_close(layer.predict(), layer.outputs("output"))


@pytest.mark.parametrize("name", ["pissa", "olora"])
@on_both_classes
def test_methods_that_start_from_factors(name, is_einsum):
    layer = Layer(name, is_einsum)
    arrays = layer.arrays
    assert_close(layer.predict(), layer.outputs("base_output"))
    first_a, first_b = (
        to_numpy(layer.weights[f"initial_kernel_{factor}"]) for factor in "ab"
    )
    # Their signs are open.
    theirs = arrays["initial_lora_a"] @ arrays["initial_lora_b"]
    assert_close(first_a @ first_b, theirs)
    assert_close(np.abs(first_b), np.abs(arrays["initial_lora_b"]))
    for theirs, ours in (("lora_a", "kernel_a"), ("lora_b", "kernel_b")):
        layer.weights[ours].assign(arrays[theirs])
        layer.weights[f"initial_{ours}"].assign(arrays[f"initial_{theirs}"])
    # Their base is what is left of the kernel, and merges to the same.
    layer.check()
    assert_close(layer.predict(), layer.outputs("output"))


@on_both_classes
def test_adalora_keeps_its_factors_orthonormal(is_einsum):
    layer = Layer("adalora", is_einsum)
    layer.set_weights()
    variables = [layer.weights["kernel_a"], layer.weights["kernel_b"]]
    loss, gradients, _ = value_and_gradients(
        lambda: sum(layer.layer.losses), variables, []
    )
    assert_close(loss, layer.arrays["orthogonality_loss_times_weight"])
    for letter, gradient in zip("ab", gradients):
        assert_close(gradient, layer.arrays[f"orth_grad_lora_{letter}"])


@on_both_classes
def test_droplora_with_the_mask_that_was_drawn(is_einsum, monkeypatch):
    layer = Layer("droplora", is_einsum)
    layer.set_weights()
    assert_close(layer.predict(), layer.outputs("inference_output"))
    mask = ops.convert_to_tensor(layer.arrays["mask"], "float32")
    monkeypatch.setattr(
        drop_lora, "dropout", lambda x, rate, seed_generator: x * mask
    )
    layer.check(training=True)


@pytest.mark.parametrize(
    "name", ["moe_lora_riemannian", "moe_lora_moe_riemannian"]
)
@on_both_classes
def test_moe_lora(name, is_einsum):
    layer = Layer(name, is_einsum)
    layer.set_weights()
    layer.check(training=True)
    assert_close(layer.predict(), layer.outputs("output"))


@on_both_classes
def test_flat_lora_with_the_noise_that_was_drawn(is_einsum, monkeypatch):
    layer = Layer("flat_lora", is_einsum)
    layer.set_weights()
    settings, arrays = layer.settings, layer.arrays
    layer.adapter.set_progress(settings["step"] / settings["total_steps"])
    normal = ops.convert_to_tensor(arrays["noise"], "float32")
    monkeypatch.setattr(
        flat_lora, "noise_and_masks", lambda shape, seed, width: (normal, [])
    )
    layer.check(training=True)
    outputs = layer.layer(layer.inputs(arrays["x"]), training=True)
    assert_close(to_numpy(outputs), layer.outputs("output"))
