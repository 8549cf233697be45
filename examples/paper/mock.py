"""What stands in for data sets that are not there, at the size "tiny".

All but the reading of files is as it ever is.
"""

import contextlib

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking

NUM_EXAMPLES = 48
# Of a phone that is made up.
PHONE_SAMPLES = 500


@contextlib.contextmanager
def examples_from(make):
    """Has TensorFlow Datasets give made-up examples, inside the block.

    Args:
        make: Function of a builder and the name of a split that returns the
            examples, a list of dicts of what the builder's features say.
    """

    def as_dataset(builder, split, **kwargs):
        examples = make(builder, split)
        signature = tf.nest.map_structure(
            lambda info: tf.TensorSpec(info.shape, info.dtype),
            builder.info.features.get_tensor_info(),
        )
        return tf.data.Dataset.from_generator(
            lambda: iter(examples), output_signature=signature
        ).apply(tf.data.experimental.assert_cardinality(len(examples)))

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        yield


def generator_of(name):
    """A random generator that draws the same for the same name each time."""
    return np.random.default_rng(sum(map(ord, name)))


def pictures(dataset):
    """Has pictures made up, inside a block.

    The more there is of red in a picture, the higher its class, so that there
    is something to learn.

    Args:
        dataset: `ImageDataset`.
    """

    def make_one(features, rng):
        (example,) = mocking.RandomFakeGenerator(
            features, 1, seed=int(rng.integers(2**31))
        )
        share = int(dataset.label(example)) / dataset.num_classes
        # Of a size of its own, where the data set's are.
        shape = [
            side or rng.integers(20, 40) for side in features["image"].shape
        ]
        picture = rng.integers(0, 80, shape, "uint8")
        picture[..., 0] += np.uint8(170 * share)
        return {**example, "image": picture}

    def make(builder, split):
        rng = generator_of(split)
        features = builder.info.features
        return [make_one(features, rng) for _ in range(NUM_EXAMPLES)]

    return examples_from(make)


def glosses():
    """Has WordNet's glosses made up, inside a block: a word says the label."""

    def make(builder, split):
        labels = np.arange(NUM_EXAMPLES) % 4
        names = builder.info.features["label"].names
        return [
            {"gloss": f"{number} of {names[label]}", "label": label}
            for number, label in enumerate(labels)
        ]

    return examples_from(make)


def emoji():
    """Has emoji made up, inside a block: a shade of grey says the group.

    One of eight is put together of others.
    """

    def make(builder, split):
        rng = generator_of(split)
        features = builder.info.features
        num_groups = features["label"].num_classes
        labels = np.arange(NUM_EXAMPLES) % num_groups
        return [
            {
                **{
                    designer: rng.integers(0, 50, (64, 64, 4), "uint8")
                    + np.uint8(200 * label / num_groups)
                    for designer in ("google", "twitter")
                },
                "code_points": f"{number:X}" + "-200D-0" * (number % 8 == 0),
                "label": label,
            }
            for number, label in enumerate(labels)
        ]

    return examples_from(make)


def speech():
    """Has utterances made up, inside a block: each phone is a tone."""

    def make_one(rng):
        phones = rng.integers(0, 4, rng.integers(2, 5))
        time = np.arange(PHONE_SAMPLES)
        tones = [np.sin(0.1 * 2.0**phone * time) for phone in phones]
        noise = 0.05 * rng.normal(size=len(phones) * PHONE_SAMPLES)
        waveform = 10_000 * (np.concatenate(tones) + noise)
        return {
            "audio": waveform.astype("int16"),
            "phones": phones,
            "speaker": "made up",
            "utterance": str(rng.integers(10**6)),
        }

    def make(builder, split):
        rng = generator_of(split)
        return [make_one(rng) for _ in range(NUM_EXAMPLES)]

    return examples_from(make)
