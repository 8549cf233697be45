"""Which layers of a model are adapted, and which can be."""

from __future__ import annotations

from typing import Any

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers import switching
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapted import adapted_class_of
from keras_fvae.layers.config import AdapterConfig


def check_model(model: Any) -> None:
    """Raises a `TypeError` if `model` is no Keras model or layer."""
    if not isinstance(model, keras.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer. "
            f"Received: model={model!r} (of type {type(model)})"
        )


def check_built(model: Any) -> None:
    """As `check_model`; a `ValueError` if it has no weights yet."""
    check_model(model)
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so its layers have no weights "
            "to adapt. Call it on data, or build it, before."
        )


def adapted_layers(model: keras.Layer) -> list[keras.Layer]:
    """The layers of a model that have an adapter, in their order."""
    return [
        layer
        for layer in keras_internals.flatten_layers(model)
        if isinstance(layer, AdaptedLayer)
    ]


def require_adapted_layers(
    model: keras.Layer, method: type[AdapterConfig] | None = None
) -> list[keras.Layer]:
    """As `adapted_layers`; a `ValueError` if there are none.

    Args:
        model: `keras.Model` or layer.
        method: Optional class of configs, those of the layers. Layers that
            are adapted by another method are left out.
    """
    check_model(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            f"Model '{model.name}' has no adapted layer. Call `enable_adapter` "
            "or `enable_fvae_lora` first, or load adapters."
        )
    if method is None:
        return layers
    of_method = [la for la in layers if isinstance(la.config, method)]
    if not of_method:
        raise ValueError(
            f"This takes a model that is adapted by {method.method_name}. "
            f"The layer '{layers[0].path}' of model '{model.name}' is adapted "
            f"by {layers[0].config.method_name}."
        )
    return of_method


def require_active_layers(
    model: keras.Layer, method: type[AdapterConfig] | None = None
) -> list[keras.Layer]:
    """As `require_adapted_layers`; a `ValueError` if adapters cannot draw.

    That is if they are finalized, or turned off.
    """
    layers = require_adapted_layers(model, method)
    for layer in layers:
        layer.adapter.refuse_if_finalized()
        if switching.is_off(layer):
            raise ValueError(
                f"The adapters of model '{model.name}' are turned off. Leave "
                "the `adapter_disabled` block first."
            )
    return layers


def check_can_predict(model: Any) -> None:
    """Raises a `TypeError` if `model` is no Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`, which can `predict`. "
            f"Received: model={model!r} (of type {type(model)})"
        )


def adaptable_layers(model: keras.Layer) -> list[keras.Layer]:
    """The layers of a model that are of a class that can be adapted."""
    return [
        layer
        for layer in keras_internals.flatten_layers(model)
        if adapted_class_of(type(layer)) is not None  # type: ignore[arg-type]
    ]
