"""What the callbacks have in common that methods need while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.gradients import accumulated_steps
from keras_fvae.backend.gradients import num_updates_of
from keras_fvae.backend.gradients import observer_variables
from keras_fvae.backend.gradients import stop_watching
from keras_fvae.backend.gradients import watch_gradients
from keras_fvae.backend.keras_internals import fetch_state
from keras_fvae.backend.keras_internals import running_method
from keras_fvae.backend.keras_internals import variables_to_optimize
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
        has_begun: Boolean, whether `fit` has come to its first epoch.
        steps_per_update: Integer, the steps whose gradients the optimizer
            accumulates.

    Args:
        total_steps: Positive integer, how many updates of the optimizer `fit`
            makes. `None` (default) asks `fit`.
    """

    # Until `set_model` finds them.
    layers: Sequence[keras.Layer] = ()
    _is_watching: bool = False
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

    def begin(self, num_updates: int) -> None:
        """Plans a `fit`, before its first step.

        Args:
            num_updates: Integer, how many updates it makes. Where a run goes
                on that was killed, those that were made before count.
        """
        raise NotImplementedError

    def set_model(self, model: keras.Model) -> None:
        if running_method() in ("evaluate", "predict"):
            return
        # Before any callback's `on_train_begin`, because `BackupAndRestore`
        # sets the optimizer's variables there.
        super().set_model(model)
        layers = require_adapted_layers(model, self.config_class)
        self.layers = [la for la in layers if la.adapter.is_trainable]
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
        self._is_watching = True
        self._tell_adapters(self)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.leave()

    def leave(self) -> None:
        """Ends the watching, also where an error has ended `fit`."""
        stop_watching(self.model.optimizer, type(self.observer))
        self._is_watching = False
        self._tell_adapters(None)

    def _tell_adapters(self, callback):
        for layer in self.layers:
            layer.adapter.callback = callback
        forget_compiled_functions(self.model, kinds=("train",))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not self._is_watching:
            raise ValueError(
                f"`{type(self).__name__}` has left the model when its last "
                "`fit` ended. Pass it to `fit` in a list, or make a new "
                "`CallbackList`, because one serves a single `fit`."
            )
        self.has_begun: bool = False

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Here Keras has the variables' values in the model.
        self._last_update = self.observer.count()
        self._last_batch = -1
        if not self.has_begun:
            # Not before, because only now the first epoch is known.
            self.begin(self._total_updates(epoch))
            self.has_begun = True

    def due_update(self, batch: int, interval: int) -> int | None:
        """The last multiple of a number among the updates just made, if any.

        Args:
            batch: Integer, what `on_train_batch_end` gets: several steps may
                be one execution, or one update.
            interval: Positive integer.
        """
        num_steps = batch - self._last_batch
        most = self._last_update + -(-num_steps // self.steps_per_update)
        if most // interval == self._last_update // interval:
            return None
        # How many there were is only asked now, because that takes time.
        before = self._last_update
        fetch_state(self.model)
        self._last_update = self.observer.count()
        self._last_batch = batch
        due = self._last_update // interval * interval
        return due if due > before else None

    def _total_updates(self, first_epoch):
        if self.total_steps is not None:
            return self.total_steps
        num_steps = self.params.get("steps")
        if num_steps is None:
            raise ValueError(
                "`fit` does not know how many steps an epoch has. Pass "
                "`steps_per_epoch` to `fit`, or `total_steps` to "
                f"`{type(self).__name__}`."
            )
        num_steps *= self.params["epochs"] - first_epoch
        to_come = num_updates_of(self.model.optimizer, num_steps)
        return self._last_update + to_come


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

    def count(self) -> int:
        """Integer, how many updates there have been."""
        return int(ops.convert_to_numpy(self.num_updates))

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
    """Sets to 0 what the optimizer keeps of a weight, such as Adam's moments.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
        variable: `keras.Variable`, one of those it optimizes.
        index: What a NumPy array is indexed by, a part of the weight; all of
            it by default.
    """
    slots = slots_of(optimizer, variable)
    # LoRA-RITE's moments are in a basis of the other factor, which has changed:
    # none of them is of one rank alone.
    index = ... if "basis" in slots else index
    for name, slot in slots.items():
        if name != "average":
            _assign_part(slot, index, 0)


def begin_average(
    optimizer: keras.optimizers.Optimizer,
    variable: keras.Variable,
    index: Any = ...,
) -> None:
    """Begins the moving average of a weight anew, if the optimizer has one.

    Because between the old value and another one lies nothing that was trained.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
        variable: `keras.Variable`, one of those it optimizes, with a new value.
        index: As in `forget_moments`.
    """
    average = slots_of(optimizer, variable).get("average")
    if average is not None:
        _assign_part(average, index, replicas.to_numpy(variable)[index])


def _assign_part(variable, index, value):
    array = replicas.to_numpy(variable).copy()
    array[index] = value
    variable.assign(array)


def slots_of(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> dict[str, keras.Variable]:
    """What the optimizer keeps of each element of a weight, by name.

    Of weights with the same path, as in models that were built by themselves,
    the slots are in the order of the weights.
    """
    of_observers = {id(v) for v in observer_variables(optimizer)}
    flat_path = variable.path.replace("/", "_")
    beginning = f"/{flat_path}_"
    found: dict[str, list[keras.Variable]] = {}
    for slot in optimizer.variables:
        _, is_found, name = f"/{slot.path}".rpartition(beginning)
        if is_found and id(slot) not in of_observers:
            found.setdefault(name, []).append(slot)
    same_path = [
        id(weight)
        for weight in variables_to_optimize(optimizer)
        if weight.path.replace("/", "_") == flat_path
    ]
    index = same_path.index(id(variable))
    return {
        name: slots[index]
        for name, slots in found.items()
        if slots[index].shape == variable.shape
    }


def checked_integer(name: str, value: int | None, minimum: int) -> int | None:
    """An argument that is `None` or an integer; a `ValueError` if not."""
    if value is not None and (not is_integer(value) or value < minimum):
        raise ValueError(
            f"`{name}` must be `None` or an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )
    return value
