"""BeamLoRA's pruning: the best ranks in the place of the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.callbacks.observing import Observer
from keras_fvae.callbacks.observing import ObservingCallback
from keras_fvae.callbacks.observing import begin_average
from keras_fvae.callbacks.observing import checked_integer
from keras_fvae.callbacks.observing import forget_moments
from keras_fvae.layers.config import is_finite
from keras_fvae.methods.beam_lora import BeamLoRAAdapter
from keras_fvae.methods.beam_lora import BeamLoRAConfig

FACTORS = ("kernel_a", "kernel_b")


class BeamLoRAPruner(ObservingCallback):
    """Prunes BeamLoRA's ranks in training, and starts them anew from others.

    Every `interval` updates the scores of all layers are sorted together. The
    ranks outside of the head that makes up a share of their sum are pruned; in
    each layer as many of the highest scores take their places, in random
    order, with A and B as they were half an interval ago, so that twins
    differ. Both get the mean of their gates, and an optimizer with moments
    forgets those of the gates. The share rises from `first_share` to 1, as a
    cosine, after which no rank is pruned.

    The copies of A and B are state of the optimizer while `fit` runs, so that
    `keras.callbacks.BackupAndRestore` resumes them. How many ranks were pruned
    is logged at the end of each epoch as `pruned_ranks`. With
    `steps_per_execution=n` ranks are pruned once in n steps at most.

    Where more than half of a layer is pruned, the authors' code can take a
    pruned rank for a parent. Here parents are ranks that stay, some of which
    have several children then, and one rank stays in each layer.

    Args:
        interval: Integer >= 2, the updates from one pruning to the next.
            `None` (default) means a twelfth of all, as in the authors'
            scripts.
        first_share: Float in `(0, 1]`, the share of the scores that stays at
            first. Defaults to `0.95`.
        last_step: Positive integer, the update at which the share is 1. `None`
            (default) means two thirds of all.
        total_steps: Positive integer, how many updates `fit` makes. `None`
            (default) asks `fit`, which knows unless it reads a generator.

    Raises:
        ValueError: If an argument is not allowed, or, in `fit`, no layer is
            adapted by BeamLoRA, or the number of updates is not known.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.BeamLoRAConfig(3))
    >>> model.compile("adamw", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     batch_size=1,
    ...     callbacks=[keras_fvae.BeamLoRAPruner(interval=2)],
    ...     verbose=0,
    ... )
    >>> len(history.history["pruned_ranks"])
    1

    Reference: [BeamLoRA](https://arxiv.org/abs/2502.13604), section 3.
    """

    config_class: type[BeamLoRAConfig] = BeamLoRAConfig

    def __init__(
        self,
        interval: int | None = None,
        first_share: float = 0.95,
        last_step: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(total_steps)
        self.interval: int | None = checked_integer("interval", interval, 2)
        self.last_step: int | None = checked_integer("last_step", last_step, 1)
        if not is_finite(first_share) or not 0 < first_share <= 1:
            raise ValueError(
                "`first_share` must be a number in (0, 1]. "
                f"Received: first_share={first_share!r}"
            )
        self.first_share = first_share

    def make_observer(self, adapters: Sequence[BeamLoRAAdapter]) -> Copies:
        return Copies(adapters)

    def begin(self, num_updates: int) -> None:
        self._interval = self.interval or max(2, num_updates // 12)
        self._last_step = self.last_step or max(1, 2 * num_updates // 3)
        # At the end there is no time left to train what starts anew.
        self._last_pruning = num_updates - self._interval
        self.observer.interval = self._interval

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        super().on_epoch_begin(epoch, logs)
        self._num_pruned = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        update = self.due_update(batch, self._interval)
        if update is not None and update <= self._last_pruning:
            self._prune(update)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if logs is not None:
            logs["pruned_ranks"] = self._num_pruned

    def _prune(self, update):
        progress = min(1, update / self._last_step)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        share = 1 - (1 - self.first_share) * cosine
        if share == 1:
            return
        adapters = self.observer.adapters
        scores = [replicas.to_numpy(adapter.scores) for adapter in adapters]
        for adapter, of_layer, is_pruned, copies in zip(
            adapters, scores, pruned(scores, share), self.observer.copies
        ):
            rng = np.random.default_rng([adapter.initial_seed, update])
            found = parents(of_layer, is_pruned, rng)
            start_anew(adapter, found, copies)
            self._num_pruned += len(found)
            forget_moments(self.model.optimizer, adapter.gate)
            for weight in (adapter.kernel_a, adapter.kernel_b, adapter.gate):
                begin_average(self.model.optimizer, weight)


class Copies(Observer):
    """A and B of each adapter as they were half an interval before a pruning.

    Args:
        adapters: List of `BeamLoRAAdapter`.
    """

    # Set before the first step.
    interval: int

    def build(self, optimizer: keras.optimizers.Optimizer) -> None:
        super().build(optimizer)
        self.copies: list[dict[str, keras.Variable]] = [
            {
                name: optimizer.add_variable_from_reference(
                    getattr(adapter, name), name="copy"
                )
                for name in FACTORS
            }
            for adapter in self.adapters
        ]

    def after_update(
        self, num_updates: Tensor, gradients: dict[int, Tensor]
    ) -> None:
        """Copies when it is time."""
        until_pruning = self.interval - self.interval // 2
        is_time = num_updates % self.interval == until_pruning
        for adapter, copies in zip(self.adapters, self.copies):
            for name, copy in copies.items():
                weight = getattr(adapter, name)
                copy.assign(ops.where(is_time, weight.value, copy.value))


def pruned(scores: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Which ranks are outside of the head that makes up a share of all scores.

    Args:
        scores: List of arrays of shape `(rank,)`, those of each layer.
        share: Float in `(0, 1]`.

    Returns:
        List of boolean arrays, of which each leaves one rank at least.
    """
    together = np.concatenate(scores)
    order = np.argsort(-together, kind="stable")
    is_pruned = np.zeros(len(together), bool)
    is_pruned[order] = np.cumsum(together[order]) > share * together.sum()
    parts = np.split(is_pruned, np.cumsum([len(s) for s in scores])[:-1])
    for part, of_layer in zip(parts, scores):
        part[np.argmax(of_layer)] = False
    return parts


def parents(
    scores: np.ndarray, is_pruned: np.ndarray, rng: np.random.Generator
) -> dict[int, int]:
    """For each pruned rank, the rank from which it starts anew.

    Args:
        scores: Array of shape `(rank,)`.
        is_pruned: Boolean array of the same shape.
        rng: `numpy.random.Generator`, for the order of the parents.

    Returns:
        Dict of pruned rank to parent: the ranks of the highest scores.
    """
    children = np.flatnonzero(is_pruned)
    staying = [r for r in np.argsort(-scores) if not is_pruned[r]]
    best = np.resize(staying, len(children))
    return dict(zip(children.tolist(), rng.permutation(best).tolist()))


def start_anew(
    adapter: BeamLoRAAdapter,
    found_parents: dict[int, int],
    copies: Mapping[str, keras.Variable],
) -> None:
    """Puts ranks in the place of others.

    Args:
        adapter: `BeamLoRAAdapter`.
        found_parents: Dict that `parents` returned.
        copies: Dict of "kernel_a" and "kernel_b" to variable.
    """
    arrays = {k: v.copy() for k, v in adapter.get_arrays().items()}
    kernel_a, kernel_b = (replicas.to_numpy(copies[name]) for name in FACTORS)
    gate = arrays["gate"].copy()
    for child, parent in found_parents.items():
        arrays["kernel_a"][:, child] = kernel_a[:, parent]
        arrays["kernel_b"][child] = kernel_b[parent]
        mean = (gate[child] + gate[parent]) / 2
        arrays["gate"][[child, parent]] = mean
    adapter.set_arrays(arrays)
