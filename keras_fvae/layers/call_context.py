"""The context of a call: what adapted layers know beside their arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.backend.scoped import ScopedValue

# Fallback value of `training`, from the model or step around the layers.
_training = ScopedValue()


def known_training(training: bool | None) -> AbstractContextManager[None]:
    """Sets a fallback value of `training` for the time of a block.

    It holds for adapted layers whose caller does not pass one, because not
    all models pass `training` on to all layers, and some call themselves once
    more in `compute_loss` without it.

    Args:
        training: Boolean, or `None` if nothing is known.
    """
    return _training.set_to(training)


def is_training(training: bool | None) -> bool:
    """Whether a layer trains: the one rule for `training`.

    First what the layer is called with counts, if it is `True`; then the
    fallback of the innermost model or step around it; if there is none,
    whether Keras runs a training step.

    Args:
        training: Boolean or `None`, what the layer was called with. `False`
            alone says nothing, because some layers pass it on by default.
    """
    if training or _training.value:
        return True
    return _training.value is None and keras_internals.is_in_training_step()


# The backend's trace in which the outermost model was called.
_outer_trace = ScopedValue()


def called_in_this_trace() -> AbstractContextManager[None]:
    """Remembers the backend's trace of a model's call, inside a block."""
    if _outer_trace.value is not None:
        return contextlib.nullcontext()
    return _outer_trace.set_to((keras_internals.trace_state(),))


def refuse_inside_transformation(layer: keras.Layer) -> None:
    """Refuses to train inside a function that the backend transforms.

    Raises:
        ValueError: If the layer is in such a function inside the model.
    """
    if _outer_trace.value not in (None, (keras_internals.trace_state(),)):
        raise ValueError(
            f"The adapted layer '{layer.path}' is called inside a function "
            f"that {keras_internals.backend_name()} transforms, such as a "
            "branch of `ops.cond`, the body of a loop or of `ops.map`, "
            "`jax.jit` or `jax.checkpoint`. In training, neither the loss of "
            "its adapter nor its random numbers get out of there. Call the "
            "layer outside of it, or leave it out of `target_layer_names`."
        )


# An attribute that models which know of their adapters have.
CONTAINER_MARK = "base_call_signature"
_make_container: Any = None


def on_unknown_container(function: Callable[[keras.Layer], None]) -> None:
    """Has a function called for models that do not know of their adapters.

    Args:
        function: Function of a model. It is for `model.containers` to set.
    """
    global _make_container
    _make_container = function


def note_entries() -> None:
    """Makes the models that are being called such that know of adapters.

    Those that were made around an adapted model do not yet.
    """
    if keras_internals.is_compiling():
        return
    for model in keras_internals.entry_models():
        if not hasattr(model, CONTAINER_MARK):
            _make_container(model)
