"""Seeing the gradients that an optimizer has used, inside the compiled step."""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas


def watch_gradients(
    optimizer: keras.optimizers.Optimizer, observer: Any
) -> None:
    """Has an observer called after each update that an optimizer makes.

    It is called inside the compiled step, with the gradients as they were used:
    accumulated, unscaled and clipped, and once for each update, however many
    steps that takes. What it keeps is state of the optimizer, so that it is
    saved, resumed and sharded like the optimizer's own.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built. It has no other
            observer after.
        observer: Object with a method `build(optimizer)`, which makes the
            observer's variables by `optimizer.add_variable` and its like, and
            a method `observe(gradients, variables)`, which takes two lists of
            equal length and may assign to variables. On JAX those are the
            variables of the model that train, and the optimizer's.

    Raises:
        ValueError: If there are several replicas of TensorFlow, whose gradients
            come together only where an optimizer applies them, or several
            optimizers.
    """
    *_, optimizer = _with_inner(optimizer)
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "Of a `MultiOptimizer` gradients cannot be watched, because each "
            "of its optimizers sees a part of them. Train with one optimizer."
        )
    if replicas.has_replicas(optimizer.variables[0]):
        raise ValueError(
            "With several replicas of TensorFlow gradients cannot be watched. "
            "Train on one device, or on JAX with `keras.distribution`."
        )
    stop_watching(optimizer)
    known_ids = {id(variable) for variable in optimizer.variables}
    observer.build(optimizer)
    added = [v for v in optimizer.variables if id(v) not in known_ids]
    keras_internals.add_to_update(optimizer, observer.observe)
    # No attribute that Keras tracks: the variables are in its list already.
    vars(optimizer)["watched_by"] = added


def stop_watching(optimizer: keras.optimizers.Optimizer) -> None:
    """Ends what `watch_gradients` began, and drops the observer's variables."""
    *_, optimizer = _with_inner(optimizer)
    for variable in vars(optimizer).pop("watched_by", ()):
        keras_internals.untrack_optimizer_variable(optimizer, variable)
    keras_internals.restore_update(optimizer)


def accumulated_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """Integer, the steps whose gradients become one update."""
    return math.prod(
        each.gradient_accumulation_steps or 1 for each in _with_inner(optimizer)
    )


def _with_inner(optimizer):
    """An optimizer, and those inside it, of which the last one updates."""
    yield optimizer
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
        yield optimizer
