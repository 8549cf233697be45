"""What is common to the tests of all methods: one config of each."""

import dataclasses

import keras
import numpy as np
from helpers import BACKEND
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.config import AdapterConfig


class ShiftAdapter(Adapter):
    """A toy: the outputs plus a number for each unit."""

    weight_axes = {"shift": ("output",)}

    def build(self, linear_map, kernel_shape, read_kernel=None):
        super().build(linear_map, kernel_shape, read_kernel)
        self.shift = self.add_adapter_weight(
            "shift", (self.units,), lambda: np.zeros(self.units)
        )

    def adapt(self, frozen, training):
        outputs = frozen.outputs()
        return outputs + ops.cast(frozen.for_units(self.shift), outputs.dtype)

    def merge(self, kernel, bias):
        return kernel, bias + self.get_arrays()["shift"]


@dataclasses.dataclass(frozen=True)
class ShiftConfig(AdapterConfig):
    """All that a new method takes, beside its adapter."""

    adapter_class = ShiftAdapter
    method_name = "Shift"


class Killed(Exception):
    """What `kill_before` raises."""


def kill_before(epoch):
    """A callback that ends `fit` before an epoch; `None` for none of them."""

    def on_epoch_begin(begun, logs):
        if begun == epoch:
            raise Killed

    return keras.callbacks.LambdaCallback(on_epoch_begin=on_epoch_begin)


# Of rank 2, with a scale where there is one.
CONFIGS = {
    "LoRA": keras_fvae.LoRAConfig(2, 4, seed=1),
    "LoRA with dropout": keras_fvae.LoRAConfig(2, dropout=0.2, seed=1),
    "rsLoRA": keras_fvae.RSLoRAConfig(2, 4, seed=1),
    "FFA-LoRA": keras_fvae.FFALoRAConfig(2, 4, seed=1),
    "PiSSA": keras_fvae.PiSSAConfig(2, 4),
    "OLoRA": keras_fvae.OLoRAConfig(2, 4),
    "DoRA": keras_fvae.DoRAConfig(2, 4, seed=1),
    "DoRA with gradient": keras_fvae.DoRAConfig(
        2, 4, gradient_through_norm=True, seed=1
    ),
    "HiRA": keras_fvae.HiRAConfig(2, seed=1),
    "DropLoRA": keras_fvae.DropLoRAConfig(2, 4, seed=1),
    "AdaLoRA": keras_fvae.AdaLoRAConfig(2, 4, target_rank=1, seed=1),
    "BeamLoRA": keras_fvae.BeamLoRAConfig(2, 4, seed=1),
    "SRLoRA": keras_fvae.SRLoRAConfig(2, 4, num_fused=2),
    "MoE-LoRA": keras_fvae.MoELoRAConfig(2, 4, num_experts=3, top_k=2, seed=1),
    "Flat-LoRA": keras_fvae.FlatLoRAConfig(2, 4, rho=0.2, seed=1),
    "OPLoRA": keras_fvae.OPLoRAConfig(2, seed=1),
    "OPLoRA with mean squares": keras_fvae.OPLoRAConfig(
        2, mean_squares=True, seed=1
    ),
    "FVAE-LoRA": keras_fvae.FVAELoRAConfig(
        2, 4, decoder_units=(4,), elbo_weight=1e-4, seed=1
    ),
    "linear FVAE-LoRA": keras_fvae.FVAELoRAConfig(
        2, encoder_units=(), decoder_units=(4,), elbo_weight=1e-4, seed=1
    ),
    "Shift": ShiftConfig(2),
}
# One of each kind: a norm, random numbers, a loss. The others are made of the
# same parts.
KINDS = {"DoRA with gradient", "DropLoRA", "FVAE-LoRA"}
# Those that compute the same in training as at inference.
WITHOUT_NOISE = [
    name
    for name, config in CONFIGS.items()
    if not (getattr(config, "dropout", 0) or getattr(config, "rho", 0))
]
X = np.random.default_rng(0).normal(size=(8, 5, 6)).astype("float32")
Y = np.arange(8) % 3


def make_model(dtype=None):
    """Projections as attention has them, a `Dense` layer, and a head."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 6))
    x = keras.layers.EinsumDense(
        "btd,dnh->btnh", (5, 2, 4), "tanh", bias_axes="nh",
        name="query", dtype=dtype,
    )(inputs)  # fmt: skip
    x = keras.layers.EinsumDense(
        "btnh,nhd->btd", (5, 6), bias_axes="d", name="output", dtype=dtype
    )(x)
    x = keras.layers.Dense(7, "tanh", use_bias=False, name="up", dtype=dtype)(x)
    x = keras.layers.GlobalAveragePooling1D(dtype=dtype)(x)
    return keras.Model(
        inputs, keras.layers.Dense(3, name="head", dtype=dtype)(x)
    )


def make_convolutions(dtype=None):
    """Convolutions of size 1 and larger, channels last and first, a head."""
    return _make_convolutions((3, (2, 1)), dtype)


def make_convolutions_of_size_1(dtype=None):
    """The same, for a method that takes no larger ones."""
    return _make_convolutions((1, 1), dtype)


def _make_convolutions(sizes, dtype):
    keras.utils.set_random_seed(0)
    # On CPUs, TensorFlow has none of each dtype with the channels first.
    has_channels_first = BACKEND != "tensorflow"
    data_format = "channels_first" if has_channels_first else "channels_last"
    inputs = keras.Input((5, 6))
    x = keras.layers.Conv1D(8, 1, activation="tanh", name="one", dtype=dtype)(
        inputs
    )
    x = keras.layers.Reshape((5, 4, 2), dtype=dtype)(x)
    x = keras.layers.Conv2D(
        6, sizes[0], strides=2, padding="same", activation="tanh",
        use_bias=False, name="strided", dtype=dtype,
    )(x)  # fmt: skip
    if has_channels_first:
        x = keras.layers.Permute((3, 1, 2), dtype=dtype)(x)
    x = keras.layers.Conv2D(
        7, sizes[1], dilation_rate=2, activation="tanh",
        data_format=data_format, name="dilated", dtype=dtype,
    )(x)  # fmt: skip
    x = keras.layers.GlobalAveragePooling2D(data_format, dtype=dtype)(x)
    return keras.Model(
        inputs, keras.layers.Dense(3, name="head", dtype=dtype)(x)
    )


# Models of convolutions for one method of each way to use the frozen layer.
ON_CONVOLUTIONS = {
    **dict.fromkeys(
        [
            *sorted(KINDS),
            "LoRA with dropout",
            "PiSSA",
            "HiRA",
            "SRLoRA",
            "AdaLoRA",
            "MoE-LoRA",
            "Flat-LoRA",
            "OPLoRA",
        ],
        make_convolutions,
    ),
    "FVAE-LoRA": make_convolutions_of_size_1,
    "linear FVAE-LoRA": make_convolutions_of_size_1,
}


def is_target(layer):
    return layer.name != "head"


def adapt(model, name, **kwargs):
    keras_fvae.enable_adapter(
        model,
        CONFIGS[name],
        is_target,
        trainable_layer_names=["head"],
        **kwargs,
    )
    return model


def train(model, epochs=2, learning_rate=0.05, optimizer=None):
    model.compile(
        optimizer or keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model.fit(
        X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0
    ).history["loss"]


def predict(model):
    return to_numpy(model(X)).astype("float32")


def frozen_bytes(model):
    """By path, the bytes of each weight that no adapter has."""
    return {
        weight.path: to_numpy(weight).tobytes()
        for weight in model.weights
        if "adapter" not in weight.path and "head" not in weight.path
    }
