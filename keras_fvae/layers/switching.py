"""Which adapted layers are off, for the thread that switched them off."""

import collections
import contextlib
import threading

from keras_fvae.backend.scoped import ScopedValue

# Dict of a layer's id to the number of blocks in which it is off.
_off = ScopedValue(default={})
_lock = threading.Lock()
_num_blocks = 0


@contextlib.contextmanager
def switched_off(layers):
    """Makes adapted layers compute what they did before they were adapted.

    Inside the block, in the thread that entered it. Blocks may overlap.

    Args:
        layers: List of adapted layers.
    """
    _change(layers, 1)
    try:
        yield
    finally:
        _change(layers, -1)


def is_off(layer):
    """Whether an adapted layer is off in this thread."""
    off = _off.value
    return bool(off) and id(layer) in off


def ids_off():
    """Dict whose keys are the ids of the layers that are off in this thread."""
    return _off.value


def is_any_off():
    """Whether any layer is off in any thread."""
    return _num_blocks > 0


def _change(layers, number):
    global _num_blocks
    with _lock:
        _num_blocks += number
    counts = collections.Counter(_off.value)
    counts.update({id(layer): number for layer in layers})
    # Another dict: steps are kept by what is off.
    _off.value = {key: count for key, count in counts.items() if count > 0}
