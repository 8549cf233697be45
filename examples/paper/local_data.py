"""What the data sets of `examples.paper.local` are made of."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import sklearn.datasets
import sklearn.feature_extraction.image

# Of what there is to train on.
VALIDATION_SHARE = 1 / 6
# Of each of two photos.
NUM_PATCHES = 150


@dataclasses.dataclass(frozen=True)
class Part:
    """Data to train, validate or test on.

    Args:
        x: Array, or dict of arrays.
        labels: Array of shape `(examples,)`, the classes; `None` for what
            belongs to none.
        groups: Optional array of that shape, the names of the groups.
    """

    x: object
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None

    def take(self, indices):
        """Some of the examples.

        Args:
            indices: Array of integers, or slice.

        Returns:
            `Part`.
        """

        def chosen(array):
            return None if array is None else array[indices]

        return Part(
            keras.tree.map_structure(chosen, self.x),
            chosen(self.labels),
            chosen(self.groups),
        )

    def join(self, other):
        """`Part` of these examples and another's, without groups."""
        return Part(
            keras.tree.map_structure(
                lambda *arrays: np.concatenate(arrays), self.x, other.x
            ),
            np.concatenate([self.labels, other.labels]),
        )


@dataclasses.dataclass(frozen=True)
class LocalDataset:
    """A data set with the model that is fine-tuned on it.

    Args:
        version: String, of what the data come from.
        epochs: Integer, how often a run sees the training data.
        load: Function of a seed that returns a dict of "train", "validation",
            "test" and "foreign", of inputs of no class, to `Part`.
        make_classifier: Function of a seed that returns a pretrained
            classifier with a new head. It has a `backbone`.
        stand_in: Function that returns a context manager, inside which data
            that may not be there are made up, for a toy.
        target_layer_names: Which layers of the backbone to adapt, as in
            `keras_fvae.enable_adapter`.
    """

    version: str
    epochs: int
    load: Callable
    make_classifier: Callable
    stand_in: Callable = contextlib.nullcontext
    target_layer_names: object = None


def split(num_examples, rng):
    """The indices of examples to train on, and to validate on."""
    order = rng.permutation(num_examples)
    num_validation = round(num_examples * VALIDATION_SHARE)
    return order[num_validation:], order[:num_validation]


def with_groups(parts):
    """One `Part` of two, which are its groups.

    Args:
        parts: Dict of the name of a group to `Part`. They have as many
            examples.
    """
    first, second = parts.values()
    groups = np.array([*parts]).repeat(len(first.labels))
    return dataclasses.replace(first.join(second), groups=groups)


@functools.cache
def read_patches(side):
    """Patches of two photos, which belong to no class.

    Args:
        side: Integer, their pixels.

    Returns:
        Array of uint8, of shape `(examples, side, side, 3)`.
    """
    patches = [
        sklearn.feature_extraction.image.extract_patches_2d(
            photo, (side, side), max_patches=NUM_PATCHES, random_state=0
        )
        for photo in sklearn.datasets.load_sample_images().images
    ]
    return np.random.default_rng(0).permutation(np.concatenate(patches))
