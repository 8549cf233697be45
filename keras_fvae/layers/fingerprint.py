"""By what a frozen kernel is known again, cast or quantized since or not."""

from __future__ import annotations

import re

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas

NUM_ENTRIES = 32
# By how much the entries of a kernel may differ, as a norm relative to theirs,
# if it was stored in another precision in between.
TOLERANCES = {
    "float64": 1e-5,
    "float32": 1e-5,
    "float16": 5e-3,
    "bfloat16": 2e-2,
    "int8": 5e-2,
    "int4": 0.5,
}


def fingerprint(layer: keras.Layer) -> str:
    """Some entries of the frozen kernel of a layer, dequantized.

    Args:
        layer: Built layer of a class that can be adapted, adapted or not.

    Returns:
        String, 32 numbers of float32 in hexadecimal.
    """
    kernel = keras_internals.float_kernel(layer, full_precision=True)
    size = int(np.prod(layer.kernel.shape))
    indices = np.random.default_rng(0).integers(0, size, NUM_ENTRIES)
    entries = ops.take(ops.reshape(kernel, (-1,)), indices)
    entries = replicas.to_numpy(ops.cast(entries, "float32"))
    return entries.astype("<f4").tobytes().hex()


def precision(layer: keras.Layer) -> str:
    """String, in what the kernel of a layer is stored."""
    return layer.quantization_mode or layer.kernel.dtype


def is_fingerprint(text: str) -> bool:
    """Whether a string is one that `fingerprint` may have returned."""
    return re.fullmatch(f"[0-9a-f]{{{8 * NUM_ENTRIES}}}", text) is not None


def are_alike(one: str, other: str, *precisions: str) -> bool:
    """Whether two fingerprints are of one kernel.

    Args:
        one: String, what `fingerprint` returned.
        other: The same.
        *precisions: Strings, in what the kernels are stored.
    """
    if one == other:
        return True
    entries, other_entries = (
        np.frombuffer(bytes.fromhex(text), "<f4") for text in (one, other)
    )
    norm = max(np.linalg.norm(entries), np.linalg.norm(other_entries))
    # One that is not known is taken for the coarsest.
    coarsest = max(TOLERANCES.values())
    tolerance = max(TOLERANCES.get(p, coarsest) for p in precisions)
    return np.linalg.norm(entries - other_entries) <= tolerance * norm
