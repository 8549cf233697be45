"""Scikit-learn's handwritten digits, and a small vision transformer."""

import functools

import keras
import keras_hub
import numpy as np
import sklearn
import sklearn.datasets
import sklearn.model_selection
from keras import ops

from examples.paper import local_data
from examples.paper.local_data import LocalDataset
from examples.paper.local_data import Part

# What the colour of a picture says of its label in training.
AGREEMENT = 0.95
COLORS = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25]], "float32")
GROUP_NAMES = np.array(["0-4, red", "0-4, green", "5-9, red", "5-9, green"])
PRETRAINING_EPOCHS = 60


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


@functools.cache
def pretrained_weights(make_classifier, num_epochs, enlarge):
    """The weights of a backbone that tells all ten digits, without colour.

    Args:
        make_classifier: Function that returns a KerasHub classifier of ten
            classes.
        num_epochs: Integer.
        enlarge: Function that makes of pictures of the digits' size what the
            classifier takes.

    Returns:
        List of arrays.
    """
    (pictures, digits), _ = read_digits()
    keras.utils.set_random_seed(0)
    model = make_classifier()
    model.compile(
        keras.optimizers.AdamW(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    shift = keras.layers.RandomTranslation(0.125, 0.125, fill_mode="constant")
    for _ in range(num_epochs):
        shifted = ops.convert_to_numpy(shift(to_rgb(pictures), training=True))
        # Of `keras.Model`, because KerasHub's own makes batches once more.
        keras.Model.fit(
            model, enlarge(shifted), digits, batch_size=32, verbose=0
        )
    return model.backbone.get_weights()


def as_it_is(pictures):
    return pictures


def make_vit_classifier(num_classes=10):
    return keras_hub.models.ViTImageClassifier(
        make_digit_backbone(),
        num_classes=num_classes,
        preprocessor=None,
        pooling="gap",
    )


def make_pretrained(make_classifier, enlarge, seed, is_tiny, **options):
    """A pretrained classifier, with a new head.

    Args:
        make_classifier: As in `pretrained_weights`.
        enlarge: As in `pretrained_weights`.
        seed: Integer, what the head begins with.
        is_tiny: Boolean. Whether a toy will do.
        **options: What `make_classifier` makes the head by.

    Returns:
        KerasHub classifier.
    """
    num_epochs = 1 if is_tiny else PRETRAINING_EPOCHS
    weights = pretrained_weights(make_classifier, num_epochs, enlarge)
    # After the pretraining, which is of the first run alone.
    keras.utils.set_random_seed(seed)
    model = make_classifier(**options)
    model.backbone.set_weights(weights)
    return model


make_digit_classifier = functools.partial(
    make_pretrained, make_vit_classifier, as_it_is
)


DIGITS = LocalDataset(
    sklearn.__version__,
    15,
    load_turned_digits,
    make_digit_classifier,
)
SPURIOUS_DIGITS = LocalDataset(
    sklearn.__version__,
    15,
    load_coloured_digits,
    functools.partial(make_digit_classifier, num_classes=2),
)
