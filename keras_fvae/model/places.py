"""Where in a model the layers are that a record names.

The model need not be the one that was recorded. What was recorded of a task
fits its bare backbone, and what was recorded of a backbone fits whatever has
one such backbone inside it.
"""

from __future__ import annotations

from typing import Any
from typing import NamedTuple

import keras

from keras_fvae.model.tree import LayerTree
from keras_fvae.model.tree import bare_path
from keras_fvae.model.tree import is_adaptable
from keras_fvae.model.tree import match_paths


class Place(NamedTuple):
    """Where a record fits.

    Attributes:
        tree: `LayerTree` of the model that was recorded, or of the model
            around it.
        layers: Dict of recorded path to layer, of those that are there.
        weights: Dict of recorded path to weight, of those that are there.
    """

    tree: LayerTree
    layers: dict[str, keras.Layer]
    weights: dict[str, keras.Variable]


def find_place(model: keras.Layer, record: dict[str, Any]) -> Place:
    """Where the layers and weights of a record are.

    By their whole paths; else the paths below one layer of the recorded model
    must be those below one layer of this model.

    Args:
        model: `keras.Model` or layer.
        record: Dict with the entries of `record.paths_of` and "adapted".

    Returns:
        A `Place`. It may lack what the model does not have.

    Raises:
        ValueError: If there are several such layers in the model.
    """
    tree = LayerTree(model)
    place = _whole(tree, record)
    if {*record["adapted"]} <= {*place.layers}:
        return place
    for recorded_root in _roots(record["adapted"]):
        roots = [
            root
            for root in ["", *tree.layers]
            if (recorded_root or root)
            and _fits(tree, root, record, recorded_root)
        ]
        if len(roots) > 1:
            raise ValueError(
                f"it fits several parts of the model: {roots}. Pass the one "
                "that is meant in the place of the model."
            )
        if roots and not recorded_root:
            return _whole(LayerTree(tree.layers[roots[0]]), record)
        if roots:
            return Place(
                tree,
                *(
                    _shifted(paths, objects, recorded_root, roots[0])
                    for paths, objects in (
                        (record["layer_paths"], tree.layers),
                        (record["weight_paths"], tree.weights),
                    )
                ),
            )
    return place


def _whole(tree, record):
    return Place(
        tree,
        *(
            match_paths(paths, objects, tree.model.name, record["name"])
            for paths, objects in (
                (record["layer_paths"], tree.layers),
                (record["weight_paths"], tree.weights),
            )
        ),
    )


def _roots(paths):
    """Those that all paths are below, the outermost, `""`, first."""
    roots = [""]
    first, *_ = paths
    for part in first.split("/")[:-1]:
        root = f"{roots[-1]}/{part}".lstrip("/")
        if not all(path.startswith(f"{root}/") for path in paths):
            break
        roots.append(root)
    return roots


def _fits(tree, root, record, recorded_root):
    """Whether what is adapted below one root is there below another."""
    matched = _below_both(
        record["layer_paths"], tree.layers, recorded_root, root
    )
    return all(
        path in matched and is_adaptable(matched[path])
        for path in record["adapted"]
    )


def _shifted(recorded_paths, objects, recorded_root, root):
    """Dict of recorded path to object: below the roots, and all around."""
    # What is below the root here was below the other one there.
    below = {*_below(objects, root).values()}
    around = {
        path: objects[path]
        for path in recorded_paths
        if path in objects
        and path not in below
        and not path.startswith(f"{recorded_root}/")
    }
    return {
        **around,
        **_below_both(recorded_paths, objects, recorded_root, root),
    }


def _below_both(recorded_paths, objects, recorded_root, root):
    """Dict of recorded path to object, of what is below both roots.

    By the paths from there on; if those are not the same, by the same paths
    without the numbers that Keras makes up.
    """
    recorded, there = (
        _below(recorded_paths, recorded_root),
        _below(objects, root),
    )
    if {*recorded} != {*there} and (
        [*map(bare_path, recorded)] == [*map(bare_path, there)]
    ):
        pairs = zip(recorded.values(), there.values())
    else:
        pairs = [
            (path, there[below])
            for below, path in recorded.items()
            if below in there
        ]
    return {path: objects[other] for path, other in pairs}


def _below(paths, root):
    """Dict of path from a root on to whole path, of what is below the root."""
    if not root:
        return {path: path for path in paths}
    return {
        path.removeprefix(f"{root}/"): path
        for path in paths
        if path.startswith(f"{root}/")
    }
