"""The same weights and noise give the same losses on every backend."""

import json
import sys

import family
import keras
import numpy as np
from helpers import NEXT_BACKEND
from helpers import remove_latent_noise
from helpers import run_python

import keras_fvae


def train():
    """Losses of a run in which nothing depends on a backend's generator."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(50, 8, mask_zero=True)(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_fvae.enable_fvae_lora(
        model,
        rank=3,
        decoder_units=(6,),
        dropout=0.0,
        elbo_weight=0.1,
        trainable_layer_names=["head"],
    )
    for weight in model.weights:
        weight.assign(rng.normal(scale=0.3, size=weight.shape))
    remove_latent_noise(model)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    tokens = rng.integers(1, 50, (8, 6))
    tokens[2, 3:] = 0
    history = model.fit(
        tokens,
        rng.normal(size=(8, 3)),
        batch_size=4,
        epochs=4,
        shuffle=False,
        verbose=0,
    )
    return history.history["loss"]


def train_family():
    """By method, the losses of a run from the same weights."""
    losses = {}
    for name in ("LoRA", "PiSSA", "DoRA", "HiRA"):
        rng = np.random.default_rng(0)
        model = family.adapt(family.make_model(), name)
        for weight in model.weights:
            weight.assign(rng.normal(scale=0.3, size=weight.shape))
        losses[name] = family.train(model)
    return losses


def test_same_losses_as_on_another_backend():
    output = run_python(__file__, backend=NEXT_BACKEND).stdout
    theirs = json.loads(output.splitlines()[-1])
    ours = train()
    assert ours[-1] < ours[0] - 0.1
    np.testing.assert_allclose(ours, theirs["FVAE-LoRA"], rtol=1e-5)
    losses = train_family()
    assert {*losses} == {*theirs["family"]}
    for name, values in theirs["family"].items():
        np.testing.assert_allclose(losses[name], values, rtol=1e-5)


if __name__ == "__main__":
    results = {"FVAE-LoRA": train(), "family": train_family()}
    json.dump(results, sys.stdout)
