"""Models with adapted layers inside: what they can do besides, and saving."""

from __future__ import annotations

import contextlib
import functools
import inspect
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from keras_fvae.backend import keras_internals
from keras_fvae.backend.fast_ops import traced_in_parts
from keras_fvae.backend.scoped import ScopedValue
from keras_fvae.backend.types import Filepath
from keras_fvae.layers import call_context
from keras_fvae.layers import masking
from keras_fvae.layers import sharding
from keras_fvae.layers import switching
from keras_fvae.layers.adapted import ADAPTED_MARK
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapted import seen_as
from keras_fvae.layers.adapted import shard_like_kernel
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.adapter import refuse_quantization
from keras_fvae.layers.attach import attach_adapter
from keras_fvae.layers.attach import detach_adapter
from keras_fvae.layers.attach import has_widened_bias
from keras_fvae.layers.attach import set_merged_weights
from keras_fvae.layers.attach import widen_bias
from keras_fvae.layers.call_context import CONTAINER_MARK
from keras_fvae.layers.call_context import called_in_this_trace
from keras_fvae.layers.call_context import is_training
from keras_fvae.layers.call_context import known_training
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.model import training
from keras_fvae.model.lookup import adapted_layers
from keras_fvae.model.record import CONFIG_KEY
from keras_fvae.model.record import build_recorded_adapter
from keras_fvae.model.record import check_version
from keras_fvae.model.record import describe
from keras_fvae.model.record import find_layers
from keras_fvae.model.record import restore_flags
from keras_fvae.model.summary import shown_with_methods
from keras_fvae.model.tree import LayerTree


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedContainer(
    keras_internals.NotRematerialized, keras_internals.Pickled
):
    """What a layer with adapted layers inside it can do besides.

    It tells the adapted layers which tokens count, and its config says what is
    adapted, so that whatever is rebuilt from the config has the adapters too.
    """

    # Whether the tokens are those of the layers around it, too.
    knows_outer_masks = True

    @traced_in_parts
    def call(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.base_call_signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        masks = masking.find_masks(arguments.arguments)
        # Not inside the block, which PyTorch's compiler takes to end there.
        call = super().call
        with (
            masking.known_masks(masks, inherit=self.knows_outer_masks),
            called_in_this_trace(),
        ):
            return call(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        if keras_internals.is_saving_to_h5():
            raise ValueError(NO_H5)
        with seen_as(self, base_class(type(self))):
            layer = keras.saving.serialize_keras_object(self)
        # Whoever serializes this layer adds how it was compiled.
        layer.pop("compile_config", None)
        config = layer.pop("config")
        # The class that the layer is of otherwise leaves the record alone.
        record = {"layer": layer, **describe(self)}
        return {**config, CONFIG_KEY: record}

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: Mapping[str, Any] | None = None,
    ) -> keras.Layer:
        config = {**config}
        record = config.pop(CONFIG_KEY, {})
        check_version(record)
        is_inside = _is_inside_record.value
        with inside_record():
            layer = keras.saving.deserialize_keras_object(
                {**record["layer"], "config": config}, custom_objects
            )
        # Else the record of what it is in has all, and that may have to build
        # the layer first.
        if not is_inside:
            restore_adapters(layer, record)
        return layer

    @classmethod
    def registration(cls, base: type) -> tuple[str, str, type]:
        """As what an adapted container of class `base` is saved.

        Returns:
            Registered name, name of the module in which Keras looks for the
            class if nothing is registered, and the class to make on loading.
        """
        return "keras_fvae>AdaptedContainer", __name__, AdaptedContainer


NO_H5 = (
    "Keras's old `.h5` format cannot bring adapters back. Save the model to a "
    "`.keras` file."
)
# The attributes that hold a model's compiled steps, if it has them.
STEPS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)
# Whether what is made from a config is inside something that has a record.
_is_inside_record = ScopedValue(default=False)
# The model that is being called, the innermost of them.
_called_model = ScopedValue()


def inside_record() -> AbstractContextManager[None]:
    """Says that a record has all layers that are made in a block."""
    return _is_inside_record.set_to(True)


def _steps_of(model, name):
    """Dict of what is switched, and of scales, to a compiled step."""
    return vars(model).setdefault(f"{name}s_by_what_is_switched", {})


def _by_what_is_switched(name):
    """A property that holds a compiled step, one for each set of adapters.

    Of those that are off or sample, and for each set of scales: a step that
    was traced without an adapter knows nothing of it.
    """

    def key_of(model):
        ids = frozenset()
        if switching.is_switched():
            ids = switching.ids_switched(adapted_layers(model))
        return ids, model.adapter_scales

    def get(model):
        return _steps_of(model, name).get(key_of(model))

    def set(model, step):
        if step is None:
            # Whatever is new, it is new for all.
            _steps_of(model, name).clear()
        else:
            _steps_of(model, name)[key_of(model)] = step

    return property(get, set)


def set_configs(
    layers: Sequence[keras.Layer], configs: Sequence[AdapterConfig]
) -> None:
    """Gives adapters other scales, each of which has compiled steps.

    Args:
        layers: List of adapted layers.
        configs: List of configs, which differ from theirs in `alpha` alone.
    """
    models = training.known_models_with(layers)
    for model in models:
        if model.adapter_scales is None:
            # What was compiled so far was so for these scales.
            scales = _scales_of(model)
            for name in STEPS:
                steps = _steps_of(model, name)
                for ids, known in [*steps]:
                    if known is None:
                        steps[ids, scales] = steps.pop((ids, None))
    for layer, config in zip(layers, configs):
        layer.adapter.config = config
    for model in models:
        model.adapter_scales = _scales_of(model)


def _scales_of(model):
    return tuple(layer.config.scale for layer in adapted_layers(model))


class AdaptedModel(AdaptedContainer):
    """A `keras.Model` with adapted layers inside it."""

    knows_outer_masks = False
    # Those of the adapted layers, as soon as one of them was changed.
    adapter_scales = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = kwargs.get("training")
        told = kept = contextlib.nullcontext()
        if training is not None:
            told = known_training(training)
        if self._is_evaluated_in_a_step(training):
            # Keras clears the losses of a model that is called once more.
            kept = keras_internals.losses_kept(self)
        # Not inside the block, which PyTorch's compiler takes to end there.
        call = super().__call__
        with _called_model.set_to(self), kept, told:
            return call(*args, **kwargs)

    def _is_evaluated_in_a_step(self, training):
        """Whether it is called in `compute_loss`, such as for a reference."""
        return (
            (training is False or switching.is_switched())
            and not keras_internals.is_compiling()
            and keras_internals.entry_layer() is None
            and is_training(None)
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if _called_model.value is not self:
            # Keras's trainer for JAX calls `call` itself, which tells the
            # layers inside nothing of `training`.
            return self(*args, **kwargs)
        return super().call(*args, **kwargs)

    def train_step(self, *args: Any) -> Any:
        layers = adapted_layers(self) if switching.is_switched() else ()
        kept = [
            weight
            for layer in layers
            if switching.is_off(layer)
            for weight in layer.adapter.trainable_weights
        ]
        step = super().train_step
        # Those of the last step, on PyTorch.
        keras_internals.clear_losses(self)
        with known_training(True):
            if not kept:
                return step(*args)
            return keras_internals.without_moving(kept, self, step, args)

    def summary(self, *args: Any, **kwargs: Any) -> Any:
        with shown_with_methods(self):
            return super().summary(*args, **kwargs)

    # What cannot be done is refused here, before any weight is touched.

    def save(self, filepath: Filepath, *args: Any, **kwargs: Any) -> Any:
        if str(filepath).endswith((".h5", ".hdf5")):
            # Before there is such a file.
            raise ValueError(NO_H5)
        return super().save(filepath, *args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        refuse_training_if_finalized(self)
        try:
            with keras_internals.values_kept(self):
                return super().fit(*args, **kwargs)
        finally:
            training.dismiss_callbacks(adapted_layers(self))

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        refuse_training_if_finalized(self)
        return super().train_on_batch(*args, **kwargs)

    def load_weights(
        self, filepath: Filepath, *args: Any, **kwargs: Any
    ) -> Any:
        _refuse_weights_of_others(self, pathlib.Path(filepath))
        return super().load_weights(filepath, *args, **kwargs)

    def _maybe_symbolic_build(self, *args, **kwargs):
        # Of Keras's trainer for TensorFlow.
        if keras_internals.trace_makes_state(self):
            keras_internals.make_state(self, *args, **kwargs)
        super()._maybe_symbolic_build(*args, **kwargs)

    # Its steps go where the distribution is that is set when they are made.

    def make_train_function(self, *args: Any, **kwargs: Any) -> Any:
        join_distribution(self)
        training.share_losses(adapted_layers(self))
        training.remember_training(self)
        if self.train_function is None:
            training.warn_of_missing_callbacks(self, adapted_layers(self))
        with _another_function(self, "train_step"):
            return super().make_train_function(*args, **kwargs)

    def make_test_function(self, *args: Any, **kwargs: Any) -> Any:
        join_distribution(self)
        with _another_function(self, "test_step"):
            return super().make_test_function(*args, **kwargs)

    def make_predict_function(self, *args: Any, **kwargs: Any) -> Any:
        join_distribution(self)
        return super().make_predict_function(*args, **kwargs)

    def _check_quantize_args(self, *args):
        # What Keras calls first: it binds `quantize` when a model is made.
        if adapted_layers(self):
            refuse_quantization()


@contextlib.contextmanager
def _another_function(model, name):
    """Makes a model's method another function, for the time of the block.

    JAX compiles functions that are equal once, whatever is off meanwhile.
    """
    method, attributes = getattr(model, name), vars(model)
    own = {key: attributes[key] for key in (name,) if key in attributes}
    attributes[name] = functools.partial(method)
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(own)


for name in STEPS:
    setattr(AdaptedModel, name, _by_what_is_switched(name))


class AdaptedSequential(AdaptedModel):
    """A `keras.Sequential`, often a part of a model rather than a model."""

    knows_outer_masks = True


# Mixins for specific base classes; all other layers get `AdaptedContainer`.
_container_mixins = {
    keras.Model: AdaptedModel,
    keras.Sequential: AdaptedSequential,
}


def register_container(base: type, mixin: type[AdaptedContainer]) -> None:
    """Makes `mixin` what containers that derive from `base` can do besides.

    Args:
        base: Class that derives from `keras.Layer`.
        mixin: Class that derives from `AdaptedContainer`.
    """
    _container_mixins[base] = mixin


def _refuse_weights_of_others(model, filepath):
    """Raises a `ValueError` if a file has the weights of other adapters.

    Keras would find that out after it had loaded most of them.
    """
    if not filepath.is_file():
        # Keras says so, or fetches it.
        return
    num_saved = keras_internals.count_saved(ADAPTED_MARK, filepath)
    num_layers = len(adapted_layers(model))
    if num_saved != num_layers:
        raise ValueError(
            f"'{filepath}' has the weights of a model with {num_saved} adapted "
            f"layers, and model '{model.name}' has {num_layers}. Load the "
            "weights of a base model before you adapt it; load those of an "
            "adapted one into a model that is adapted in the same way."
        )


def refuse_training_if_finalized(model: keras.Layer) -> None:
    """Raises a `ValueError` if a model is finalized."""
    for layer in adapted_layers(model):
        layer.adapter.refuse_if_finalized()


def join_distribution(model: keras.Layer) -> None:
    """Lays out a model with adapters that was made before a distribution."""
    if keras.distribution.distribution() is None:
        # Nor are the layers walked for it, batch by batch.
        return
    layers = adapted_layers(model)
    for layer in layers:
        adapter = layer.adapter
        shard_like_kernel(layer, adapter.variables, adapter.weight_axes)
    if layers:
        optimizer = getattr(model, "optimizer", None)
        sharding.join_distribution(
            [
                *model.variables,
                *model.metrics_variables,
                *(optimizer.variables if optimizer else ()),
            ]
        )


def replace_adapters(
    layers: Sequence[keras.Layer], adapters: Sequence[Adapter]
) -> None:
    """Puts other adapters in the place of those that the layers have."""
    for layer, adapter in zip(layers, adapters):
        detach_adapter(layer)
        attach_adapter(layer, adapter)


def detach_adapters(
    model: keras.Layer,
    layers: Sequence[keras.Layer],
    merged: Sequence[tuple[np.ndarray, np.ndarray | None]] = (),
) -> None:
    """Makes adapted layers plain ones, and what holds them.

    Args:
        model: `keras.Model` or layer.
        layers: List of all adapted layers inside it.
        merged: Optional list of what `merged_weights` returned for them.
    """
    containers = _ancestors(model, layers)
    for layer in layers:
        detach_adapter(layer)
    for layer, weights in zip(layers, merged):
        set_merged_weights(layer, *weights)
    for container in containers:
        if isinstance(container, AdaptedContainer) and not _needs_record(
            container
        ):
            container.__class__ = base_class(type(container))
    for layer in [*layers, *containers]:
        keras_internals.publish_weights(layer)


def _needs_record(container):
    """Whether a container's own config does not say all of its layers.

    Functional models have the configs of their layers in theirs, and with them
    what biases these have.
    """
    layers = keras_internals.flatten_layers(container)
    described_ids = {
        id(inner)
        for layer in layers
        if keras_internals.is_described_by_layers(
            base_class(type(layer))
            if isinstance(layer, AdaptedContainer)
            else type(layer)
        )
        for inner in keras_internals.layers_of(layer)
    }
    return any(
        isinstance(layer, AdaptedLayer)
        or (has_widened_bias(layer) and id(layer) not in described_ids)
        for layer in layers
    )


def restore_adapters(model: keras.Layer, record: dict[str, Any]) -> None:
    """Adapts and freezes a model as a record says.

    Layers that are adapted already, by what was restored inside the model
    before, stay as they are.

    Args:
        model: `keras.Model` or layer, built, of the architecture that was
            described.
        record: Dict that `record.describe` returned.

    Raises:
        ValueError: If the record does not fit the model.
    """
    check_version(record)
    layers = find_layers(LayerTree(model), record)
    for path, entry in record["quantized"].items():
        _quantize(layers[path], **entry)
    widened = [layers[path] for path in record["widened_biases"]]
    for layer in widened:
        widen_bias(layer)
    adapted = {path: layers[path] for path in record["adapted"]}
    adapters = {
        path: build_recorded_adapter(layer, record["adapted"][path])
        for path, layer in adapted.items()
        if not isinstance(layer, AdaptedLayer)
    }
    for path, adapter in adapters.items():
        attach_adapter(adapted[path], adapter)
    # Also where all was restored by what is inside.
    make_containers(model, [*adapted.values(), *widened])
    restore_flags(LayerTree(model), record)


def _quantize(layer, mode, config):
    """Quantizes a layer, if the one that it is in has not done so.

    Keras keeps the quantization of a layer that it rebuilds from a config, and
    not of the layers inside, such as those of `MultiHeadAttention`.
    """
    has_own_policy = not isinstance(
        layer.dtype_policy, keras.dtype_policies.DTypePolicyMap
    )
    if layer.quantization_mode is None and has_own_policy:
        if config is None:
            layer.quantize(mode)
        else:
            config = keras.saving.deserialize_keras_object(config)
            layer.quantize(config=config)


def make_containers(model: keras.Layer, layers: Sequence[keras.Layer]) -> None:
    """Makes what holds one of the layers adapted containers.

    The layers inside the model, the model, and models that it is in.
    """
    containers = _ancestors(model, layers)
    # The largest model says the last word.
    for container in sorted(containers, key=_num_layers):
        make_container(container)
        training.share_losses(adapted_layers(container))
    for layer in [*layers, *containers]:
        keras_internals.publish_weights(layer)


def _num_layers(layer):
    return len(keras_internals.flatten_layers(layer))


def _ancestors(model, layers):
    inside = LayerTree(model).ancestors(layers)
    around = training.living_models_with(layers)
    return [*{id(holder): holder for holder in [*inside, *around]}.values()]


def make_container(layer: keras.Layer) -> None:
    """Makes one layer that holds adapted layers an adapted container."""
    if isinstance(layer, AdaptedContainer):
        return
    names = [name for name in STEPS if vars(layer).get(name) is not None]
    steps = {name: vars(layer)[name] for name in names}
    for name in names:
        vars(layer)[name] = None
    for name in STEPS:
        # Of adapters that were removed.
        _steps_of(layer, name).clear()
    layer.__class__ = _container_class(type(layer))
    for name, step in steps.items():
        setattr(layer, name, step)
    if isinstance(layer, keras.Model):
        training.known_models.add(layer)


@functools.cache
def _container_class(base):
    """The class of containers that are of class `base` otherwise."""
    mixin = next(
        (_container_mixins[c] for c in base.__mro__ if c in _container_mixins),
        AdaptedContainer,
    )

    # Keras reads from its signature what it may pass.
    @functools.wraps(base.call)
    def call(self, *args, **kwargs):
        return mixin.call(self, *args, **kwargs)

    registered_name, module, loaded_class = mixin.registration(base)
    container_class = type(
        base.__name__,
        (mixin, base),
        {
            "__module__": module,
            "call": call,
            CONTAINER_MARK: _signature(base.call),
        },
    )
    package, name = registered_name.split(">")
    register = keras.saving.register_keras_serializable(package, name)
    register(container_class)
    keras.saving.get_custom_objects()[registered_name] = loaded_class
    return container_class


def base_class(container_class: type) -> type:
    """The class that a container is of otherwise."""
    return container_class.__bases__[-1]


def _signature(method):
    """The signature of a method as it is called on an object."""
    signature = inspect.signature(method)
    _, *parameters = signature.parameters.values()
    return signature.replace(parameters=parameters)


def _make_unknown_container(model):
    make_container(model)
    training.share_losses(adapted_layers(model))


call_context.on_unknown_container(_make_unknown_container)
