"""Where things are in a model: adapted layers, and all by their paths."""

import re

import keras

from keras_fvae import keras_internals
from keras_fvae.layers import ADAPTED_CLASSES
from keras_fvae.layers import FVAELoRAMixin


def check_model(model):
    """Raises a `TypeError` if `model` is no Keras model or layer."""
    if not isinstance(model, keras.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer. "
            f"Received: model={model!r} (of type {type(model)})"
        )


def adapted_layers(model):
    """The layers of a model that are adapted by FVAE-LoRA, in their order."""
    return [
        layer
        for layer in keras_internals.flatten_layers(model)
        if isinstance(layer, FVAELoRAMixin)
    ]


def require_adapted_layers(model):
    """As `adapted_layers`; a `ValueError` if there are none."""
    check_model(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            f"Model '{model.name}' has no layer adapted by FVAE-LoRA. Call "
            "`enable_fvae_lora` first, or load adapters."
        )
    return layers


def adaptable_layers(model):
    """The layers of a model that are of a class that can be adapted."""
    return [
        layer
        for layer in keras_internals.flatten_layers(model)
        if type(layer) in ADAPTED_CLASSES
    ]


def holders(model, layers):
    """The model and the layers inside it that hold one of the layers."""
    layer_ids = {id(layer) for layer in layers}
    return [
        holder
        for holder in keras_internals.flatten_layers(model)
        if id(holder) not in layer_ids
        and any(
            id(inner) in layer_ids
            for inner in keras_internals.flatten_layers(holder)
        )
    ]


def layers_by_path(container):
    """The layers inside a container that have weights, by relative path.

    Adapters' own layers are left out: they may be there or not. So are layers
    without weights: the same model may have a preprocessor or not.
    """
    adapter_layer_ids = {
        id(layer)
        for adapted in adapted_layers(container)
        for layer in keras_internals.flatten_layers(adapted.adapter)
    }
    return numbered(
        (path, layer)
        for path, layer in keras_internals.walk_layers(container)[1:]
        if id(layer) not in adapter_layer_ids and layer.weights
    )


def base_weights_by_path(container):
    """The weights of a container beside the adapters', by relative path."""
    adapter_ids = {
        id(weight)
        for layer in adapted_layers(container)
        for weight in layer.adapter.weights
    }
    # The innermost layer that has a weight comes last.
    owners = {
        id(weight): path
        for path, layer in keras_internals.walk_layers(container)
        for weight in layer.weights
    }
    return numbered(
        (f"{owners[id(weight)]}/{weight.name}".lstrip("/"), weight)
        for weight in container.weights
        if id(weight) not in adapter_ids
    )


def by_recorded_paths(recorded_paths, objects):
    """Objects by the paths that they were recorded with.

    Where a layer has no name, Keras gives it a number that depends on what
    was made before it, so the numbers may have changed.
    """

    def without_numbers(paths):
        return [re.sub(r"_\d+(?=/|:|$)", "", path) for path in paths]

    is_renumbered = set(recorded_paths) != set(objects) and without_numbers(
        recorded_paths
    ) == without_numbers(objects)
    if is_renumbered:
        return dict(zip(recorded_paths, objects.values()))
    return objects


def numbered(pairs):
    """A dict of pairs; where a path is taken, it gets a number behind it."""
    by_path = {}
    for path, value in pairs:
        unique_path, number = path, 2
        while unique_path in by_path:
            unique_path, number = f"{path}:{number}", number + 1
        by_path[unique_path] = value
    return by_path
