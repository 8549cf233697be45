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
    saved, resumed and sharded like the optimizer's own; in a file it is beside
    that, so that the optimizer can be loaded without an observer, too.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built. Several observers may
            watch it; of the same class, the last one.
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
    optimizers = [*_with_inner(optimizer)]
    optimizer = optimizers[-1]
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
    stop_watching(optimizer, type(observer))
    known_ids = {id(variable) for variable in optimizer.variables}
    observer.build(optimizer)
    added = [v for v in optimizer.variables if id(v) not in known_ids]
    watched = _watched(optimizer)
    watched[type(observer)] = observer, added
    _set_watched(optimizers, watched)


def stop_watching(
    optimizer: keras.optimizers.Optimizer, observer_class: type
) -> None:
    """Ends what `watch_gradients` began, and drops the observer's variables."""
    optimizers = [*_with_inner(optimizer)]
    watched = _watched(optimizers[-1])
    _, variables = watched.pop(observer_class, (None, ()))
    for variable in variables:
        keras_internals.untrack_optimizer_variable(optimizers[-1], variable)
    _set_watched(optimizers, watched)


def observer_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """The variables of the observers that watch an optimizer."""
    *_, optimizer = _with_inner(optimizer)
    parts = [added for _, added in _watched(optimizer).values()]
    return [variable for part in parts for variable in part]


def _watched(optimizer):
    """Dict of the class of an observer to it and its variables."""
    watched = vars(optimizer).get("watched_by", dict)
    return dict(watched())


def _set_watched(optimizers, watched):
    """Has observers called and saved, and those that were before no more."""
    *_, optimizer = optimizers
    keras_internals.restore_update(optimizer)
    keras_internals.save_apart(
        optimizers,
        {kind.__name__: added for kind, (_, added) in watched.items()},
    )
    for observer, _ in watched.values():
        keras_internals.add_to_update(optimizer, observer.observe)
    # In a function, because Keras looks into what it finds in an attribute.
    vars(optimizer)["watched_by"] = lambda: watched


def num_updates_of(
    optimizer: keras.optimizers.Optimizer, num_steps: int
) -> int:
    """Integer, how many updates an optimizer makes in the steps to come.

    Those whose gradients it has accumulated already count.
    """
    for each in _with_inner(optimizer):
        accumulated = each.gradient_accumulation_steps
        if accumulated:
            done = keras_internals.num_steps_of(each) % accumulated
            num_steps = (done + num_steps) // accumulated
    return num_steps


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
