"""Emoji of two designers, and the upper blocks of EfficientNet-Lite0.

What the lower blocks make of the pictures is computed once, because no method
changes it.
"""

import functools
import random

import keras
import numpy as np
from keras import ops

from examples.paper import efficientnet_lite0
from examples.paper import local_data
from examples.paper.local_data import LocalDataset
from examples.paper.local_data import Part

EMOJI_VERSION = "1.0.0"
SAME, OTHER = "google", "twitter"
# Of an emoji that is put together of others.
JOINER = "200D"
NUM_CLASSES = 9
# With fewer pixels a head alone does worse; more of them take longer.
SIDE = 97
# Above it are three convolutions of size 1, and one that is depthwise.
LAST_LOWER_LAYER = "block6d_add"


@functools.cache
def make_lower_blocks():
    """What pictures go through before the blocks that are adapted."""
    backbone = efficientnet_lite0.make_backbone(SIDE)
    return keras.Model(
        backbone.inputs, backbone.get_layer(LAST_LOWER_LAYER).output
    )


def encode(pictures):
    """What the lower blocks make of pictures.

    Args:
        pictures: Array of shape `(examples, height, width, 3)`, 0 to 255.

    Returns:
        Array, the inputs of what `make_emoji_classifier` returns.
    """
    pictures = ops.image.resize(ops.cast(pictures, "float32"), (SIDE, SIDE))
    inputs = efficientnet_lite0.normalize(ops.convert_to_numpy(pictures))
    return make_lower_blocks().predict(inputs, verbose=0)


def on_white(pictures):
    """Pictures with a channel that says how opaque they are, before white."""
    colors, opacity = np.split(pictures.astype("float32"), [3], axis=-1)
    return 255 + (colors - 255) * opacity / 255


@functools.cache
def read_emoji():
    """Emoji as each of the designers has drawn them, in the same order.

    Those that are put together of others, such as a woman and a tractor, are
    left out: most of them look like one of the others.

    Returns:
        Dict of designer to `Part`.
    """
    # It takes TensorFlow, which other data sets can do without.
    from examples.paper import data

    dataset = data.load("paper_emoji", EMOJI_VERSION, "train")
    examples = [
        example
        for example in dataset.as_numpy_iterator()
        if JOINER not in example["code_points"].decode().split("-")
    ]
    random.Random(0).shuffle(examples)
    labels = np.array([example["label"] for example in examples])
    return {
        designer: Part(
            encode(on_white(np.stack([e[designer] for e in examples]))), labels
        )
        for designer in (SAME, OTHER)
    }


def load_emoji(seed):
    """Emoji of one designer to train on, and others of both to test on.

    Args:
        seed: Integer, which are validated on.

    Returns:
        As `LocalDataset.load`.
    """
    emoji = read_emoji()
    num_test = len(emoji[SAME].labels) // 4
    whole = emoji[SAME].take(slice(num_test, None))
    train, validation = local_data.split(
        len(whole.labels), np.random.default_rng(seed)
    )
    return {
        "train": whole.take(train),
        "validation": whole.take(validation),
        "test": local_data.with_groups(
            {
                "same designer": emoji[SAME].take(slice(num_test)),
                "other designer": emoji[OTHER].take(slice(num_test)),
            }
        ),
        "foreign": foreign_part(),
    }


@functools.cache
def foreign_part():
    """Patches of photos."""
    return Part(encode(local_data.read_patches(64)))


def make_emoji_classifier(seed):
    """The upper blocks of EfficientNet-Lite0, with a new head."""
    keras.utils.set_random_seed(seed)
    whole = efficientnet_lite0.make_backbone(SIDE)
    backbone = keras.Model(
        whole.get_layer(LAST_LOWER_LAYER).output, whole.output
    )
    inputs = keras.Input(backbone.input_shape[1:])
    x = keras.layers.GlobalAveragePooling2D()(backbone(inputs))
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(NUM_CLASSES)(x))
    model.backbone = backbone
    return model


def made_up_emoji():
    """As `mock.emoji`."""
    # As above.
    from examples.paper import mock

    return mock.emoji()


EMOJI = LocalDataset(
    EMOJI_VERSION,
    10,
    load_emoji,
    make_emoji_classifier,
    made_up_emoji,
    target_layer_names="all-conv",
)
