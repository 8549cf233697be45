"""Putting adapters into a model: what every way to adapt one ends with."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers import sharding
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.attach import attach_adapter
from keras_fvae.model import training
from keras_fvae.model.containers import make_containers
from keras_fvae.model.tree import LayerTree


def install(
    tree: LayerTree,
    layers: Sequence[keras.Layer],
    adapters: Sequence[Adapter],
    trainable_layers: Sequence[keras.Layer] = (),
    trainable_weights: Sequence[keras.Variable] = (),
) -> None:
    """Adapts layers of a model in place; it trains what is said, no more.

    Args:
        tree: `LayerTree` of the model, which is not adapted yet.
        layers: List of layers inside it.
        adapters: List of what `build_adapter` returned for them.
        trainable_layers: List of other layers that train.
        trainable_weights: List of other weights that train.
    """
    model = tree.model
    sharding.join_distribution(model.variables)
    training.note_state(tree)
    training.note_flags(tree)
    for layer, adapter in zip(layers, adapters):
        attach_adapter(layer, adapter)
    make_containers(model, layers)
    trained = [
        weight
        for adapter in adapters
        if not adapter.finalized
        for weight in adapter.trainable_weights
    ]
    training.train_only(model, trainable_layers, [*trained, *trainable_weights])
    training.reset_training_state(layers)


def refuse_loops(
    tree: LayerTree, targets: Sequence[keras.Layer], adapters: Sequence[Adapter]
) -> None:
    """Refuses layers in a loop, out of which TensorFlow and JAX let no loss.

    Nor do random numbers get out; what has neither trains there.
    """
    layers = [
        layer
        for layer, adapter in zip(targets, adapters)
        if adapter.changes_state(training=True)
    ]
    for holder in tree.ancestors(layers):
        if isinstance(holder, keras.layers.RNN) and not holder.unroll:
            inner_ids = {
                id(inner) for inner in keras_internals.flatten_layers(holder)
            }
            layer = next(t for t in layers if id(t) in inner_ids)
            raise ValueError(
                f"The layer '{layer.path}' is in the loop of the recurrent "
                f"layer '{holder.name}', out of which neither a loss nor "
                "random numbers of an adapter come. Make that layer with "
                "`unroll=True`, take a method that has neither, such as "
                "`LoRAConfig()`, or choose other `target_layer_names`."
            )
