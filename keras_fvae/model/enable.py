"""Enabling: adapt layers of a model in place, and freeze the rest."""

from __future__ import annotations

import warnings

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import check_config
from keras_fvae.model.install import install
from keras_fvae.model.install import refuse_loops
from keras_fvae.model.lookup import check_built
from keras_fvae.model.summary import AdapterSummary
from keras_fvae.model.summary import frozen_but_new
from keras_fvae.model.summary import summarize
from keras_fvae.model.targets import LayerChoices
from keras_fvae.model.targets import Targets
from keras_fvae.model.targets import find_targets
from keras_fvae.model.targets import match_layers
from keras_fvae.model.training import refuse_while_running
from keras_fvae.model.tree import LayerTree


def enable_adapter(
    model: keras.Layer,
    config: AdapterConfig,
    target_layer_names: Targets | None = None,
    *,
    trainable_layer_names: LayerChoices = (),
    exclude_layer_names: LayerChoices = (),
) -> AdapterSummary:
    """Adapts a model by a low-rank method, in place, and freezes all the rest.

    The layers stay the same objects, with the same names, paths and weights.
    At first the model predicts what it did.

    Args:
        model: `keras.Model` (or layer) that is built. Every `Dense`,
            `EinsumDense`, `Conv1D`, `Conv2D` and `Conv3D` layer inside it, at
            any depth, can be adapted; convolutions in several groups of
            channels cannot, and by FVAE-LoRA none that is larger than 1.
        config: Config of the method, such as `keras_fvae.DoRAConfig(rank=16)`.
            A `seed` is counted up from layer to layer.
        target_layer_names: Which layers to adapt: a layer name (for a
            layer without one, the name of the attribute that holds it), a
            compiled regular expression that is searched for in `layer.path`, a
            function that takes a layer and returns a boolean, or a list of
            such. `"all-linear"` means all `Dense` and `EinsumDense` layers,
            and `"all-conv"` all convolutions, that can be adapted, but those
            that train and, unless the model is a backbone of KerasHub, its
            last layers, which give its outputs. A dict
            says besides how, for each name, expression or function: by a rank,
            by fields of the config such as `{"rank": 4, "alpha": 8}`, or by a
            config. `None` (default) means the query and value projections of
            attention, whatever they are called in KerasHub, and what a
            backbone's `default_lora_layer_names()` says, among the `Dense` and
            `EinsumDense` layers.
        trainable_layer_names: Layers to train as well, as a name, expression,
            function, or a list of such. Everything else in `model` is frozen.
        exclude_layer_names: Layers not to adapt, in the same forms.

    Returns:
        An `AdapterSummary`: the adapted layers and the parameter counts.

    Raises:
        ValueError: If nothing matches a name or expression, two entries of a
            dict match one layer, a layer that matches cannot be adapted by the
            method, or the model is adapted already. The model is then as it
            was.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> inputs = keras.Input((10, 32))
    >>> x = keras.layers.MultiHeadAttention(2, 16)(inputs, inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    >>> summary = keras_fvae.enable_adapter(
    ...     model, keras_fvae.LoRAConfig(4), trainable_layer_names=["head"]
    ... )
    >>> [path.split("/")[-1] for path in summary.layer_paths]
    ['query', 'value']

    In some blocks only, with a larger rank for the values:

    >>> import re
    >>> import keras_hub
    >>> backbone = keras_hub.models.BertBackbone(
    ...     50, num_layers=4, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> summary = backbone.enable_adapter(
    ...     keras_fvae.LoRAConfig(4),
    ...     {
    ...         re.compile("transformer_layer_[23]/.*/query"): 4,
    ...         re.compile("transformer_layer_[23]/.*/value"): 8,
    ...     },
    ... )
    >>> [layer.config.rank for layer in summary.layers]
    [4, 8, 4, 8]
    """
    check_built(model)
    check_config(config)
    tree = LayerTree(model)
    refuse_if_adapted(tree)
    trainable_layers = match_layers(
        model,
        trainable_layer_names,
        keras_internals.flatten_layers(model)[1:],
        "trainable_layer_names",
    )
    pairs = find_targets(
        model,
        config,
        target_layer_names,
        exclude_layer_names,
        trainable_layers,
    )
    targets = [layer for layer, _ in pairs]
    for layer in targets:
        check_adaptable(layer)
    refuse_while_running(targets)
    adapters = [
        build_adapter(layer, layer_config.for_layer(index))
        for index, (layer, layer_config) in enumerate(pairs)
    ]
    refuse_loops(tree, targets, adapters)
    install(tree, targets, adapters, trainable_layers)
    summary = summarize(model)
    if summary.fresh:
        warnings.warn(frozen_but_new(summary.fresh), stacklevel=2)
    return summary


def refuse_if_adapted(tree: LayerTree) -> None:
    """Raises a `ValueError` if a model has adapters."""
    if tree.adapted:
        layer = tree.adapted[0]
        raise ValueError(
            f"Model '{tree.model.name}' is adapted by "
            f"{layer.config.method_name} already: {len(tree.adapted)} layers, "
            f"the first is '{layer.path}'. Call "
            "`keras_fvae.remove_adapter(model)` first, which makes it the "
            "plain model again."
        )
