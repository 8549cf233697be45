"""The noise of Flat-LoRA, from none at all to all of it."""

from __future__ import annotations

from typing import Any

import keras

from keras_fvae.backend.keras_internals import fetch_state
from keras_fvae.backend.keras_internals import running_method
from keras_fvae.methods.flat_lora import FlatLoRAConfig
from keras_fvae.model.lookup import require_adapted_layers
from keras_fvae.model.training import forget_compiled_functions


class FlatLoRASchedule(keras.callbacks.Callback):
    """Lets the noise of Flat-LoRA grow while a model trains.

    It grows as half a wave of a cosine, from nothing in the first step of all
    epochs to `rho` after the last. So a run that is resumed, or begins at an
    `initial_epoch`, goes on where it was, and another `fit` begins anew.
    Nothing is compiled again. With `steps_per_execution=n` it grows every n
    steps.

    Raises:
        ValueError: In `fit`, if the model is not adapted by Flat-LoRA, or
            nobody knows how many steps an epoch has.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(
    ...     model, keras_fvae.FlatLoRAConfig(rank=2)
    ... )
    >>> model.compile("adamw", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     callbacks=[keras_fvae.FlatLoRASchedule()],
    ...     verbose=0,
    ... )

    Reference: [Flat-LoRA](https://arxiv.org/abs/2409.14396).
    """

    def __init__(self) -> None:
        super().__init__()

    def set_model(self, model: keras.Model) -> None:
        if running_method() in ("evaluate", "predict"):
            return
        # Before the step is made, which would say that nobody does this.
        super().set_model(model)
        self._adapters = [
            layer.adapter
            for layer in require_adapted_layers(model, FlatLoRAConfig)
        ]
        for adapter in self._adapters:
            adapter.callback = self

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.leave()

    def leave(self) -> None:
        """Tells the adapters that nobody lets their noise grow any more."""
        for adapter in self._adapters:
            adapter.callback = None
        # So that the next `fit` asks for the callback again.
        forget_compiled_functions(self.model, kinds=("train",))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self.params["steps"] is None:
            raise ValueError(
                "`FlatLoRASchedule` must know how many steps an epoch has, "
                "and this data does not say. Pass `steps_per_epoch` to `fit`."
            )
        # Kept, because Keras gives a callback others where it is in `evaluate`.
        self._num_epochs = self.params["epochs"]
        self._steps_per_epoch = self.params["steps"]

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._steps_before = epoch * self._steps_per_epoch

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        num_steps = self._num_epochs * self._steps_per_epoch
        share = (self._steps_before + batch) / num_steps
        fetch_state(self.model)
        for adapter in self._adapters:
            adapter.set_progress(share)
