"""As `benchmarks/peft_steps.py`, by this package, on PyTorch.

python -m benchmarks.keras_steps ROUNDS METHOD [METHOD ...]
"""

import functools
import sys

import keras

import keras_fvae
from benchmarks import models
from benchmarks.block_steps import NUM_BLOCKS
from benchmarks.block_steps import NUM_HEADS
from benchmarks.block_steps import NUM_TOKENS
from benchmarks.block_steps import RANK
from benchmarks.block_steps import WIDTH
from benchmarks.block_steps import take_steps

# By what PEFT's are called in `benchmarks/peft_steps.py`.
CONFIGS = {"LoRA": models.CONFIGS["LoRA on x"], **models.CONFIGS}


def add_block(x):
    """The block of `benchmarks/peft_steps.py`, of Keras's layers."""
    shape = NUM_TOKENS, NUM_HEADS, -1
    y = keras.layers.LayerNormalization(epsilon=1e-6)(x)
    query, key, value = (
        keras.layers.Reshape(shape)(keras.layers.Dense(WIDTH, name=name)(y))
        for name in unique("query", "key", "value")
    )
    y = keras.ops.dot_product_attention(query, key, value)
    y = keras.layers.Reshape((NUM_TOKENS, WIDTH))(y)
    x = x + keras.layers.Dense(WIDTH)(y)
    y = keras.layers.LayerNormalization(epsilon=1e-6)(x)
    gelu = functools.partial(keras.ops.gelu, approximate=False)
    y = keras.layers.Dense(4 * WIDTH, activation=gelu)(y)
    return x + keras.layers.Dense(WIDTH)(y)


def unique(*names):
    return [f"{name}_{keras.backend.get_uid(name)}" for name in names]


def make(method):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((NUM_TOKENS, WIDTH))
    for _ in range(NUM_BLOCKS):
        x = add_block(x)
    model = keras.Model(inputs, x)
    keras_fvae.enable_adapter(
        model,
        CONFIGS[method](RANK),
        lambda layer: layer.name.startswith(("query", "value")),
    )
    return model


def main(rounds, methods):
    models = {}
    for method in methods:
        model = make(method)
        trained = [weight.value for weight in model.trainable_weights]
        models[method] = functools.partial(model, training=True), trained
    take_steps(models, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
