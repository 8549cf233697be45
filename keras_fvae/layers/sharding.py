"""How the variables of an adapter lie on a mesh of devices: as its kernel does.

`keras.distribution` finds the layout of a variable by its path. That of an
adapter's follows from the layout of the kernel beside it, and from which of
the kernel's axes are contracted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.linear_map import LinearMap

# By the name of a weight of an adapter, which axes of the kernel its axes are.
WeightAxes: TypeAlias = Mapping[str, tuple[str | None, ...]]


def adapter_layout_map(
    layout_map: keras.distribution.LayoutMap,
) -> keras.distribution.LayoutMap:
    """Extends a layout map by the variables of FVAE-LoRA's adapters.

    Adapters follow the kernels that they adapt, with this function or without
    it: B is sharded as the kernel's output axes are; the encoders' first layer
    and the decoder's last as its input axes are; the small rest is replicated.
    In the map that is returned one can read what came out, since it gets an
    entry for each variable of an adapter when that is made, and say what is to
    come out instead: an entry whose key names an adapter counts.

    Args:
        layout_map: `keras.distribution.LayoutMap` of the base model, such as a
            KerasHub backbone's `get_layout_map` returns. It stays as it is.

    Returns:
        A `keras.distribution.LayoutMap` with the same entries.

    Raises:
        TypeError: If `layout_map` is no `LayoutMap`.

    Example:

    >>> mesh = keras.distribution.DeviceMesh(
    ...     (1, 1), ("batch", "model"), devices=["cpu:0"]
    ... )
    >>> layout_map = keras.distribution.LayoutMap(mesh)
    >>> layout_map[".*query/kernel"] = (None, "model")
    >>> layout_map = keras_fvae.adapter_layout_map(layout_map)
    >>> layout_map[".*query/adapter/fvae/feature_weights"] = ("batch", None)
    >>> distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    >>> with distribution.scope():
    ...     model = keras.Sequential(
    ...         [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ...     )
    ...     summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> [layout_map[path].axes for path in layout_map if "kernel_b" in path]
    [(None, 'model')]
    """
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise TypeError(
            "`layout_map` must be a `keras.distribution.LayoutMap`. "
            f"Received: {layout_map!r} (of type {type(layout_map)})"
        )
    return _ExtendedLayoutMap(layout_map)


class _ExtendedLayoutMap(keras.distribution.LayoutMap):
    """A layout map that takes entries for adapters as they are made."""

    def __init__(self, layout_map):
        super().__init__(layout_map.device_mesh)
        for pattern in layout_map:
            self[pattern] = layout_map[pattern]


@contextlib.contextmanager
def distributed_by(distribution: Any) -> Iterator[None]:
    """Sets the distribution inside the block, or none at all.

    With none, variables have no layout yet, nor can a pattern that is meant
    for kernels match one of them.
    """
    previous = keras.distribution.distribution()
    keras.distribution.set_distribution(distribution)
    try:
        yield
    finally:
        keras.distribution.set_distribution(previous)


def lay_out_like_kernel(
    kernel: Tensor,
    linear_map: LinearMap,
    variables: Sequence[keras.Variable],
    weight_axes: WeightAxes,
) -> None:
    """Lays out an adapter's variables as their kernel is, if it is.

    Args:
        kernel: `keras.Variable`, the kernel that is adapted.
        linear_map: `LinearMap` of the layer that has it.
        variables: List of `keras.Variable`. Those that have a layout keep it.
        weight_axes: Dict, as `Adapter.weight_axes`.

    Raises:
        ValueError: If the mesh does not divide the shape of a variable.
    """
    kernel_layout = layout_of(kernel)
    if kernel_layout is None:
        return
    axes_by_name = {}
    # Int4 kernels are packed to matrices.
    if len(kernel_layout.axes) == linear_map.num_kernel_axes:
        axes_by_name = _adapter_axes(
            kernel_layout.axes, linear_map, weight_axes
        )
    for variable in variables:
        if keras_internals.layout_of(variable) is None:
            axes = axes_by_name.get(
                variable.name, (None,) * len(variable.shape)
            )
            _lay_out(variable, axes, kernel_layout.device_mesh)


def join_distribution(variables: Sequence[keras.Variable]) -> None:
    """Lays out variables that were made before the distribution was set."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    for variable in variables:
        if keras_internals.layout_of(variable) is None:
            _set_layout(variable, distribution.get_variable_layout(variable))


def layout_of(
    variable: keras.Variable,
) -> keras.distribution.TensorLayout | None:
    """The layout that a variable has, or is to get; `None` if none."""
    layout = keras_internals.layout_of(variable)
    distribution = keras.distribution.distribution()
    if layout is None and distribution is not None:
        layout = distribution.get_variable_layout(variable)
    return layout


def num_parts(
    device_mesh: keras.distribution.DeviceMesh, axis_name: str | None
) -> int:
    """Into how many parts an axis of a mesh cuts; 1 if it is `None`."""
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape))
    return sizes.get(axis_name, 1)


def _adapter_axes(kernel_axes, linear_map, weight_axes):
    """By a variable's name, the mesh axes that its axes are sharded over."""

    def sharded(axes):
        # Several axes of the kernel are one of the adapter's, which is cut
        # along the first that is.
        names = [kernel_axes[axis] for axis in axes]
        return next((name for name in names if name is not None), None)

    mesh_axes = {
        "input": sharded(linear_map.kernel_contracted_axes),
        "output": sharded(linear_map.kernel_carried_axes),
        None: None,
    }
    return {
        name: tuple(mesh_axes[axis] for axis in axes)
        for name, axes in weight_axes.items()
    }


def _lay_out(variable, axes, device_mesh):
    layout_map = keras_internals.layout_map_of(
        keras.distribution.distribution()
    )
    given = _given_axes(layout_map, variable.path)
    if given is not None:
        axes = given
        if variable.name == "kernel_b":
            rank = variable.shape[0]
            if rank % num_parts(device_mesh, axes[0]):
                # A rank is small, and often smaller than the mesh.
                axes = (None, *axes[1:])
    layout = keras.distribution.TensorLayout(axes, device_mesh)
    _set_layout(variable, layout)
    if given is None and isinstance(layout_map, _ExtendedLayoutMap):
        layout_map[variable.path] = layout


def _set_layout(variable, layout):
    try:
        keras_internals.set_layout(variable, layout)
    except ValueError as error:
        raise ValueError(
            f"The variable '{variable.path}' of shape {tuple(variable.shape)} "
            f"cannot be laid out as {layout.axes} on the mesh "
            f"{layout.device_mesh}. Give it other axes in the `LayoutMap`, or "
            f"choose a mesh that divides it. {error}"
        ) from error


def _given_axes(layout_map, path):
    """What a layout map says of an adapter's variable, if anything."""
    for pattern in layout_map or ():
        if "adapter" in pattern and (
            pattern == path or re.fullmatch(pattern, path)
        ):
            return layout_map[pattern].axes
    return None
