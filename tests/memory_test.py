import re

import keras
import keras_hub
import numpy as np
import pytest
from distributed.common import make_backbone
from distributed.common import model_parallel
from helpers import ROOT

import keras_fvae

LLAMA_3_8B = {
    "vocabulary_size": 128256,
    "num_layers": 32,
    "num_query_heads": 32,
    "num_key_value_heads": 8,
    "hidden_dim": 4096,
    "intermediate_dim": 14336,
    "dtype": "bfloat16",
}

METHODS = {
    "full fine-tuning": lambda backbone: None,
    "KerasHub's LoRA": lambda backbone: backbone.enable_lora(16),
    "FVAE-LoRA": lambda backbone: backbone.enable_fvae_lora(rank=16),
}


def make_large(adapt):
    backbone = keras_hub.models.Llama3Backbone(**LLAMA_3_8B)
    adapt(backbone)
    return backbone


def distribution_on(num_devices):
    devices = [f"cpu:{index}" for index in range(num_devices)]
    mesh = keras.distribution.DeviceMesh(
        (1, num_devices), ("batch", "model"), devices
    )
    return model_parallel(keras_hub.models.Llama3Backbone.get_layout_map(mesh))


def test_one_device_as_the_weights_are():
    backbone = make_backbone("llama")
    backbone.enable_fvae_lora(rank=3)
    frozen = sum(int(np.prod(w.shape)) for w in backbone.non_trainable_weights)
    trained = sum(int(np.prod(w.shape)) for w in backbone.trainable_weights)

    def make_model():
        backbone = make_backbone("llama")
        backbone.enable_fvae_lora(rank=3)
        return backbone

    memory = keras_fvae.memory_per_device(make_model, optimizer_slots=1)
    assert memory.frozen_weights == 4 * frozen
    assert memory.trainable_weights == memory.gradients == 4 * trained
    assert memory.optimizer == 4 * trained
    assert memory.total == 4 * (frozen + 3 * trained)


@pytest.mark.shared_out
@pytest.mark.parametrize("method", METHODS)
def test_eight_billion_weights(method):
    adapt = METHODS[method]
    distribution = distribution_on(8)
    alone = keras_fvae.memory_per_device(lambda: make_large(adapt))
    shared = keras_fvae.memory_per_device(
        lambda: make_large(adapt), distribution
    )
    d, vocabulary, layers = 4096, 128256, 32
    norms = d * (2 * layers + 1)
    # Two embeddings; query and output, key and value, and the feed-forward.
    sharded = vocabulary * d + layers * d * (2 * 4096 + 2 * 1024 + 3 * 14336)
    base = 2 * (sharded + vocabulary * d + norms)
    # KerasHub's map leaves the norms and the embedding for the output whole.
    shared_base = base - 2 * sharded + 2 * sharded // 8
    if method == "full fine-tuning":
        assert alone.trainable_weights == base
        assert shared.trainable_weights == shared_base
        assert alone.total == 4 * base
        return
    assert alone.frozen_weights == base
    assert shared.frozen_weights == shared_base
    if method == "KerasHub's LoRA":
        # An A of (d, heads, 16) and a B of (16, head width), in float32.
        heads = 32 + 8
        trained = 4 * layers * 16 * (d * heads + 2 * 128)
        assert alone.trainable_weights == trained
        assert shared.trainable_weights == trained
        return
    # Of each token's features: two encoders of 64, the decoder's last weights.
    features = d * (2 * 64 + 128 + 1 + 1)
    encoders = 2 * 64 + 2 * (64 + 1) * 32
    decoder = (32 + 1) * 128 + 2 * (128 + 1) * 128
    kernels_b = 16 * (4096 + 1024)
    latents = 2 * (encoders + decoder)
    whole = layers * (2 * features + latents + kernels_b)
    assert alone.trainable_weights == 4 * whole
    # B is cut along the heads, which the map gives to "batch".
    spread = layers * (2 * features // 8 + latents + kernels_b)
    assert shared.trainable_weights == 4 * spread


@pytest.mark.shared_out
@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_the_documentation(method):
    memories = [
        keras_fvae.memory_per_device(
            lambda: make_large(METHODS[method]), distribution
        )
        for distribution in (None, distribution_on(8))
    ]
    alone, shared = (f"{memory.total / 2**30:.2f}" for memory in memories)
    row = rf"\| {re.escape(method)} +\| +{alone} \| +{shared} \|"
    assert re.search(row, (ROOT / "docs/devices.md").read_text())


def test_no_weight_is_computed():
    def initializer(shape, dtype=None):
        raise AssertionError("A weight was computed.")

    def make_model():
        dense = keras.layers.Dense(3, kernel_initializer=initializer)
        query = keras.layers.Dense(
            3, kernel_initializer=initializer, name="query"
        )
        model = keras.Sequential([keras.Input((4,)), dense, query])
        keras_fvae.enable_fvae_lora(model, rank=2)
        return model

    memory = keras_fvae.memory_per_device(make_model)
    assert memory.frozen_weights == 4 * (4 * 3 + 3 + 3 * 3 + 3)


def test_nothing_is_left_behind():
    keras_fvae.memory_per_device(lambda: make_large(lambda backbone: None))
    # Where Keras would give values to what has none yet.
    with keras.StatelessScope():
        pass
    assert keras.distribution.distribution() is None


def test_bad_arguments():
    backbone = make_backbone("llama")
    with pytest.raises(TypeError, match="must be a function that makes"):
        keras_fvae.memory_per_device(backbone)
    with pytest.raises(TypeError, match="must return a `keras.Model`"):
        keras_fvae.memory_per_device(lambda: None)
    with pytest.raises(ValueError, match="must be 0 or more.*-1"):
        keras_fvae.memory_per_device(lambda: backbone, optimizer_slots=-1)
    with pytest.raises(ValueError, match="is not compiled.*backbone alone"):
        keras_fvae.memory_per_device(
            lambda: keras_hub.models.LlamaCausalLM(make_backbone("llama"))
        )
    with pytest.raises(ValueError, match="'unbuilt' is not built"):
        keras_fvae.memory_per_device(
            lambda: keras.Sequential([keras.layers.Dense(3)], name="unbuilt")
        )
    distribution = distribution_on(24)
    with pytest.raises(ValueError, match="size 4096 by 24.*attention"):
        keras_fvae.memory_per_device(
            lambda: make_large(lambda backbone: None), distribution
        )
    assert keras.distribution.distribution() is None
