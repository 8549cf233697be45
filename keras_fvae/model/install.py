"""Putting adapters into a model: what every way to adapt one ends with."""

from keras_fvae.layers import sharding
from keras_fvae.layers.attach import attach_adapter
from keras_fvae.model import training
from keras_fvae.model.containers import make_containers


def install(tree, layers, adapters, trainable_layers=(), trainable_weights=()):
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
