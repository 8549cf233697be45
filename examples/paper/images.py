"""Image data sets: which version, which splits, how pictures are prepared."""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from examples.paper import data

# Pictures, of which 4096 of 224 x 224 pixels take 0.6 GB.
SHUFFLE_BUFFER = 4096
# Labels that are read at a time.
READ_BATCH = 1024


def label_of(example):
    return example["label"]


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Pictures and their labels, from tensorflow-datasets.

    Args:
        builder: String, the name of the builder, with its config.
        version: String.
        num_classes: Integer.
        train: String, the split to train on.
        test: String, the split to test on.
        validation: String, the split to choose by. `None` (default) means a
            tenth of `train`, another one for each seed.
        halves: Boolean. Whether a half of the test split is the validation
            data, another half for each seed.
        label: Function of an example that returns its class.
        group: Function of an example that returns the number of its group.
        group_names: Tuple of strings, the names of the groups.
    """

    builder: str
    version: str
    num_classes: int
    train: str = "train"
    test: str = "test"
    validation: str | None = None
    halves: bool = False
    label: Callable = label_of
    group: Callable | None = None
    group_names: tuple = ()

    def split(self, part, seed):
        """String, the slices of "train", "validation" or "test"."""
        if part == "test" or (part == "validation" and self.halves):
            return self.test
        if self.validation is not None or self.halves:
            return self.train if part == "train" else self.validation
        # Another tenth for each of the seeds 1, 2 and 42.
        tenth = (seed + seed // 10) % 10
        begin, end = f"{10 * tenth}%", f"{10 * tenth + 10}%"
        slices = {
            "validation": [f"[{begin}:{end}]"],
            "train": [f"[:{begin}]", f"[{end}:]"],
        }[part]
        return "+".join(
            split + slice_
            for split in self.train.split("+")
            for slice_ in slices
            # TFDS reads no empty slices.
            if slice_ not in ("[:0%]", "[100%:]")
        )

    def read(self, part, seed, with_pictures=True):
        """A `tf.data.Dataset` of the examples of a part, in a fixed order.

        Args:
            part: String, "train", "validation" or "test".
            seed: Integer, of the run: it chooses the validation data.
            with_pictures: Boolean. Whether to decode the pictures.
        """
        decoders = {"image": tfds.decode.SkipDecoding()}
        examples = data.load(
            self.builder,
            self.version,
            self.split(part, seed),
            decoders=None if with_pictures else decoders,
        )
        if not self.halves or part == "train":
            return examples
        # The authors' shuffle of the test split, and the halves of it.
        num_examples = int(examples.cardinality())
        order = np.random.default_rng(seed).permutation(num_examples)
        is_chosen = (order >= num_examples // 2) == (part == "test")
        chosen = tf.constant(is_chosen)
        return (
            examples.enumerate()
            .filter(lambda i, _: chosen[i])
            .map(lambda _, example: example)
            .apply(tf.data.experimental.assert_cardinality(is_chosen.sum()))
        )


def load(dataset, part, seed, settings):
    """Batches of pictures and labels.

    As the authors' code does it: the shorter side is resized to that of the
    model's input, the middle is cut out, and values go from -1 to 1. Its
    flips and random crops are written, but never run, so there are none.

    Args:
        dataset: `ImageDataset`.
        part: String, "train" (shuffled), "validation" or "test".
        seed: Integer.
        settings: Dict: `side`, the pixels of a picture's side; `batch_size`;
            `num_examples`, how many to take at most, `None` for all.

    Returns:
        A `tf.data.Dataset` of pairs: float32 pictures of shape `(batch, side,
        side, 3)`, and integers of shape `(batch,)`.
    """

    def prepare(example):
        picture = resize(example["image"], settings["side"])
        return picture, tf.cast(dataset.label(example), tf.int32)

    def normalize(pictures, labels):
        return tf.cast(pictures, tf.float32) / 127.5 - 1.0, labels

    examples = dataset.read(part, seed)
    if settings["num_examples"]:
        examples = examples.take(settings["num_examples"])
    pairs = examples.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    if part == "train":
        pairs = pairs.shuffle(SHUFFLE_BUFFER, seed=seed)
    batches = pairs.batch(settings["batch_size"])
    return batches.map(normalize).prefetch(tf.data.AUTOTUNE)


def load_parts(dataset, seed, settings):
    """What `load` returns for the training, validation and test data."""
    return [
        load(dataset, part, seed, settings)
        for part in ("train", "validation", "test")
    ]


def without_labels(pairs):
    """The pictures alone, of what `load` returned."""
    return pairs.map(lambda pictures, labels: pictures)


def resize(picture, side):
    """The middle of a picture, as uint8 of shape `(side, side, 3)`."""
    if picture.shape[-1] == 1:
        picture = tf.image.grayscale_to_rgb(picture)
    shape = tf.cast(tf.shape(picture)[:2], tf.float32)
    scale = side / tf.reduce_min(shape)
    size = tf.maximum(tf.cast(tf.round(shape * scale), tf.int32), side)
    picture = tf.image.resize(picture, size, antialias=True)
    picture = tf.image.resize_with_crop_or_pad(picture, side, side)
    # Rounded, as an image library would.
    return tf.cast(tf.clip_by_value(tf.round(picture), 0, 255), tf.uint8)


def labels_and_groups(dataset, part, seed, settings):
    """The classes of a part, and the names of the groups if there are any.

    Returns:
        Pair of arrays of shape `(examples,)`; the second one is `None` if the
        data set has no groups.
    """

    def numbers(example):
        label = tf.cast(dataset.label(example), tf.int32)
        group = dataset.group(example) if dataset.group else 0
        return label, tf.cast(group, tf.int32)

    examples = dataset.read(part, seed, with_pictures=False)
    if settings["num_examples"]:
        examples = examples.take(settings["num_examples"])
    batches = examples.map(numbers).batch(READ_BATCH).as_numpy_iterator()
    labels, groups = map(np.concatenate, zip(*batches))
    if dataset.group is None:
        return labels, None
    return labels, np.array(dataset.group_names)[groups]
