"""What a model takes on each device, counted without a weight in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import keras
import ml_dtypes
import numpy as np

from keras_fvae.backend import keras_internals
from keras_fvae.layers import sharding

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPerDevice:
    """What `memory_per_device` counted, in bytes; `print` it to read it.

    Args:
        frozen_weights: Integer, the weights that do not train.
        trainable_weights: Integer, the weights that train.
        gradients: Integer, the gradients of those.
        optimizer: Integer, what the optimizer keeps for each of them.
    """

    frozen_weights: int
    trainable_weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Integer, all of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        rows = {**dataclasses.asdict(self), "total": self.total}
        return "\n".join(
            f"{name.replace('_', ' '):<18}{size / GIB:>9.3f} GiB"
            for name, size in rows.items()
        )


def memory_per_device(
    make_model: Callable[[], keras.Layer],
    distribution: keras.distribution.DataParallel
    | keras.distribution.ModelParallel
    | None = None,
    optimizer_slots: int = 2,
) -> MemoryPerDevice:
    """Counts the memory that training keeps on each device, from shapes.

    Neither the model's weights nor the devices need to be there. What a step
    needs in passing is not counted: activations grow with the batch, and
    LoRA's update of a kernel is as large as the kernel.

    Args:
        make_model: Function without arguments that makes a model, enables
            what is to be enabled, and returns it. Inside it no variable gets a
            value, so it must neither load weights nor compile the model.
            KerasHub's tasks compile themselves: return a backbone.
        distribution: Optional `keras.distribution.ModelParallel` or
            `DataParallel`, of which the layouts are. `None` (default) means
            one device.
        optimizer_slots: Integer, how many variables of its shape the optimizer
            keeps for each weight that trains: 2 (default) as Adam does.

    Returns:
        A `MemoryPerDevice`.

    Raises:
        TypeError: If `make_model` is no function, or returns no Keras layer or
            model.
        ValueError: If `optimizer_slots` is negative, the model is compiled or
            not built, or a mesh does not divide the shape of a weight.

    Example:

    >>> def make_model():
    ...     layer = keras.layers.Dense(1024, use_bias=False, name="query")
    ...     model = keras.Sequential([keras.Input((1024,)), layer])
    ...     keras_fvae.enable_fvae_lora(model, rank=16)
    ...     return model
    >>> memory = keras_fvae.memory_per_device(make_model)
    >>> memory.frozen_weights == 4 * 1024 * 1024
    True
    """
    # A model is callable, too.
    if not callable(make_model) or isinstance(make_model, keras.Layer):
        raise TypeError(
            "`make_model` must be a function that makes the model, so that "
            f"its weights need not be there. Received: {make_model!r}"
        )
    if optimizer_slots < 0:
        raise ValueError(
            "`optimizer_slots` must be 0 or more. "
            f"Received: optimizer_slots={optimizer_slots}"
        )
    with (
        sharding.distributed_by(distribution),
        keras_internals.without_values(),
    ):
        model = _make(make_model)
        sizes = {
            is_trained: sum(
                bytes_per_device(weight)
                for weight in model.weights
                if weight.trainable == is_trained
            )
            for is_trained in (False, True)
        }
    return MemoryPerDevice(
        frozen_weights=sizes[False],
        trainable_weights=sizes[True],
        gradients=sizes[True],
        optimizer=optimizer_slots * sizes[True],
    )


def _make(make_model):
    try:
        model = make_model()
    except ValueError as error:
        if "stateless scope" not in str(error):
            raise
        raise ValueError(
            "Inside `make_model` no variable can have a value. Let it make a "
            "model that is not compiled; of KerasHub's tasks, which compile "
            "themselves, the backbone alone."
        ) from error
    if not isinstance(model, keras.Layer):
        raise TypeError(
            "`make_model` must return a `keras.Model` or layer. "
            f"Received: {model!r} (of type {type(model)})"
        )
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so its weights have no "
            "shapes. Give it a `keras.Input`, or build it, in `make_model`."
        )
    return model


def bytes_per_device(weight: keras.Variable) -> int:
    """Integer, the bytes of a variable on each device."""
    shape = weight.shape
    layout = sharding.layout_of(weight)
    if layout is not None:
        shape = [
            _divide(size, sharding.num_parts(layout.device_mesh, axis), weight)
            for size, axis in zip(shape, layout.axes)
        ]
    # A dependency of Keras, it makes `bfloat16` and its like known to NumPy.
    dtype = getattr(ml_dtypes, weight.dtype, weight.dtype)
    return math.prod(shape) * np.dtype(dtype).itemsize


def _divide(size, parts, weight):
    if size % parts:
        raise ValueError(
            f"The mesh divides an axis of size {size} by {parts}, which leaves "
            f"a rest, in the weight '{weight.path}' of shape "
            f"{tuple(weight.shape)}. Choose another mesh."
        )
    return size // parts
