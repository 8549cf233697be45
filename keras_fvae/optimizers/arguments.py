"""What the optimizers take: numbers, and other optimizers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

import keras

from keras_fvae.backend.keras_internals import JointOptimizer
from keras_fvae.layers.config import is_finite

LearningRate: TypeAlias = (
    float | keras.optimizers.schedules.LearningRateSchedule
)
# What happens to gradients before there is a step.
BEFORE_THE_STEP = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "loss_scale_factor",
)


def check_number(
    name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]
) -> None:
    """Raises a `ValueError` if a number is not allowed.

    Args:
        name: String, the argument.
        value: What was given for it.
        allowed: String, what is allowed.
        is_allowed: Function of a finite number that returns a boolean.
    """
    if not is_finite(value) or not is_allowed(value):
        raise ValueError(
            f"`{name}` must be {allowed}. Received: {name}={value!r}"
        )


def get_inner_optimizer(
    name: str, optimizer: Any, outer: str, reserved: Sequence[str]
) -> keras.optimizers.Optimizer:
    """The optimizer that another one is to call.

    Args:
        name: String, the argument.
        optimizer: `keras.optimizers.Optimizer`, its name or its config.
        outer: String, the class that calls it.
        reserved: Tuple of strings, the settings that only `outer` may have.

    Returns:
        `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If it cannot be called by another one.
    """
    result = keras.optimizers.get(optimizer)
    received = f"Received: {name}={optimizer!r}"
    if not isinstance(result, keras.optimizers.Optimizer):
        raise ValueError(
            f"`{name}` must be a Keras optimizer, such as "
            f"`keras.optimizers.AdamW(1e-4)`. {received}"
        )
    if isinstance(
        result,
        (
            keras.optimizers.LossScaleOptimizer,
            keras.optimizers.MultiOptimizer,
        ),
    ):
        raise ValueError(
            f"A `{type(result).__name__}` goes around `{outer}`, not into it. "
            f"{received}"
        )
    if isinstance(result, JointOptimizer):
        raise ValueError(
            f"`{name}` must be an optimizer that knows nothing of pairs, such "
            f"as `keras.optimizers.AdamW(1e-4)`. {received}"
        )
    for setting in reserved:
        if getattr(result, setting):
            raise ValueError(
                f"`{name}` must not have `{setting}`, which counts for all "
                f"weights, before the step: pass it to `{outer}`. Received: "
                f"{name}.{setting}={getattr(result, setting)!r}"
            )
    return result
