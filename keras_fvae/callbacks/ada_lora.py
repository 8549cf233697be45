"""AdaLoRA's allocation of ranks: which singular values stay, from step to step.

All of it is computed inside the compiled step. What depends on the number of
the step alone is a table, made before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fvae.backend.types import Tensor
from keras_fvae.callbacks.importance import Importance
from keras_fvae.callbacks.observing import Observer
from keras_fvae.callbacks.observing import ObservingCallback
from keras_fvae.callbacks.observing import checked_integer
from keras_fvae.callbacks.observing import slots_of
from keras_fvae.layers.config import is_finite
from keras_fvae.methods.ada_lora import PRUNED
from keras_fvae.methods.ada_lora import AdaLoRAAdapter
from keras_fvae.methods.ada_lora import AdaLoRAConfig
from keras_fvae.model.tree import numbered

# Which axis of each weight is that of the ranks.
RANK_AXES = {"kernel_a": 1, "kernel_b": 0, "singular_values": 0}


class AdaLoRAAllocator(ObservingCallback):
    """Gives AdaLoRA's ranks to the layers that need them, in training.

    After each update every element of A, E and B gets a score: two moving
    averages of `|weight * gradient|`, one of its value and one of how much it
    varies, times each other. That of a rank is the score of its singular value
    and the mean ones of its row of B and its column of A. From
    `initial_steps` on the budget falls, as a cube, to the target, which it
    reaches `final_steps` before the end. Every `interval` updates the ranks of
    the lowest scores that are above the budget, over all layers, get a
    singular value of 0; until the last time they may come back.

    The scores are state of the optimizer while `fit` runs, so that
    `keras.callbacks.BackupAndRestore` resumes them. The mean rank is logged at
    the end of each epoch as `mean_rank`; `history` has that of each layer.

    Args:
        initial_steps: Integer, how many updates are made before the budget
            falls. `None` (default) means a tenth of all.
        final_steps: Integer, how many are made with the last choice of ranks.
            `None` (default) means half of all.
        interval: Positive integer, the updates from one choice to the next.
            `None` (default) means a hundredth of all, but at least one.
        total_steps: Positive integer, how many updates `fit` makes. `None`
            (default) asks `fit`, which knows unless it reads a generator: those
            from its `initial_epoch` on.
        beta_1: Float in `[0, 1)`, the decay of the average of the scores.
            Defaults to `0.85`.
        beta_2: Float in `[0, 1)`, that of how much they vary. Defaults to
            `0.85`.

    Raises:
        ValueError: If an argument is not allowed, or, in `fit`, no layer is
            adapted by AdaLoRA, the number of updates is not known, or there is
            none between `initial_steps` and `final_steps`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.AdaLoRAConfig(3))
    >>> model.compile("adamw", "mse")
    >>> allocator = keras_fvae.AdaLoRAAllocator(final_steps=2)
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     batch_size=1,
    ...     callbacks=[allocator],
    ...     verbose=0,
    ... )
    >>> allocator.history
    [{'sequential/query': 2}]

    Reference: [AdaLoRA](https://arxiv.org/abs/2303.10512), section 3.
    """

    config_class: type[AdaLoRAConfig] = AdaLoRAConfig

    def __init__(
        self,
        initial_steps: int | None = None,
        final_steps: int | None = None,
        interval: int | None = None,
        total_steps: int | None = None,
        beta_1: float = 0.85,
        beta_2: float = 0.85,
    ) -> None:
        super().__init__(total_steps)
        self.initial_steps: int | None = checked_integer(
            "initial_steps", initial_steps, 0
        )
        self.final_steps: int | None = checked_integer(
            "final_steps", final_steps, 0
        )
        self.interval: int | None = checked_integer("interval", interval, 1)
        for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not is_finite(value) or not 0 <= value < 1:
                raise ValueError(
                    f"`{name}` must be a number in [0, 1). "
                    f"Received: {name}={value!r}"
                )
        self.betas: tuple[float, float] = (beta_1, beta_2)
        self.history: list[dict[str, int]] = []

    def make_observer(self, adapters: Sequence[AdaLoRAAdapter]) -> Allocation:
        return Allocation(adapters, self.betas)

    def begin(self, num_updates: int) -> None:
        self.observer.table = self._make_table(num_updates)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        num_updates = self.observer.count()
        super().on_train_end(logs)
        if not self.has_begun:
            return
        last_choice = self.observer.table.last_choice
        if num_updates < last_choice:
            warnings.warn(
                f"`fit` ended after {num_updates} updates. The last choice of "
                f"AdaLoRA's ranks was to be after {last_choice}, so that more "
                "are left than `target_rank` says. Train for longer, or pass "
                "`total_steps` to `AdaLoRAAllocator`.",
                stacklevel=2,
            )

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        ranks = numbered((la.path, la.adapter.num_ranks) for la in self.layers)
        self.history.append(ranks)
        if logs is not None:
            logs["mean_rank"] = float(np.mean([*ranks.values()]))

    def _make_table(self, total):
        initial, final, interval = (
            share if value is None else value
            for value, share in (
                (self.initial_steps, total // 10),
                (self.final_steps, total // 2),
                (self.interval, max(1, total // 100)),
            )
        )
        if initial + final >= total:
            raise ValueError(
                f"`fit` makes {total} updates, and the ranks are chosen after "
                "`initial_steps` and before `final_steps`, when there are none "
                f"left. Received: initial_steps={initial}, final_steps={final}"
            )
        configs = [layer.config for layer in self.layers]
        return Table(
            sum(config.rank for config in configs),
            sum(config.final_rank for config in configs),
            total,
            initial,
            final,
            interval,
        )


class Table:
    """By the number of the update, from 0 to the last, what is done after it.

    Attributes:
        budgets: Array of integers, how many ranks may stay.
        is_choice: Array of booleans, whether it is chosen anew which.
        last_choice: Integer, the update after which it is for the last time.
    """

    def __init__(
        self,
        full: int,
        target: int,
        total: int,
        initial: int,
        final: int,
        interval: int,
    ) -> None:
        updates = np.arange(total + 1)
        self.last_choice: int = total - final
        progress = (updates - initial) / (self.last_choice - initial)
        left = (1 - np.clip(progress, 0, 1)) ** 3
        self.budgets: np.ndarray = (target + (full - target) * left).astype(
            "int32"
        )
        self.is_choice: np.ndarray = (updates > initial) & (
            updates % interval == 0
        )
        self.is_choice[self.last_choice] = True
        self.is_choice[self.last_choice + 1 :] = False


class Allocation(Observer):
    """What `AdaLoRAAllocator` does inside the step.

    Args:
        adapters: List of `AdaLoRAAdapter`.
        betas: Pair of floats, the decays of the averages.
    """

    # Set before the first step.
    table: Table

    def __init__(
        self, adapters: Sequence[AdaLoRAAdapter], betas: tuple[float, float]
    ) -> None:
        super().__init__(adapters)
        self.betas = betas

    def build(self, optimizer: keras.optimizers.Optimizer) -> None:
        super().build(optimizer)
        self.importance: list[Importance] = []
        self.kept: list[keras.Variable] = []
        for adapter in self.adapters:
            self.importance.append(
                Importance(optimizer, adapter, RANK_AXES, self.betas)
            )
            self.kept.append(
                optimizer.add_variable_from_reference(
                    adapter.singular_values, name="kept", initializer="ones"
                )
            )
        # The moving averages of an optimizer with `use_ema`.
        slots = [slots_of(optimizer, a.singular_values) for a in self.adapters]
        self.averages: list[list[keras.Variable]] = [
            [slot for name, slot in each.items() if name == "average"]
            for each in slots
        ]

    def after_update(
        self, num_updates: Tensor, gradients: dict[int, Tensor]
    ) -> None:
        """Scores the ranks, and sets singular values to 0."""
        table = self.table
        # `fit` may make more than it said.
        row = ops.minimum(num_updates, len(table.budgets) - 1)
        is_scored = num_updates < table.last_choice
        for importance in self.importance:
            importance.update(gradients, is_scored)
        scores = [found.scores_of_ranks() for found in self.importance]
        is_kept = _highest(scores, ops.take(table.budgets, row))
        is_choice = ops.take(table.is_choice, row)
        is_masked = ops.logical_or(is_choice, num_updates > table.last_choice)
        pruned = ops.convert_to_tensor(PRUNED)
        for adapter, averages, kept, chosen in zip(
            self.adapters, self.averages, self.kept, is_kept
        ):
            chosen = ops.cast(chosen, kept.dtype)
            kept.assign(ops.where(is_choice, chosen, kept.value))
            is_pruned = ops.logical_and(is_masked, kept.value == 0)
            for values in (adapter.singular_values, *averages):
                values.assign(ops.where(is_pruned, pruned, values.value))


def _highest(scores, number):
    """Which scores are the highest.

    Args:
        scores: List of tensors of shape `(rank,)`.
        number: Scalar integer tensor, how many are, over all tensors. Fewer if
            some are equal.

    Returns:
        List of boolean tensors.
    """
    ordered = ops.sort(ops.concatenate(scores))
    num_low = ordered.shape[0] - number
    threshold = ops.take(ordered, ops.maximum(num_low - 1, 0))
    return [ops.logical_or(s > threshold, num_low == 0) for s in scores]
