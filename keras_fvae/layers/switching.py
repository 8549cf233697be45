"""Which adapted layers are off, and which adapters sample, in a thread."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

import keras

from keras_fvae.backend.scoped import ScopedValue

# Dict of the id of a layer that is off, or of an adapter that samples, to the
# number of blocks in which it is.
_switched = ScopedValue(default={})
_lock = threading.Lock()
_num_blocks = 0


def switched_off(layers: Sequence[keras.Layer]) -> AbstractContextManager[None]:
    """Makes adapted layers compute what they did before they were adapted.

    Inside the block, in the thread that entered it. Blocks may overlap.

    Args:
        layers: List of adapted layers.
    """
    return _switch(layers)


def sampling(layers: Sequence[keras.Layer]) -> AbstractContextManager[None]:
    """Makes adapters draw at inference what they draw in training.

    Inside the block, in the thread that entered it. Blocks may overlap.

    Args:
        layers: List of adapted layers.
    """
    return _switch([layer.adapter for layer in layers])


def is_off(layer: keras.Layer) -> bool:
    """Whether an adapted layer is off in this thread."""
    return id(layer) in _switched.value


def is_sampling(adapter: keras.Layer) -> bool:
    """Whether an adapter samples in this thread."""
    return id(adapter) in _switched.value


def is_switched() -> bool:
    """Whether a layer is off, or an adapter samples, in this thread."""
    return bool(_switched.value)


def ids_switched(layers: Sequence[keras.Layer]) -> frozenset[int]:
    """Frozen set of the ids of those that are off, or whose adapter samples.

    Args:
        layers: List of adapted layers.
    """
    ids = {id(part) for layer in layers for part in (layer, layer.adapter)}
    return frozenset(ids & _switched.value.keys())


def is_any_switched() -> bool:
    """Whether any layer is off, or adapter samples, in any thread."""
    return _num_blocks > 0


@contextlib.contextmanager
def _switch(parts):
    _change(parts, 1)
    try:
        yield
    finally:
        _change(parts, -1)


def _change(parts, number):
    global _num_blocks
    with _lock:
        _num_blocks += number
    counts = collections.Counter(_switched.value)
    counts.update({id(part): number for part in parts})
    _switched.value = {key: count for key, count in counts.items() if count > 0}
