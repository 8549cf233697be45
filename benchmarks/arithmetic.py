"""Multiply-adds a token of each method, counted from the shapes."""

import itertools
import math

import keras

from benchmarks.models import NUM_EXPERTS
from benchmarks.models import is_convolution
from benchmarks.models import targets
from keras_fvae.backend import keras_internals
from keras_fvae.layers.frozen import linear_map_of


def frozen(task, size):
    """Those of the base model, without biases, norms and activations.

    Args:
        task: KerasHub task.
        size: `Size`, that of the task.

    Returns:
        Integer, multiply-adds a token, or an image, forward.
    """
    kernels = sum(
        num_tokens(layer) * math.prod(layer.kernel.shape)
        for layer in layers_with_kernels(task)
    )
    # Attention: each query with each key, and each weight with each value.
    attention = sum(
        2 * size.num_tokens * width_and_units(layer)[1]
        for layer in targets(task, size)
        if layer.name == "query"
    )
    return kernels + attention


def layers_with_kernels(task):
    """List of layers, of whose convolutions the model knows the outputs."""
    own = [la for la in task.backbone.layers if is_convolution(la)]
    return own + [
        layer
        for layer in keras_internals.flatten_layers(task.backbone)
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
    ]


# The width of FVAE-LoRA's encoders, by the rank.
HIDDEN_BY_RANK = 4
# How often a method multiplies the tokens by thin matrices, A and B.
THIN_PRODUCTS = {
    "LoRA on x": 1,
    "rsLoRA": 1,
    "FFA-LoRA": 1,
    "AdaLoRA": 1,
    "BeamLoRA": 1,
    "DropLoRA": 1,
    "DoRA": 1,
    "PiSSA": 2,
    "OLoRA": 2,
    # As PiSSA, and two for each rank that can be fused.
    "SRLoRA": 4,
    "MoE-LoRA": 1,
    "Flat-LoRA": 1,
}


def num_tokens(layer):
    """For what is counted, how many tokens a kernel is applied to.

    Integer, 1 for a token. An image is counted as a whole, because each
    convolution has as many patches as it gives outputs.
    """
    if is_convolution(layer):
        return math.prod(layer.output.shape[1:-1])
    return 1


def width_and_units(layer):
    """How many features a layer's kernel contracts, and how many it gives."""
    linear_map, shape = linear_map_of(layer), layer.kernel.shape
    return linear_map.width(shape), linear_map.units(shape)


def inference(method, width, units, rank):
    """Those of an adapted layer at inference, beside the frozen product."""
    if method in THIN_PRODUCTS:
        router = NUM_EXPERTS * width if method == "MoE-LoRA" else 0
        return THIN_PRODUCTS[method] * rank * (width + units) + router
    if method in ("FVAE-LoRA", "finalized"):
        # The hidden layer and the mean of q1, then B.
        hidden = HIDDEN_BY_RANK * rank
        return width * hidden + hidden * rank + rank * units
    # KerasHub's LoRA adds B A to the kernel, once for all tokens.
    return 0


def training(method, width, units, rank, decoder_units=(128, 128, 128)):
    """Those of an adapted layer in a training step, beside the base model's.

    Each product of what trains is taken once forward and twice backward.
    """
    if method == "LoRA":
        # The gradient of the whole kernel; B A itself is no matter of tokens.
        return width * units
    if method == "HiRA":
        # The gradient of A B, in the place of that of the kernel.
        return width * units
    if method == "FFA-LoRA":
        # No gradient of A.
        return rank * (2 * width + 3 * units)
    if method == "MoE-LoRA":
        # The router; and B once more, without a gradient of its own.
        router = 3 * NUM_EXPERTS * width
        return rank * (3 * width + 5 * units) + router
    if method == "Flat-LoRA":
        # The product with the noise, and the gradient of x.
        return 3 * rank * (width + units) + 2 * width * units
    if method in THIN_PRODUCTS:
        return 3 * THIN_PRODUCTS[method] * rank * (width + units)
    # Both encoders in one product, their heads in a block-diagonal one.
    hidden = HIDDEN_BY_RANK * rank
    encoders = width * 2 * hidden + 2 * hidden * 4 * rank
    widths = (2 * rank, *decoder_units, width)
    decoder = sum(a * b for a, b in itertools.pairwise(widths))
    return 3 * (encoders + decoder + rank * units)


def step(method, task, size, rank):
    """Those of a whole training step, for each token or image.

    Forward, and backward to the layers' inputs, that is twice the base model;
    full fine-tuning takes the gradients of all kernels besides.
    """
    base = frozen(task, size)
    if method == "full fine-tuning":
        return 3 * base
    return 2 * base + sum(
        num_tokens(layer) * training(method, *width_and_units(layer), rank)
        for layer in targets(task, size)
    )
