"""What the tests share, beside fixtures."""

import os
import pathlib
import pkgutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_fvae

BACKEND = keras.config.backend()
BACKENDS = ("jax", "tensorflow", "torch")
# Where those run that are marked `one_backend` or `always_one_backend`.
ONE_BACKEND = "torch"
# The long tail of what is of Python alone.
LONG_ON_ONE_BACKEND = [pytest.mark.slow, pytest.mark.always_one_backend]
# Around the ring, files go from each backend to one other.
NEXT_BACKEND = BACKENDS[(BACKENDS.index(BACKEND) + 1) % len(BACKENDS)]
# Keras compiles by default on JAX and TensorFlow, and not on PyTorch. JAX takes
# long where it compiles each operation by itself.
JIT_COMPILE = {
    "jax": [pytest.param(False, marks=pytest.mark.slow), True],
    "tensorflow": [pytest.param(False, marks=pytest.mark.slow), True],
    "torch": [False],
}[BACKEND]
ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(keras_fvae.__path__, "keras_fvae.")
)
PUBLIC = [
    getattr(namespace, name)
    for namespace in (keras_fvae, keras_fvae.optimizers)
    for name in namespace.__all__
    if name != "optimizers"
]


class CallCounter(keras.layers.Layer):
    """Passes its input on, and counts how often Python runs its `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.num_calls = 0

    def call(self, x):
        self.num_calls += 1
        return x


def to_numpy(x):
    return ops.convert_to_numpy(x)


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


def value_and_gradients(function, variables, arrays=()):
    """`function(*arrays)` and its gradients, as NumPy.

    Args:
        function: Function of tensors that returns a scalar.
        variables: List of `keras.Variable`.
        arrays: List of NumPy arrays.

    Returns:
        The value, the gradients of the variables, those of the arrays.
    """
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    if BACKEND == "jax":
        import jax

        def stateless(values, tensors):
            mapping = zip(variables, values)
            with keras.StatelessScope(mapping, collect_losses=True):
                return function(*tensors)

        value, gradients = jax.value_and_grad(stateless, argnums=(0, 1))(
            [v.value for v in variables], tensors
        )
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        gradients = tape.gradient(
            value, [[v.value for v in variables], tensors]
        )
    else:
        import torch

        tensors = [tensor.requires_grad_() for tensor in tensors]
        value = function(*tensors)
        values = [v.value for v in variables]
        flat = torch.autograd.grad(value, [*values, *tensors])
        gradients = flat[: len(values)], flat[len(values) :]
    to_numpys = [[to_numpy(g) for g in group] for group in gradients]
    return to_numpy(value), *to_numpys


def snapshot(model):
    """Everything that must not change when a call raises."""
    return [
        (type(layer), layer.path, layer.trainable)
        for layer in model._flatten_layers()
    ], [(v.path, v.trainable, to_numpy(v).tolist()) for v in model.variables]


def environment(backend=BACKEND, devices=1):
    """The variables of a fresh process.

    Args:
        backend: String, Keras's backend.
        devices: Integer, how many devices JAX is to see.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }


def run_python(*arguments, backend=BACKEND, devices=1, check=True, stdin=b""):
    """Runs a fresh Python process at the root of the project."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=environment(backend, devices),
    )
    result.stdout, result.stderr = map(
        bytes.decode, (result.stdout, result.stderr)
    )
    if check and result.returncode != 0:
        raise AssertionError(result.stdout + result.stderr)
    return result


def text_inputs(rng, shape=(4, 8), vocabulary_size=50):
    """Token ids for a KerasHub text model, without padding."""
    token_ids = rng.integers(1, vocabulary_size, shape)
    return {
        "token_ids": token_ids,
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, "int32"),
    }


def remove_latent_noise(model):
    """Takes the variance out of the latents, so that draws are the means."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras_fvae.FVAE):
            weights = layer.get_reference_weights()
            for index in (0, 1):
                encoder = f"views_conditionalGaussianEncoders_list.{index}"
                name = f"{encoder}.logvar.bias"
                weights[name] = np.full_like(weights[name], -40.0)
            layer.set_reference_weights(weights)


def move_adapters(model, rng, scale=0.3):
    """Moves the adapters' weights, so that no update is zero."""
    for layer in model._flatten_layers():
        if hasattr(layer, "adapter"):
            for weight in layer.adapter.weights:
                noise = rng.normal(scale=scale, size=weight.shape)
                weight.assign(to_numpy(weight) + noise)
