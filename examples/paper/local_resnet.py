"""Scikit-learn's digits, enlarged, and a small ResNet.

For what a larger convolution gains by an adapter, beside those of size 1.
"""

import dataclasses
import functools

import keras_hub

from examples.paper import local_digits
from examples.paper.local_data import LocalDataset
from examples.paper.local_data import Part

# A ResNet halves what it sees four times.
ENLARGEMENT = 4
RESNET_WEIGHTS = local_digits.WEIGHTS / "resnet.weights.h5"


def enlarge(pictures):
    """Array of shape `(examples, 32, 32, 3)`, of one a quarter as wide."""
    return pictures.repeat(ENLARGEMENT, axis=1).repeat(ENLARGEMENT, axis=2)


def load_enlarged_digits(seed):
    """As `local_digits.load_turned_digits`, four times as wide."""
    parts = local_digits.load_turned_digits(seed)
    return {
        name: Part(enlarge(part.x), part.labels) for name, part in parts.items()
    }


def make_resnet_classifier():
    """A ResNet of two bottlenecks, which tells ten digits."""
    side = ENLARGEMENT * 8
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="bottleneck_block",
        image_shape=(side, side, 3),
    )
    return keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=10, preprocessor=None, pooling="avg"
    )


def is_pointwise(layer):
    """Whether a layer is a convolution of size 1."""
    return set(getattr(layer, "kernel_size", ())) == {1}


ALL_CONVOLUTIONS = LocalDataset(
    local_digits.version(RESNET_WEIGHTS),
    15,
    load_enlarged_digits,
    functools.partial(
        local_digits.make_pretrained, make_resnet_classifier, RESNET_WEIGHTS
    ),
    target_layer_names="all-conv",
)
CONVOLUTIONS_OF_SIZE_1 = dataclasses.replace(
    ALL_CONVOLUTIONS, target_layer_names=is_pointwise
)
