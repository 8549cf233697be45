"""Backbones for the tests on several devices and in several processes."""

import keras
import keras_hub
import numpy as np
from helpers import move_adapters

LLAMA = {
    "vocabulary_size": 64,
    "num_layers": 1,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}
GEMMA = {**LLAMA, "head_dim": 6, "intermediate_dim": 128}
BACKBONES = {
    "llama": (keras_hub.models.LlamaBackbone, LLAMA),
    "gemma": (keras_hub.models.GemmaBackbone, GEMMA),
}
CONFIG = {"rank": 3, "decoder_units": (8,), "elbo_weight": 0.5, "seed": 7}


def make_batch():
    """Sequences of unequal lengths, so that devices have unequal shares."""
    rng = np.random.default_rng(0)
    lengths = np.array([12, 12, 11, 9, 3, 2, 1, 1])
    inputs = {
        "token_ids": rng.integers(0, 64, (8, 12)),
        "padding_mask": (np.arange(12) < lengths[:, None]).astype("int32"),
    }
    return inputs, rng.normal(size=(8, 12, 32)).astype("float32")


def model_parallel(layout_map):
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def make_backbone(name):
    keras.utils.set_random_seed(0)
    cls, config = BACKBONES[name]
    return cls(**config)


def enable(backbone, **options):
    summary = backbone.enable_fvae_lora(**{**CONFIG, **options})
    move_adapters(backbone, np.random.default_rng(1), scale=0.1)
    return summary


def fit(backbone, batch):
    backbone.compile(keras.optimizers.Adam(1e-2), "mse")
    history = backbone.fit(
        *batch, batch_size=8, epochs=2, shuffle=False, verbose=0
    )
    return history.history["loss"]
