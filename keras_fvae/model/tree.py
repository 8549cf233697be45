"""The layers of a model and their weights, by paths that come back."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapted import adapted_class_of


class LayerTree:
    """What is in a model, and where; read once.

    A path is made of the names of the layers that a layer is in, from the
    model on. Adapters are no part of it: they may be there or not.

    Args:
        model: `keras.Model` or layer.
    """

    def __init__(self, model: keras.Layer) -> None:
        self.model = model
        self.adapted: list[keras.Layer] = []
        self._pairs, inner_ids = [], set()
        for path, layer in keras_internals.walk_layers(model):
            if isinstance(layer, AdaptedLayer):
                self.adapted.append(layer)
                inner_ids |= {
                    id(inner)
                    for inner in keras_internals.flatten_layers(layer.adapter)
                }
            if id(layer) not in inner_ids:
                self._pairs.append((path, layer))

    @property
    def all_layers(self) -> list[keras.Layer]:
        """List of the model and all layers inside it."""
        return [layer for _, layer in self._pairs]

    @functools.cached_property
    def layers(self) -> dict[str, keras.Layer]:
        """Dict of path to layer, of all inside the model that have weights.

        Those without are left out: the same model may have a preprocessor or
        not. A model that is itself a layer to adapt is there as `""`.
        """
        return numbered(
            (path, layer)
            for path, layer in self._pairs
            if layer.weights and (path or is_adaptable(layer))
        )

    @functools.cached_property
    def weights(self) -> dict[str, keras.Variable]:
        """Dict of path to weight, of all that are not an adapter's."""
        return numbered(
            (f"{path}/{weight.name}".lstrip("/"), weight)
            for path, _, weight in self.owned_weights
        )

    @functools.cached_property
    def owned_weights(self) -> list[tuple[str, keras.Layer, keras.Variable]]:
        """Tuples of a layer's path, the layer, and a weight of its own.

        In the order of `model.weights`.
        """
        adapter_ids = {
            id(weight)
            for layer in self.adapted
            for weight in layer.adapter.weights
        }
        # The innermost layer that has a weight comes last.
        owners = {
            id(weight): (path, layer)
            for path, layer in self._pairs
            for weight in layer.weights
        }
        return [
            (*owners[id(weight)], weight)
            for weight in self.model.weights
            if id(weight) not in adapter_ids
        ]

    def ancestors(self, layers: Sequence[keras.Layer]) -> list[keras.Layer]:
        """The model and the layers inside it that hold one of the layers."""
        parents = collections.defaultdict(list)
        for _, layer in self._pairs:
            for inner in keras_internals.layers_of(layer):
                parents[id(inner)].append(layer)
        found, waiting = set(), [id(layer) for layer in layers]
        while waiting:
            for parent in parents[waiting.pop()]:
                if id(parent) not in found:
                    found.add(id(parent))
                    waiting.append(id(parent))
        return [layer for layer in self.all_layers if id(layer) in found]


def is_adaptable(layer: keras.Layer) -> bool:
    """Whether a layer is adapted, or of a class that can be."""
    return (
        isinstance(layer, AdaptedLayer)
        or adapted_class_of(type(layer)) is not None  # type: ignore[arg-type]
    )


def match_paths(
    recorded_paths: Sequence[str],
    objects: dict[str, Any],
    name: str = "",
    recorded_name: str = "",
) -> dict[str, Any]:
    """Objects by the paths that they were recorded with.

    Where a layer has no name, Keras makes one up, with a number that depends
    on what was made before it. Some models put their own name, which may be
    made up, before those of their layers. So if the paths are not the same,
    they are compared without numbers and the model's name.

    Args:
        recorded_paths: List of strings.
        objects: Dict of path to object.
        name: String, the name of the model that has the objects.
        recorded_name: String, the name of the model that was recorded.

    Returns:
        Dict of recorded path to object; `objects`, if they are others.
    """
    if set(recorded_paths) != set(objects) and [
        bare_path(path, recorded_name) for path in recorded_paths
    ] == [bare_path(path, name) for path in objects]:
        return dict(zip(recorded_paths, objects.values()))
    return objects


def bare_path(path: str, name: str = "") -> str:
    """A path without what may be another each time a model is made.

    Args:
        path: String.
        name: String, the name of the model.
    """

    def bare(part):
        part = re.sub(r"_\d+", "", part)
        return part.removeprefix(re.sub(r"_\d+", "", name) + "_")

    return "/".join(map(bare, path.split("/")))


def numbered(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs; where a path is taken, it gets a number behind it."""
    by_path = {}
    for path, value in pairs:
        unique_path, number = path, 2
        while unique_path in by_path:
            unique_path, number = f"{path}:{number}", number + 1
        by_path[unique_path] = value
    return by_path
