"""What is adapted in a model and what trains, as a record that JSON can hold.

Configs and adapter files have such a record, and models are made again by it.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.attach import has_widened_bias
from keras_fvae.layers.config import config_from_description
from keras_fvae.layers.config import describe_config
from keras_fvae.model import training
from keras_fvae.model.tree import LayerTree
from keras_fvae.model.tree import match_paths

# Where the config of a model has the record.
CONFIG_KEY = "keras_fvae"
VERSION = 4


def describe(model: keras.Layer) -> dict[str, Any]:
    """What it takes to adapt and freeze a model of the same architecture so.

    Args:
        model: `keras.Model` or layer with adapted layers inside.

    Returns:
        Dict: the paths of all layers and weights; which of the layers are
        adapted, quantized, or have a bias that they were made without; which
        train; which weights were chosen to train, whatever their flags say.
    """
    tree = LayerTree(model)
    layers, weights = tree.layers.items(), tree.weights.items()
    return {
        "version": VERSION,
        **paths_of(tree),
        "adapted": {
            path: {
                **describe_adapter(layer),
                "trainable": layer.adapter.trainable,
            }
            for path, layer in layers
            if layer in tree.adapted
        },
        "quantized": {
            path: {
                "mode": layer.quantization_mode,
                "config": keras.saving.serialize_keras_object(
                    getattr(layer, "quantization_config", None)
                ),
            }
            for path, layer in layers
            if layer.quantization_mode is not None
        },
        "widened_biases": [p for p, la in layers if has_widened_bias(la)],
        "trainable_layers": [path for path, la in layers if la.trainable],
        "trainable": [path for path, weight in weights if weight.trainable],
        "chosen_layers": [p for p, la in layers if training.is_chosen(la)],
        "chosen": [p for p, w in weights if training.is_chosen(w)],
        "trained_before": [
            p for p, w in weights if training.trained_before(w) is not False
        ],
        "trained_layers_before": [
            p for p, la in layers if training.trained_before(la) is not False
        ],
        "state": training.noted_state(tree),
    }


def check_version(record: dict[str, Any]) -> None:
    """Raises a `ValueError` if a record is none of this version."""
    version = record.get("version", 1)
    if version != VERSION:
        raise ValueError(
            f"The model was saved with adapters in format {version}, and this "
            f"version of keras_fvae reads format {VERSION}. Load it by the "
            "keras_fvae that saved it."
        )


def paths_of(tree: LayerTree) -> dict[str, Any]:
    """The part of a record by which layers and weights are found again."""
    return {
        "name": tree.model.name,
        "layer_paths": [*tree.layers],
        "weight_paths": [*tree.weights],
    }


def describe_adapter(
    layer: keras.Layer, finalized: bool = False
) -> dict[str, Any]:
    """The part of a record that says how a layer is adapted.

    Args:
        layer: Adapted layer.
        finalized: Boolean. Whether to describe what inference needs of it.
    """
    finalized = finalized or layer.adapter.finalized
    config = layer.adapter.inference_config if finalized else layer.config
    return {"config": describe_config(config), "finalized": finalized}


def find_layers(
    tree: LayerTree, record: dict[str, Any]
) -> dict[str, keras.Layer]:
    """Dict of recorded path to layer, of those that a record names.

    The architecture is the same, so where no name helps the order does.
    """
    return _find(tree, record["layer_paths"], tree.layers, record["name"])


def find_weights(
    tree: LayerTree, record: dict[str, Any]
) -> dict[str, keras.Variable]:
    """As `find_layers`, of the weights."""
    return _find(tree, record["weight_paths"], tree.weights, record["name"])


def _find(tree, recorded_paths, objects, recorded_name):
    found = match_paths(recorded_paths, objects, tree.model.name, recorded_name)
    missing = {*recorded_paths} - {*found}
    if not missing:
        return found
    if len(recorded_paths) != len(objects):
        raise ValueError(
            f"Model '{tree.model.name}' is of another architecture than when "
            f"it was saved: there is nothing at {sorted(missing)}, only at "
            f"{[*objects]}."
        )
    return dict(zip(recorded_paths, objects.values()))


def build_recorded_adapter(
    layer: keras.Layer, entry: dict[str, Any]
) -> Adapter:
    """The adapter of a recorded layer, neither attached nor loaded.

    Raises:
        ValueError: If the layer cannot be adapted.
    """
    check_adaptable(layer)
    config = config_from_description(entry["config"])
    return build_adapter(layer, config, entry["finalized"], starts_anew=False)


def restore_flags(tree: LayerTree, record: dict[str, Any]) -> None:
    """Makes what trained when a model was described train, and nothing else.

    Args:
        tree: `LayerTree` of a model that is adapted as the record says.
        record: Dict that `describe` returned.
    """
    layers, weights = find_layers(tree, record), find_weights(tree, record)
    trainable_layers = {*record["trainable_layers"]}
    trainable, chosen = {*record["trainable"]}, {*record["chosen"]}
    chosen_layers = {*record["chosen_layers"]}
    before = {*record["trained_before"]}
    layers_before = {*record["trained_layers_before"]}
    paths = {id(layer): path for path, layer in layers.items()}
    for layer in keras_internals.outermost_first(layers.values()):
        path = paths[id(layer)]
        layer.trainable = path in trainable_layers
        training.choose(layer, path in chosen_layers)
        training.note_flag(layer, path in layers_before)
    for path, weight in weights.items():
        weight.trainable = path in trainable
        training.choose(weight, path in chosen)
        training.note_flag(weight, path in before)
        training.note_digest(weight, record["state"].get(path))
    for path, entry in record["adapted"].items():
        layers[path].adapter.trainable = entry["trainable"]
