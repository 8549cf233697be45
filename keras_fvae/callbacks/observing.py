"""What the callbacks have in common that methods need while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.gradients import accumulated_steps
from keras_fvae.backend.gradients import stop_watching
from keras_fvae.backend.gradients import watch_gradients
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import is_integer
from keras_fvae.model.lookup import require_adapted_layers
from keras_fvae.model.training import forget_compiled_functions


class ObservingCallback(keras.callbacks.Callback):
    """A callback that sees the gradients of the adapters of one method.

    A method says in `config_class` which it is, and in `make_observer` who
    observes.

    Attributes:
        layers: List of the adapted layers that train.
        observer: `Observer`, what `make_observer` returned.
        steps_per_update: Integer, the steps whose gradients the optimizer
            accumulates.

    Args:
        total_steps: Positive integer, how many updates of the optimizer `fit`
            makes. `None` (default) asks `fit`.
    """

    # The class of the configs of the adapters that it is for.
    config_class: type[AdapterConfig]

    def __init__(self, total_steps: int | None = None) -> None:
        super().__init__()
        self.total_steps: int | None = checked_integer(
            "total_steps", total_steps, 1
        )

    def make_observer(self, adapters: Sequence[Any]) -> Observer:
        """The `Observer` of a `fit` that begins.

        Args:
            adapters: List of the adapters that train.
        """
        raise NotImplementedError

    def set_model(self, model: keras.Model) -> None:
        # Before any callback's `on_train_begin`, because `BackupAndRestore`
        # sets the optimizer's variables there.
        super().set_model(model)
        layers = require_adapted_layers(model, self.config_class)
        self.layers: list[keras.Layer] = [
            la for la in layers if la.adapter.is_trainable
        ]
        if not self.layers:
            raise ValueError(
                "Each layer that is adapted by "
                f"{self.config_class.method_name} is frozen, so there is "
                f"nothing to do for `{type(self).__name__}`. Set `trainable = "
                "True`, or leave it out."
            )
        # Kept, because to ask for the model after a step costs time on JAX.
        self.steps_per_update: int = accumulated_steps(model.optimizer)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self.observer: Any = self.make_observer(
            [la.adapter for la in self.layers]
        )
        watch_gradients(model.optimizer, self.observer)
        self._tell_adapters(self)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.leave()

    def leave(self) -> None:
        """Ends the watching, also where an error has ended `fit`."""
        stop_watching(self.model.optimizer)
        self._tell_adapters(None)

    def _tell_adapters(self, callback):
        for layer in self.layers:
            layer.adapter.callback = callback
        forget_compiled_functions(self.model, kinds=("train",))

    def total_updates(self) -> int:
        """Integer, the updates of the optimizer in a `fit` that begins.

        Raises:
            ValueError: If nobody knows.
        """
        if self.total_steps is not None:
            return self.total_steps
        num_steps = self.params.get("steps")
        if num_steps is None:
            raise ValueError(
                "`fit` does not know how many steps an epoch has. Pass "
                "`steps_per_epoch` to `fit`, or `total_steps` to "
                f"`{type(self).__name__}`."
            )
        return self.params["epochs"] * num_steps // self.steps_per_update

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Here Keras has the variables' values in the model.
        number = int(ops.convert_to_numpy(self.observer.num_updates))
        self._updates_before = self._last_update = number

    def new_updates(self, batch: int) -> range:
        """Range of the numbers, from 1, of the updates that were just made.

        Args:
            batch: Integer, what `on_train_batch_end` gets: several steps may
                be one execution, or one update.
        """
        begin = self._last_update + 1
        since = (batch + 1) // self.steps_per_update
        self._last_update = self._updates_before + since
        return range(begin, self._last_update + 1)


class Observer:
    """What `backend.gradients.watch_gradients` takes: it counts the updates.

    One that derives from it makes variables of its own in `build`, and
    overrides `after_update`.

    Args:
        adapters: List of the adapters that train.
    """

    def __init__(self, adapters: Sequence[Any]) -> None:
        self.adapters = adapters

    def build(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Makes the variables, as state of the optimizer."""
        self.num_updates: keras.Variable = optimizer.add_variable(
            (), dtype="int32", name="num_updates"
        )

    def observe(
        self, gradients: Sequence[Tensor], variables: Sequence[keras.Variable]
    ) -> None:
        """Counts an update, inside the compiled step."""
        num_updates = self.num_updates + 1
        self.num_updates.assign(num_updates)
        by_id = {id(v): g for v, g in zip(variables, gradients)}
        self.after_update(num_updates, by_id)

    def after_update(
        self, num_updates: Tensor, gradients: dict[int, Tensor]
    ) -> None:
        """What is done after an update, inside the compiled step.

        Args:
            num_updates: Scalar integer tensor, how many there have been.
            gradients: Dict of the id of a variable to its gradient.
        """
        raise NotImplementedError


def forget_moments(
    optimizer: keras.optimizers.Optimizer,
    variable: keras.Variable,
    index: Any = ...,
) -> None:
    """Sets to 0 what an optimizer keeps of a weight, such as Adam's moments.

    But for its moving average, which is of the weight and no moment.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
        variable: `keras.Variable`.
        index: What a NumPy array is indexed by, a part of the weight; all of
            it by default.
    """
    beginning = f"/{variable.path.replace('/', '_')}_"
    for slot in optimizer.variables:
        _, found, name = f"/{slot.path}".rpartition(beginning)
        if found and name != "average" and slot.shape == variable.shape:
            array = replicas.to_numpy(slot).copy()
            array[index] = 0
            slot.assign(array)


def checked_integer(name: str, value: int | None, minimum: int) -> int | None:
    """An argument that is `None` or an integer; a `ValueError` if not."""
    if value is not None and (not is_integer(value) or value < minimum):
        raise ValueError(
            f"`{name}` must be `None` or an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )
    return value
