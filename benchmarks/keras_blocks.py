"""Blocks of ViT-B/16's size of Keras's layers, adapted by this package."""

import functools

import keras

import keras_fvae

NUM_BLOCKS, BATCH_SIZE, NUM_TOKENS, WIDTH, NUM_HEADS = 4, 8, 197, 768, 12
RANK = 16


def make_blocks():
    """A `keras.Model` of the blocks, frozen."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((NUM_TOKENS, WIDTH))
    for _ in range(NUM_BLOCKS):
        x = add_block(x)
    model = keras.Model(inputs, x)
    model.trainable = False
    return model


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


def make(config):
    """The blocks, with the queries and values adapted.

    Args:
        config: Config of a method.
    """
    model = make_blocks()
    keras_fvae.enable_adapter(
        model,
        config,
        lambda layer: layer.name.startswith(("query", "value")),
    )
    return model
