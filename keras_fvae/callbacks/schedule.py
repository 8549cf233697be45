"""Weights of the objective that change while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from typing import TypeAlias

import keras
import numpy as np
from keras import ops

from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.model.lookup import require_adapted_layers

# The weight at a step.
Schedule: TypeAlias = (
    keras.optimizers.schedules.LearningRateSchedule | Callable[[int], float]
)
# That of gamma may be a pair, for z1 and for z2.
GammaSchedule: TypeAlias = (
    Schedule | Callable[[int], float | tuple[float, float]]
)


class FVAELoRASchedule(keras.callbacks.Callback):
    """Changes the weights of the FVAE's objective from step to step.

    For warm-up and annealing, as of a beta-VAE. The steps are those of the
    optimizer, so a run that is resumed goes on where it was. Nothing is
    compiled again. With `steps_per_execution=n` the weights change every n
    steps. After `fit` the weights stay what they were last; a model that is
    loaded from a file begins with those of its config. Tried in
    `examples/paper/ablation.py`: an `elbo_weight` that rises from 0 over the
    first 100 steps, which lost 5 points on texts.

    Args:
        elbo_weight: Optional
            `keras.optimizers.schedules.LearningRateSchedule`, or function
            that takes the step, an integer, and returns a number: the
            `elbo_weight`.
        kl_weight: Optional schedule or function for the `kl_weight`.
        gamma_weight: Optional schedule or function for the `gamma_weight`;
            a function may also return a pair of numbers.

    Raises:
        ValueError: If there is no schedule, or, in `fit`, the model is not
            adapted or a weight is not allowed at some step. That of gamma for
            z1 must stay smaller than the `kl_weight`: let one follow the
            other.
        TypeError: If an argument is neither a schedule nor a function, or, in
            `fit`, returns no number.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> model.compile("adamw", "mse")
    >>> warm_up = keras_fvae.FVAELoRASchedule(
    ...     elbo_weight=lambda step: 1e-3 * min(1.0, step / 100)
    ... )
    >>> history = model.fit(
    ...     np.ones((8, 4)), np.ones((8, 3)), callbacks=[warm_up], verbose=0
    ... )

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3, for what the weights are of.
    """

    def __init__(
        self,
        elbo_weight: Schedule | None = None,
        kl_weight: Schedule | None = None,
        gamma_weight: GammaSchedule | None = None,
    ) -> None:
        super().__init__()
        schedules = {
            "elbo_weight": elbo_weight,
            "kl_weight": kl_weight,
            "gamma_weight": gamma_weight,
        }
        self.schedules: dict[str, GammaSchedule] = {
            name: schedule
            for name, schedule in schedules.items()
            if schedule is not None
        }
        if not self.schedules:
            raise ValueError(
                "`FVAELoRASchedule` needs a schedule for one of these at "
                f"least: {', '.join(schedules)}."
            )
        for name, schedule in self.schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"`{name}` must be a `LearningRateSchedule` or a function "
                    f"of the step. Received: {name}={schedule!r} (of type "
                    f"{type(schedule)})"
                )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._layers = require_adapted_layers(self.model, FVAELoRAConfig)
        self._values: dict[str, Any] | None = None

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        step = int(ops.convert_to_numpy(self.model.optimizer.iterations))
        values = {
            name: _checked(name, schedule(step), step)
            for name, schedule in self.schedules.items()
        }
        if values == self._values:
            return
        self._values = dict(values)
        try:
            configs = [
                dataclasses.replace(
                    layer.adapter.fvae.coefficients.config, **values
                )
                for layer in self._layers
            ]
        except ValueError as error:
            raise ValueError(f"At step {step}: {error}") from None
        for layer, config in zip(self._layers, configs):
            layer.adapter.fvae.coefficients.set(config)


def _checked(name, value, step):
    """What a schedule returned, as Python's numbers."""
    try:
        if name == "gamma_weight" and isinstance(value, (tuple, list)):
            return tuple(_as_float(number) for number in value)
        return _as_float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"At step {step}: the schedule of `{name}` must return a number. "
            f"Received: {value!r}"
        ) from error


def _as_float(value):
    array = np.asarray(ops.convert_to_numpy(value))
    # Not what Python takes for a number besides: "0.5" and `True`.
    if not np.issubdtype(array.dtype, np.number):
        raise TypeError("it is no number")
    return float(array.item())
