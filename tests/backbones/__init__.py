"""Every backbone of KerasHub at the smallest size, and inputs for each."""

import keras
import numpy as np

from backbones import multimodal
from backbones import text
from backbones import vision

VOCABULARY_SIZE = 50
SEQUENCE_LENGTH = 12

# Functions that make a backbone, by the name of its class.
BACKBONES = {**text.BACKBONES, **vision.BACKBONES, **multimodal.BACKBONES}
INPUTS = {**vision.INPUTS, **multimodal.INPUTS}


def data(backbone, batch_size=2):
    """Inputs that fit each other, in the structure the backbone takes."""
    rng = np.random.default_rng(0)
    inputs = INPUTS.get(type(backbone).__name__, {})

    def make(tensor):
        example = inputs.get(tensor.name, tensor.shape[1:])
        if callable(example):
            examples = [example(i) for i in range(batch_size)]
            return np.array(examples, tensor.dtype)
        if not isinstance(example, tuple):
            return np.array([example] * batch_size, tensor.dtype)
        shape = batch_size, *[size or SEQUENCE_LENGTH for size in example]
        if "mask" in tensor.name:
            mask = np.ones(shape, tensor.dtype)
            if "padding_mask" in tensor.name:
                mask[1::2, -(shape[1] // 4) :] = 0
            return mask
        if "int" in tensor.dtype:
            most = 2 if "segment" in tensor.name else VOCABULARY_SIZE
            return rng.integers(1, most, shape, tensor.dtype)
        return rng.standard_normal(shape, tensor.dtype)

    return keras.tree.map_structure(make, backbone.input)
