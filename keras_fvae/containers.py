"""Models with adapted layers inside: attach, merge, describe, restore."""

import contextlib
import functools
import inspect

import keras

from keras_fvae import keras_internals
from keras_fvae import masking
from keras_fvae import sharding
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.fvae import NotRematerialized
from keras_fvae.layers import ADAPTED_CLASSES
from keras_fvae.layers import FVAELoRAMixin
from keras_fvae.layers import attach_adapter
from keras_fvae.layers import build_adapter
from keras_fvae.layers import check_adaptable
from keras_fvae.layers import detach_adapter
from keras_fvae.layers import follow_kernel
from keras_fvae.layers import has_widened_bias
from keras_fvae.layers import merge_update
from keras_fvae.layers import widen_bias
from keras_fvae.lookup import adapted_layers
from keras_fvae.lookup import base_weights_by_path
from keras_fvae.lookup import by_recorded_paths
from keras_fvae.lookup import holders
from keras_fvae.lookup import layers_by_path
from keras_fvae.scoped import ScopedValue
from keras_fvae.training import freeze_all_but

RECORD_VERSION = 1


def _traced_in_parts(method):
    """A method that `torch.compile` does not trace, but all that it calls.

    A model with adapters is nested deeper than Python lets it trace as one.
    `torch.export` traces otherwise, and only as one.
    """
    if keras.config.backend() != "torch":
        return method
    import torch

    disabled = torch.compiler.disable(method, recursive=False)

    @functools.wraps(method)
    def call(*args, **kwargs):
        if torch.compiler.is_exporting():
            return method(*args, **kwargs)
        return disabled(*args, **kwargs)

    return call


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedContainer(NotRematerialized):
    """What a layer with adapted layers inside it can do besides.

    It tells the adapted layers which tokens count, and its config says what is
    adapted, so that whatever is rebuilt from the config has the adapters too.
    """

    # Whether the tokens are those of the layers around it, too.
    knows_outer_masks = True

    @_traced_in_parts
    def call(self, *args, **kwargs):
        arguments = self.base_call_signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        masks = masking.find_masks(arguments.arguments)
        with masking.known_masks(masks, inherit=self.knows_outer_masks):
            return super().call(*args, **kwargs)

    def get_config(self):
        with _as_base_class(self):
            layer = keras.saving.serialize_keras_object(self)
        # Whoever serializes this layer adds how it was compiled.
        layer.pop("compile_config", None)
        return {
            "layer": layer,
            "layer_build_config": layer.pop("build_config", None),
            "adapters": describe_adapters(self),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layer = keras.saving.deserialize_keras_object(
            config["layer"], custom_objects
        )
        if not layer.built and config["layer_build_config"]:
            layer.build_from_config(config["layer_build_config"])
        restore_adapters(layer, config["adapters"])
        return layer

    @classmethod
    def registration(cls, base):
        """As what an adapted container of class `base` is saved.

        Returns:
            Registered name, name of the module in which Keras looks for the
            class if nothing is registered, and the class to make on loading.
        """
        return "keras_fvae>AdaptedContainer", __name__, AdaptedContainer


# The model that is being called, the innermost of them.
_called_model = ScopedValue()


class AdaptedModel(keras_internals.ToldOfTraining, AdaptedContainer):
    """A `keras.Model` with adapted layers inside it."""

    knows_outer_masks = False

    def __call__(self, *args, **kwargs):
        with _called_model.set_to(self):
            return super().__call__(*args, **kwargs)

    def call(self, *args, **kwargs):
        if _called_model.value is not self:
            # Keras's trainer for JAX calls `call` itself, which tells the
            # layers inside nothing of `training`.
            return self(*args, **kwargs)
        return super().call(*args, **kwargs)

    # What cannot be done is refused here, before any weight is touched.

    def fit(self, *args, **kwargs):
        refuse_training_if_finalized(self)
        return super().fit(*args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        refuse_training_if_finalized(self)
        return super().train_on_batch(*args, **kwargs)

    def _maybe_symbolic_build(self, *args, **kwargs):
        # Of Keras's trainer for TensorFlow.
        make_state(self, *args, **kwargs)
        super()._maybe_symbolic_build(*args, **kwargs)

    # Its steps go where the distribution is that is set when they are made.

    def make_train_function(self, *args, **kwargs):
        join_distribution(self)
        return super().make_train_function(*args, **kwargs)

    def make_test_function(self, *args, **kwargs):
        join_distribution(self)
        return super().make_test_function(*args, **kwargs)

    def make_predict_function(self, *args, **kwargs):
        join_distribution(self)
        return super().make_predict_function(*args, **kwargs)

    def _check_quantize_args(self, *args):
        # What Keras calls first: it binds `quantize` when a model is made.
        refuse_quantization(self)


class AdaptedSequential(AdaptedModel):
    """A `keras.Sequential`, often a part of a model rather than a model."""

    knows_outer_masks = True


# Of which base classes the containers are of a class of their own.
_container_mixins = {
    keras.Model: AdaptedModel,
    keras.Sequential: AdaptedSequential,
}


def register_container(base, mixin):
    """Makes `mixin` what containers that derive from `base` can do besides.

    Args:
        base: Class that derives from `keras.Layer`.
        mixin: Class that derives from `AdaptedContainer`.
    """
    _container_mixins[base] = mixin


def refuse_training_if_finalized(model):
    """Raises a `ValueError` if a model is finalized."""
    for layer in adapted_layers(model):
        layer.adapter.fvae.refuse_if_finalized()


def refuse_quantization(model):
    """Raises a `ValueError` if a model has adapters."""
    for layer in adapted_layers(model):
        layer.adapter.fvae.refuse_quantization()


def join_distribution(model):
    """Lays out a model with adapters that was made before a distribution."""
    if keras.distribution.distribution() is None:
        # Nor are the layers walked for it, batch by batch.
        return
    layers = adapted_layers(model)
    for layer in layers:
        follow_kernel(layer, layer.adapter.variables)
    if layers:
        optimizer = getattr(model, "optimizer", None)
        sharding.join_distribution(
            [
                *model.variables,
                *model.metrics_variables,
                *(optimizer.variables if optimizer else ()),
            ]
        )


def make_state(model, *args, **kwargs):
    """Makes all state of a model with adapters before TensorFlow traces it."""
    if keras_internals.trace_makes_state(model) and adapted_layers(model):
        keras_internals.make_state(model, *args, **kwargs)


def attach_adapters(model, layers, adapters):
    """Adapts layers of a model, in place.

    Args:
        model: `keras.Model` or layer.
        layers: List of layers inside it.
        adapters: List of what `build_adapter` returned for them.
    """
    for layer, adapter in zip(layers, adapters):
        attach_adapter(layer, adapter)
    _make_containers(model, layers)


def replace_adapters(layers, adapters):
    """Puts other adapters in the place of those that the layers have."""
    for layer, adapter in zip(layers, adapters):
        detach_adapter(layer)
        attach_adapter(layer, adapter)


def merge_adapters(model, layers, updates):
    """Makes adapted layers plain ones, with their updates in their weights.

    Args:
        model: `keras.Model` or layer.
        layers: List of all adapted layers inside it.
        updates: List of what `linear_update` returned for their adapters.
    """
    containers = holders(model, layers)
    for layer, update in zip(layers, updates):
        detach_adapter(layer)
        merge_update(layer, update)
    for container in containers:
        is_changed = any(
            isinstance(layer, FVAELoRAMixin) or has_widened_bias(layer)
            for layer in keras_internals.flatten_layers(container)
        )
        if isinstance(container, AdaptedContainer) and not is_changed:
            container.__class__ = _base_class(type(container))
    for layer in [*layers, *containers]:
        keras_internals.publish_weights(layer)


def describe_adapters(container):
    """What `restore_adapters` needs to know, as JSON can hold it.

    Args:
        container: `keras.Model` or layer with adapted layers inside.

    Returns:
        Dict: the paths, relative to the container, of all layers and weights,
        which of them are adapted and how, and which train.
    """
    layers = layers_by_path(container)
    weights = base_weights_by_path(container)
    return {
        "version": RECORD_VERSION,
        "layer_paths": list(layers),
        "adapted": {
            path: {
                "config": layer.config.get_config(),
                "finalized": layer.adapter.finalized,
                "trainable": container.trainable and layer.adapter.trainable,
            }
            for path, layer in layers.items()
            if isinstance(layer, FVAELoRAMixin)
        },
        "quantized": {
            path: {
                "mode": layer.quantization_mode,
                "config": keras.saving.serialize_keras_object(
                    getattr(layer, "quantization_config", None)
                ),
            }
            for path, layer in layers.items()
            if layer.quantization_mode is not None
        },
        "widened_biases": [
            path for path, layer in layers.items() if has_widened_bias(layer)
        ],
        "weight_paths": list(weights),
        "trainable": [
            path
            for path, weight in weights.items()
            if container.trainable and weight.trainable
        ],
    }


def restore_adapters(container, record):
    """Adapts and freezes a model as `describe_adapters` said it was.

    Layers that are adapted already, by what was restored inside the container
    before, stay as they are.

    Args:
        container: `keras.Model` or layer, built.
        record: Dict that `describe_adapters` returned.

    Raises:
        ValueError: If the record does not fit the container, which is then
            as it was.
    """
    quantized = _find_layers(container, record, record["quantized"])
    for path, layer in quantized.items():
        _quantize(layer, **record["quantized"][path])
    widened = _find_layers(container, record, record["widened_biases"])
    for layer in widened.values():
        widen_bias(layer)
    _make_containers(container, widened.values())
    layers = {
        path: layer
        for path, layer in find_recorded_layers(container, record).items()
        if not isinstance(layer, FVAELoRAMixin)
    }
    adapters = build_recorded_adapters(layers, record)
    attach_recorded_adapters(container, layers, adapters, record)


def find_recorded_layers(container, record):
    """The layers that a record says are adapted, by recorded path.

    Raises:
        ValueError: If the record is of a newer version, or a layer is missing.
    """
    return _find_layers(container, record, record["adapted"])


def find_recorded_weights(container, record):
    """The weights beside the adapters' that train, by recorded path.

    Raises:
        ValueError: If a weight is missing.
    """
    weights = by_recorded_paths(
        record["weight_paths"], base_weights_by_path(container)
    )
    for path in record["trainable"]:
        if path not in weights:
            raise ValueError(
                f"the weight '{path}' was trainable when it was saved. The "
                "model has no such weight."
            )
    return {path: weights[path] for path in record["trainable"]}


def build_recorded_adapters(layers, record):
    """Adapters for recorded layers, neither attached nor loaded.

    Args:
        layers: Dict of recorded path to layer.
        record: Dict that `describe_adapters` returned.

    Returns:
        Dict of recorded path to adapter.

    Raises:
        ValueError: If one of the layers cannot be adapted.
    """
    for layer in layers.values():
        check_adaptable(layer)
    return {
        path: build_adapter(
            layer,
            FVAELoRAConfig(**record["adapted"][path]["config"]),
            record["adapted"][path]["finalized"],
        )
        for path, layer in layers.items()
    }


def attach_recorded_adapters(container, layers, adapters, record):
    """Attaches what `build_recorded_adapters` built, and freezes the rest."""
    trainable_weights = [*find_recorded_weights(container, record).values()]
    attach_adapters(container, layers.values(), adapters.values())
    recorded = find_recorded_layers(container, record)
    # Also where all layers were restored already, by what is inside.
    _make_containers(container, recorded.values())
    for path, entry in record["adapted"].items():
        if entry["trainable"]:
            trainable_weights += recorded[path].adapter.weights
    freeze_all_but(container, trainable_weights)


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


def _find_layers(container, record, paths):
    if record["version"] > RECORD_VERSION:
        raise ValueError(
            "it was saved by a newer version of keras_fvae, in format "
            f"{record['version']}. This one reads formats up to "
            f"{RECORD_VERSION}. Install a newer keras_fvae."
        )
    layers = by_recorded_paths(record["layer_paths"], layers_by_path(container))
    for path in paths:
        if path not in layers:
            adaptable_paths = [
                path
                for path, layer in layers.items()
                if isinstance(layer, (*ADAPTED_CLASSES, FVAELoRAMixin))
            ]
            raise ValueError(
                f"the layer '{path}' was adapted when it was saved. The model "
                f"has no such layer, only these: {adaptable_paths}."
            )
    return {path: layers[path] for path in paths}


def _make_containers(model, layers):
    """Makes the layers that hold one of the layers adapted containers."""
    containers = holders(model, layers)
    for container in containers:
        if not isinstance(container, AdaptedContainer):
            container.__class__ = _container_class(type(container))
    for layer in [*layers, *containers]:
        keras_internals.publish_weights(layer)


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
            "base_call_signature": _signature(base.call),
        },
    )
    package, name = registered_name.split(">")
    register = keras.saving.register_keras_serializable(package, name)
    register(container_class)
    keras.saving.get_custom_objects()[registered_name] = loaded_class
    return container_class


def _base_class(container_class):
    return container_class.__bases__[-1]


@contextlib.contextmanager
def _as_base_class(container):
    """Makes a container for a while what it would be without adapters."""
    container_class = type(container)
    container.__class__ = _base_class(container_class)
    try:
        yield
    finally:
        container.__class__ = container_class


def _signature(method):
    """The signature of a method as it is called on an object."""
    signature = inspect.signature(method)
    _, *parameters = signature.parameters.values()
    return signature.replace(parameters=parameters)
