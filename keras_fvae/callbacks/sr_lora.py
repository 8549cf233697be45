"""SRLoRA's restarts: which ranks are fused, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.callbacks.importance import Importance
from keras_fvae.callbacks.observing import Observer
from keras_fvae.callbacks.observing import ObservingCallback
from keras_fvae.callbacks.observing import begin_average
from keras_fvae.callbacks.observing import checked_integer
from keras_fvae.callbacks.observing import forget_moments
from keras_fvae.layers.adapted import read_kernel
from keras_fvae.methods.sr_lora import SRLoRAAdapter
from keras_fvae.methods.sr_lora import SRLoRAConfig

# Which axis of each weight is that of the ranks.
RANK_AXES = {"kernel_a": 1, "kernel_b": 0}
# AdaLoRA's.
BETAS = (0.85, 0.85)


class SRLoRARestarter(ObservingCallback):
    """Fuses SRLoRA's least important ranks in training, and starts others.

    **Experimental**, as `keras_fvae.SRLoRAConfig` says. Every `interval`
    updates each layer fuses the pair of A and B of the lowest importance, as
    long as it can. The importance, AdaLoRA's, is state of the optimizer while
    `fit` runs, so that `keras.callbacks.BackupAndRestore` resumes it. How many
    pairs a layer has fused, in the mean, is logged as `fused_ranks`.

    Of a pair that starts anew the optimizer forgets what it keeps of each
    element; of LoRA-RITE, whose moments are in a basis, all moments of the
    layer; of Adafactor not the second moments, which all ranks share. With
    `steps_per_execution=n` a layer fuses one pair in n steps at most.

    Args:
        interval: Positive integer, the updates from one time to the next.
            `None` (default) means a tenth of all, but at least one. In the
            last interval nothing starts anew, because it would not be trained.
        total_steps: Positive integer, how many updates `fit` makes. `None`
            (default) asks `fit`, which knows unless it reads a generator.

    Raises:
        ValueError: If an argument is not allowed, or, in `fit`, no layer is
            adapted by SRLoRA, or the number of updates is not known.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.SRLoRAConfig(1))
    >>> model.compile("adamw", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     batch_size=1,
    ...     callbacks=[keras_fvae.SRLoRARestarter(interval=3)],
    ...     verbose=0,
    ... )
    >>> history.history["fused_ranks"]
    [1.0]

    Reference: [SRLoRA](https://arxiv.org/abs/2505.12433).
    """

    config_class: type[SRLoRAConfig] = SRLoRAConfig

    def __init__(
        self, interval: int | None = None, total_steps: int | None = None
    ) -> None:
        super().__init__(total_steps)
        self.interval: int | None = checked_integer("interval", interval, 1)

    def make_observer(
        self, adapters: Sequence[SRLoRAAdapter]
    ) -> PairImportance:
        return PairImportance(adapters)

    def begin(self, num_updates: int) -> None:
        self._interval = self.interval or max(1, num_updates // 10)
        self._last_restart = num_updates - self._interval

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        update = self.due_update(batch, self._interval)
        if update is not None and update <= self._last_restart:
            self._restart()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if logs is not None:
            fused = [layer.adapter.num_fused for layer in self.layers]
            logs["fused_ranks"] = float(np.mean(fused))

    def _restart(self):
        for layer, importance in zip(self.layers, self.observer.importance):
            adapter = layer.adapter
            if adapter.num_fused == adapter.max_fused:
                continue
            scores = replicas.to_numpy(importance.scores_of_ranks())
            rank = int(np.argmin(scores))
            adapter.fuse(rank, read_kernel(layer))
            importance.forget(rank)
            new = (adapter.kernel_a, np.s_[:, rank]), (adapter.kernel_b, rank)
            for weight, index in new:
                forget_moments(self.model.optimizer, weight, index)
                begin_average(self.model.optimizer, weight, index)


class PairImportance(Observer):
    """The importance of each pair of A and B, observed inside the step.

    Args:
        adapters: List of `SRLoRAAdapter`.
    """

    def build(self, optimizer: keras.optimizers.Optimizer) -> None:
        super().build(optimizer)
        self.importance: list[Importance] = [
            Importance(optimizer, adapter, RANK_AXES, BETAS)
            for adapter in self.adapters
        ]

    def after_update(
        self, num_updates: Tensor, gradients: dict[int, Tensor]
    ) -> None:
        """Goes on with the averages."""
        for importance in self.importance:
            importance.update(gradients)
