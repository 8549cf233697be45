"""Random numbers from the state of a `keras.random.SeedGenerator`."""

import keras
from keras import ops

from keras_fvae.replicas import replica_index


def seeds(seed_generator, count):
    """What so many calls of `uniform` draw from.

    Args:
        seed_generator: `keras.random.SeedGenerator`, whose state moves on.
        count: Integer.

    Returns:
        List of integer tensors, from which the same numbers come each time.
        On PyTorch of the generator itself, as Keras takes no tensor there.
    """
    if keras.config.backend() == "torch":
        return [seed_generator] * count
    return [seed_generator.next() for _ in range(count)]


def uniform(shape, seed):
    """Uniform random numbers in `[0, 1)`.

    Args:
        shape: Tuple of integers or scalar tensors.
        seed: One of what `seeds` returned.

    Returns:
        Float32 tensor.
    """
    if keras.config.backend() == "tensorflow":
        return _philox(shape, seed)
    return keras.random.uniform(shape, dtype="float32", seed=seed)


def to_normal(numbers):
    """Standard normal numbers from uniform ones, by the inverse of their CDF.

    One call to the generator can so serve for both kinds. It costs more than
    its numbers do, most of all to compile.

    Args:
        numbers: Float32 tensor of uniform numbers in `[0, 1)`.

    Returns:
        Float32 tensor.
    """
    # Half a step up, since the inverse of 0 is minus infinity.
    return 2**0.5 * ops.erfinv(2 * numbers - (1 - 2**-24))


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
    return tf.raw_ops.StatelessRandomUniformV2(
        shape=shape,
        key=[key],
        # The upper half of its counter is that of the calls, so no two calls
        # share a number.
        counter=[first, count],
        alg=tf.random.Algorithm.PHILOX.value,
    )
