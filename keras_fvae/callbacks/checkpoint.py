"""Adapters on disk while `fit` runs."""

from __future__ import annotations

import math
import os
from typing import Any
from typing import Literal

import keras

from keras_fvae.backend.types import Filepath
from keras_fvae.layers.config import check_boolean
from keras_fvae.model import files
from keras_fvae.model import saving
from keras_fvae.model.lookup import require_adapted_layers
from keras_fvae.model.state import AdapterState
from keras_fvae.model.state import read_adapter

MODES = ("auto", "min", "max")
# What is in the name of what should be small, and of what should be large.
SMALL_WORDS = ("loss", "error", "perplexity", "_nll", "kl_")
LARGE_WORDS = ("acc", "auc", "f1", "precision", "recall", "iou", "bleu")


class AdapterCheckpoint(keras.callbacks.Callback):
    """Saves the adapters at the end of each epoch, and what else trains.

    As `keras.callbacks.ModelCheckpoint` saves a model, in files as
    `save_adapter` writes them: without the base model, and so in a small part
    of its size. Together with `keras.callbacks.BackupAndRestore` a run that
    was killed goes on, and with `resume=True` it keeps the best that it had.

    Args:
        filepath: String or path that ends in `.safetensors`. It may name the
            epoch and what is in the logs, such as
            `"task-{epoch:02d}-{val_loss:.3f}.safetensors"`. Folders are made.
        monitor: String, the entry of the logs by which an epoch is judged.
            Defaults to `"val_loss"`.
        save_best_only: Boolean. Whether to save only after epochs that are
            better than all before them; a value that is not finite never is.
            Defaults to `False`.
        mode: `"min"` or `"max"`, what of `monitor` is better; `"auto"`
            (default) to tell by its name.
        include: As in `save_adapter`. Defaults to `"all"`.
        resume: Boolean. With `save_best_only`, whether a file that is there
            at the start of `fit` holds the best so far, so that only a better
            epoch replaces it. Defaults to `False`.

    Raises:
        ValueError: If an argument is not allowed; in `fit`, if no layer of the
            model is adapted, or what `monitor` or `filepath` names is not in
            the logs.
        TypeError: If `filepath` is no path.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    >>> model.compile("adamw", "mse")
    >>> checkpoint = keras_fvae.AdapterCheckpoint(
    ...     "best.safetensors", monitor="loss", save_best_only=True
    ... )
    >>> history = model.fit(
    ...     np.ones((8, 4)), np.ones((8, 3)), callbacks=[checkpoint], verbose=0
    ... )
    >>> summary = keras_fvae.load_adapter(model, "best.safetensors")
    """

    def __init__(
        self,
        filepath: Filepath,
        monitor: str = "val_loss",
        save_best_only: bool = False,
        mode: Literal["auto", "min", "max"] = "auto",
        include: Literal["all", "inference"] = "all",
        resume: bool = False,
    ) -> None:
        super().__init__()
        files.check_filepath(filepath)
        if mode not in MODES:
            raise ValueError(
                f"`mode` must be one of {MODES}. Received: mode={mode!r}"
            )
        saving.check_include(include)
        check_boolean("save_best_only", save_best_only)
        check_boolean("resume", resume)
        if not isinstance(monitor, str):
            raise ValueError(
                "`monitor` must be the name of an entry of the logs. "
                f"Received: monitor={monitor!r}"
            )
        self.filepath: str = os.fspath(filepath)
        try:
            is_one_name = self.filepath == self.filepath.format_map(_AnyName())
        except (ValueError, IndexError, AttributeError) as error:
            raise ValueError(
                "`filepath` may name `{epoch}` and entries of the logs, such "
                f"as `{{val_loss:.3f}}`. Received: filepath={self.filepath!r} "
                f"({error})"
            ) from error
        if resume and not (save_best_only and is_one_name):
            raise ValueError(
                "`resume=True` goes with `save_best_only=True`, and with one "
                f"name for all epochs. Received: save_best_only="
                f"{save_best_only!r}, filepath={self.filepath!r}"
            )
        self.monitor = monitor
        self.save_best_only = save_best_only
        self.sign: int | None = _sign(monitor, mode) if save_best_only else None
        self.include: Literal["all", "inference"] = include
        self.resume = resume
        self.best: float | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        require_adapted_layers(self.model)
        if self.resume and self.best is None and os.path.exists(self.filepath):
            self.best = self._value_of(read_adapter(self.filepath))

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        logs = logs or {}
        value = logs.get(self.monitor)
        if self.save_best_only:
            if value is None:
                raise ValueError(
                    f"`monitor` must be one of what is logged: {[*logs]}. "
                    f"Received: monitor={self.monitor!r}"
                )
            if not self._is_better(value):
                return
            self.best = float(value)
        checkpoint = {}
        if value is not None and math.isfinite(value):
            checkpoint = {
                "monitor": self.monitor,
                "value": float(value),
                "epoch": epoch + 1,
            }
        filepath = self._name(epoch, logs)
        os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
        state = saving.get_adapter(self.model, self.include)
        state = AdapterState(
            {**state.record, "checkpoint": checkpoint}, state.arrays
        )
        saving.write(self.model, state, filepath)

    def _name(self, epoch, logs):
        try:
            return self.filepath.format(epoch=epoch + 1, **logs)
        except KeyError as error:
            raise ValueError(
                f"`filepath` names {error}, which is none of what is logged: "
                f"{[*logs]}. Received: filepath={self.filepath!r}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"`filepath` cannot be filled with the logs: {error}. "
                f"Received: filepath={self.filepath!r}"
            ) from error

    def _is_better(self, value):
        if not math.isfinite(value):
            return False
        return self.best is None or self.sign * value > self.sign * self.best

    def _value_of(self, state):
        """What a file that is there was saved with."""
        checkpoint = state.record["checkpoint"]
        if checkpoint.get("monitor") != self.monitor:
            raise ValueError(
                f"The file '{self.filepath}' was not saved by "
                f"'{self.monitor}', but with {checkpoint}, so that nobody "
                "knows whether an epoch is better. Delete "
                "it, choose another name, or pass `resume=False`."
            )
        return checkpoint["value"]


class _AnyName(dict):
    """What any placeholder of a name is replaced by."""

    def __missing__(self, name):
        return 0


def _sign(monitor, mode):
    """1 if a larger value of what is monitored is better, else -1."""
    if mode == "auto":
        name = monitor.lower()
        is_small = any(word in name for word in SMALL_WORDS)
        if is_small == any(word in name for word in LARGE_WORDS):
            raise ValueError(
                "The name says not whether a larger or a smaller value is "
                f"better. Received: monitor={monitor!r}. Pass `mode='max'` or "
                "`mode='min'`."
            )
        return -1 if is_small else 1
    return 1 if mode == "max" else -1
