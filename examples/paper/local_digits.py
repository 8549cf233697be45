"""Scikit-learn's handwritten digits, and a small vision transformer."""

import dataclasses
import functools
import hashlib
import pathlib

import keras
import keras_hub
import numpy as np
import sklearn
import sklearn.datasets
import sklearn.model_selection

from examples.paper import local_data
from examples.paper.local_data import LocalDataset
from examples.paper.local_data import Part

# What the colour of a picture says of its label in training.
AGREEMENT = 0.95
COLORS = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25]], "float32")
GROUP_NAMES = np.array(["0-4, red", "0-4, green", "5-9, red", "5-9, green"])
# Of networks that tell all ten digits, by `examples.paper.digit_pretraining`.
WEIGHTS = pathlib.Path(__file__).parent / "digit_weights"
VIT_WEIGHTS = WEIGHTS / "vit.weights.h5"


@functools.cache
def read_digits():
    """Scikit-learn's digits: 900 to pretrain on, and the others.

    Returns:
        Two pairs of pictures, of shape `(examples, 8, 8)` from 0 to 1, and
        digits.
    """
    digits = sklearn.datasets.load_digits()
    pictures = (digits.images / 16.0).astype("float32")
    first, others, first_digits, other_digits = (
        sklearn.model_selection.train_test_split(
            pictures,
            digits.target,
            train_size=900,
            stratify=digits.target,
            random_state=0,
        )
    )
    return (first, first_digits), (others, other_digits)


def split_digits(seed):
    """Pictures and digits to train (450), validate (150) and test on."""
    _, (pictures, digits) = read_digits()
    split = functools.partial(
        sklearn.model_selection.train_test_split, random_state=seed
    )
    train, others = split(
        np.arange(len(digits)), train_size=450, stratify=digits
    )
    validation, test = split(others, train_size=150, stratify=digits[others])
    return {
        name: (pictures[indices], digits[indices])
        for name, indices in (
            ("train", train),
            ("validation", validation),
            ("test", test),
        )
    }


def read_patches():
    """Patches of photos, in grey, of the digits' size."""
    patches = local_data.read_patches(8).mean(axis=-1) / 255
    return to_rgb(patches.astype("float32"))


def load_turned_digits(seed):
    """Digits that are turned by a quarter, in ten classes."""
    parts = {
        name: Part(to_rgb(np.rot90(pictures, axes=(1, 2))), digits)
        for name, (pictures, digits) in split_digits(seed).items()
    }
    return {**parts, "foreign": Part(read_patches())}


def load_coloured_digits(seed):
    """0 to 4 against 5 to 9, in colours that go with that in training.

    In validation and test each picture is there in both colours.
    """
    rng = np.random.default_rng(seed)
    parts = {}
    for name, (pictures, digits) in split_digits(seed).items():
        labels = (digits >= 5).astype("int32")
        if name == "train":
            agrees = rng.random(len(labels)) < AGREEMENT
            colors = np.where(agrees, labels, 1 - labels)
        else:
            colors = np.repeat([0, 1], len(labels))
            pictures, labels = np.tile(pictures, (2, 1, 1)), np.tile(labels, 2)
        x = to_rgb(pictures) * COLORS[colors][:, None, None]
        parts[name] = Part(x, labels, GROUP_NAMES[2 * labels + colors])
    patches = read_patches()
    colors = rng.integers(0, 2, len(patches))
    parts["foreign"] = Part(patches * COLORS[colors][:, None, None])
    return parts


def to_rgb(pictures):
    return np.repeat(pictures[..., None], 3, axis=-1)


def make_digit_backbone():
    return keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,
        num_layers=4,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
    )


def make_vit_classifier(num_classes=10):
    return keras_hub.models.ViTImageClassifier(
        make_digit_backbone(),
        num_classes=num_classes,
        preprocessor=None,
        pooling="gap",
    )


def make_pretrained(make_classifier, weights_file, seed, **options):
    """A pretrained classifier, with a new head.

    Args:
        make_classifier: Function that returns a KerasHub classifier.
        weights_file: `pathlib.Path`, what `digit_pretraining` wrote of its
            backbone.
        seed: Integer, what the head begins with.
        **options: What `make_classifier` makes the head by.

    Returns:
        KerasHub classifier.
    """
    keras.utils.set_random_seed(seed)
    model = make_classifier(**options)
    model.backbone.load_weights(weights_file)
    return model


def version(weights_file):
    """String, of what a result on digits depends on.

    The pretrained weights belong to it, because the training is another one
    with others.
    """
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()[:8]
    return f"{sklearn.__version__}, weights {digest}"


make_digit_classifier = functools.partial(
    make_pretrained, make_vit_classifier, VIT_WEIGHTS
)


DIGITS = LocalDataset(
    version(VIT_WEIGHTS),
    15,
    load_turned_digits,
    make_digit_classifier,
)
SPURIOUS_DIGITS = dataclasses.replace(
    DIGITS,
    load=load_coloured_digits,
    make_classifier=functools.partial(make_digit_classifier, num_classes=2),
)
