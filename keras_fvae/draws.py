"""Random numbers from the state of a `keras.random.SeedGenerator`."""

import math

import keras
from keras import ops

from keras_fvae.replicas import replica_index

# What `to_normal` takes.
NUMBERS_PER_NORMAL = 2


def seed(seed_generator):
    """What a call of `uniform` draws from.

    Args:
        seed_generator: `keras.random.SeedGenerator`, whose state moves on.

    Returns:
        Integer tensor, from which the same numbers come each time. On PyTorch
        the generator itself, as Keras takes no tensor there.
    """
    if keras.config.backend() == "torch":
        return seed_generator
    return seed_generator.next()


def uniform(shape, seed):
    """Uniform random numbers in `[0, 2**32]`.

    As they come: to get to `[0, 1)` takes operations, which XLA repeats
    wherever the numbers are read.

    Args:
        shape: Tuple of integers or scalar tensors.
        seed: What `seed` returned.

    Returns:
        Tensor of integers, on PyTorch of floats.
    """
    if keras.config.backend() == "torch":
        return keras.random.uniform(
            shape, 0.0, 2.0**32, dtype="float32", seed=seed
        )
    return _random_bits(shape, seed)


def are_at_least(numbers, share):
    """Which numbers are not among the smallest.

    Args:
        numbers: Tensor that `uniform` returned.
        share: Float in `[0, 1)`, that of the smallest.

    Returns:
        Boolean tensor of the same shape.
    """
    return numbers >= ops.convert_to_tensor(round(share * 2**32), numbers.dtype)


def to_normal(numbers):
    """Standard normal numbers from uniform ones, by Box and Muller's method.

    Two for each, so that noise and dropout can share one call to the
    generator. The inverse of the normal CDF needs one, and three times the
    code to compile.

    Args:
        numbers: Tensor of shape `(..., 2 * n)` that `uniform` returned.

    Returns:
        Float32 tensor of shape `(..., n)`.
    """
    first, second = ops.split(ops.cast(numbers, "float32"), 2, axis=-1)
    # The logarithm of 0 is minus infinity.
    radius = ops.sqrt(-2 * ops.log(2.0**-32 * first + 2.0**-33))
    return radius * ops.cos(2.0**-31 * math.pi * second)


def _random_bits(shape, seed):
    """Integer tensor of uniform numbers in `[0, 2**32)`."""
    if keras.config.backend() == "jax":
        import jax

        # JAX counts along one axis in fewer operations than along several.
        bits = jax.random.bits(seed, (math.prod(shape),), "uint32")
        return ops.reshape(bits, shape)
    return _philox(shape, seed)


def _philox(shape, seed):
    """TensorFlow's Philox, with the seed as its key.

    `keras.random` leaves the choice of the key to TensorFlow. On CPUs XLA then
    works the key out anew for each number, which takes a hundred times as long
    as the numbers do, and is three quarters of the code to compile.
    """
    import tensorflow as tf

    key, count = tf.unstack(tf.cast(seed, "uint64"))
    # The state is the same on all replicas, which are to draw different ones.
    first = tf.cast(replica_index(), "uint64") * 2**48
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=shape,
        key=[key],
        # The upper half of its counter is that of the calls, so no two calls
        # share a number.
        counter=[first, count],
        alg=tf.random.Algorithm.PHILOX.value,
        dtype="uint32",
    )
