"""What is known of a call of adapted layers beside its arguments."""

import contextlib

from keras_fvae.backend import keras_internals
from keras_fvae.backend.scoped import ScopedValue

# What the model or the step around adapted layers says of `training`.
_training = ScopedValue()


def known_training(training):
    """Says whether adapted layers train that are called inside the block.

    Not all models pass `training` on to all layers, and some call themselves
    once more in `compute_loss` without a word of it.

    Args:
        training: Boolean, or `None` if nothing is known.
    """
    return _training.set_to(training)


def is_training(training):
    """Whether a layer trains.

    It does if it is told so; else if the innermost model or step around it
    was; and if nothing was said at all, if Keras is in a training step.

    Args:
        training: Boolean or `None`, what the layer was called with. Layers
            around it may pass on `False` by default, unasked.
    """
    if training or _training.value:
        return True
    return _training.value is None and keras_internals.is_in_training_step()


# In which trace of the backend the outermost model was called.
_outer_trace = ScopedValue()


def called_in_this_trace():
    """Says where a model is called that adapted layers are in, for a block."""
    if _outer_trace.value is not None:
        return contextlib.nullcontext()
    return _outer_trace.set_to((keras_internals.trace_state(),))


def refuse_inside_transformation(layer):
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
_make_container = None


def on_unknown_container(function):
    """Has a function called for models that do not know of their adapters.

    Args:
        function: Function of a model. It is for `model.containers` to set.
    """
    global _make_container
    _make_container = function


def note_entries():
    """Makes the models that are being called such that know of adapters.

    Those that were made around an adapted model do not yet.
    """
    if keras_internals.is_compiling():
        return
    for model in keras_internals.entry_models():
        if not hasattr(model, CONTAINER_MARK):
            _make_container(model)
