"""Reading of TensorFlow Datasets' data sets, one of which may be missing."""

import keras
import tensorflow as tf
import tensorflow_datasets as tfds

from examples.paper import builders  # noqa: F401  They register by import.
from examples.paper.harness import required

is_reader = keras.config.backend() != "tensorflow"
if is_reader and tf.config.list_physical_devices("GPU"):
    # TensorFlow reads the data alone, and would take a GPU's whole memory.
    tf.config.set_visible_devices([], "GPU")


def load(name, version, split, decoders=None):
    """Reads a split, after downloading and preparing it if need be.

    Args:
        name: String, the name of the builder, with its config.
        version: String.
        split: String, with slices if wanted.
        decoders: Optional dict, as in `tfds.load`.

    Returns:
        A `tf.data.Dataset` of dicts, in a fixed order.

    Raises:
        MissingDataError: If the data set cannot be prepared; the message says
            why, and what there is to do.
    """
    builder = tfds.builder(f"{name}:{version}")
    with required(f"The data set '{name}'"):
        builder.download_and_prepare()
    return builder.as_dataset(split=split, decoders=decoders)
