"""Putting an adapter onto a layer that is there, and taking it off again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.layers import sharding
from keras_fvae.layers.adapted import ADAPTED_CLASSES
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapted import adapted_class_of
from keras_fvae.layers.adapted import new_adapter
from keras_fvae.layers.adapted import plain_class_of
from keras_fvae.layers.adapted import read_kernel
from keras_fvae.layers.adapted import shard_like_kernel
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import linear_map_of

# Those in which Keras gives the gradient with respect to a layer's input.
QUANTIZATION_MODES = (None, "int8", "int4")
# Convolutions that are no map of patches to filters by one kernel.
OTHER_CONVOLUTIONS: dict[tuple[type, ...], str] = {
    (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D): (
        "its filters see one channel each, so that more weights would be added "
        "than are adapted"
    ),
    (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D): (
        "it has two kernels, that of a depthwise convolution and one of size 1"
    ),
    (
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    ): "its kernel spreads each position of the input over several outputs",
}


def check_adaptable(layer: keras.Layer) -> None:
    """Refuses a layer that cannot be adapted in place.

    Args:
        layer: `keras.Layer`.

    Raises:
        ValueError: If the layer is of another class than `BASES`, not built,
            adapted already, or has LoRA, a kernel constraint, an equation that
            cannot be adapted, several groups of channels, or was quantized in
            other modes than int8 and int4.
    """
    what = f"layer '{layer.path or layer.name}'"
    if isinstance(layer, AdaptedLayer):
        raise ValueError(
            f"The {what} is adapted by {layer.config.method_name} already."
        )
    if adapted_class_of(type(layer)) is None:  # type: ignore[arg-type]
        kind = f"of class `{type(layer).__name__}`"
        for base in ADAPTED_CLASSES:
            if isinstance(layer, base):
                kind += (
                    f", which derives from `{base.__name__}` and computes "
                    "something else"
                )
        kind += other_convolution(layer)
        raise ValueError(
            "Adapters fit layers of the classes `Dense`, `EinsumDense`, "
            "`Conv1D`, `Conv2D` and `Conv3D`, and of those that derive from "
            f"them and keep their `call`. The {what} is {kind}."
        )
    if not layer.built:
        raise ValueError(
            f"The {what} is not built. Call the model on data, or build it, "
            "before you adapt it."
        )
    if layer.lora_enabled:
        raise ValueError(
            f"LoRA is enabled on the {what} already, by Keras. A layer takes "
            "no other method beside it: start from a model without LoRA."
        )
    if layer.kernel_constraint is not None:
        raise ValueError(
            f"The {what} has a kernel constraint, which could not hold for the "
            "kernel and the update together. Remove the `kernel_constraint`, "
            "or leave the layer out of `target_layer_names`."
        )
    if layer.quantization_mode not in QUANTIZATION_MODES:
        raise ValueError(
            f"The {what} is quantized in the mode '{layer.quantization_mode}'. "
            "Adapters fit quantized layers of the modes 'int8' and 'int4'."
        )
    linear_map_of(layer)


def other_convolution(layer: keras.Layer) -> str:
    """Why a convolution that is none of `BASES` cannot be adapted.

    Args:
        layer: `keras.Layer`.

    Returns:
        String, the end of a sentence on the class of the layer; `""` if it is
        no such convolution.
    """
    for classes, reason in OTHER_CONVOLUTIONS.items():
        if isinstance(layer, classes):
            return f": {reason}"
    return ""


def build_adapter(
    layer: keras.Layer,
    config: AdapterConfig,
    finalized: bool = False,
    starts_anew: bool = True,
) -> Adapter:
    """A built adapter for a built layer, not attached to it yet.

    Args:
        layer: Layer that `check_adaptable` accepts.
        config: Config of the method.
        finalized: Boolean. Whether to hold only what inference needs.
        starts_anew: Boolean. Whether the initial values matter; `False` if
            others will be set.
    """
    with (
        replicas.scope_of(keras_internals.kernel_of(layer)),
        sharding.distributed_by(None),
    ):
        adapter = new_adapter(layer, config, finalized)
        # The variables get the paths that they will have in the layer.
        with (
            keras.name_scope(layer.name, caller=layer),
            _named_refusals(layer, config),
        ):
            adapter.build(
                linear_map_of(layer),
                layer.kernel.shape,
                (lambda: read_kernel(layer)) if starts_anew else None,
            )
    shard_like_kernel(layer, adapter.variables, adapter.weight_axes)
    return adapter


def adapter_shapes(
    layer: keras.Layer, config: AdapterConfig, finalized: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's arrays, none of which is made.

    Args:
        layer: Layer that `check_adaptable` accepts.
        config: Config of the method.
        finalized: Boolean. Whether only what inference needs is held.

    Returns:
        Dict of name to shape, as `Adapter.array_shapes`.
    """
    # A seed, so that none is drawn.
    config = dataclasses.replace(config, seed=0)
    with keras_internals.without_values(), sharding.distributed_by(None):
        adapter = new_adapter(layer, config, finalized)
        with _named_refusals(layer, config):
            adapter.build(linear_map_of(layer), layer.kernel.shape)
    return adapter.array_shapes


def _named_refusals(layer, config):
    """Says of which layer and method a refusal is, inside the block."""
    return refusals_after(
        f"The layer '{layer.path or layer.name}' cannot be adapted by "
        f"{config.method_name}"
    )


@contextlib.contextmanager
def refusals_after(sentence: str) -> Iterator[None]:
    """Says a sentence before that of a `ValueError` raised inside the block.

    Args:
        sentence: String, which names what is refused.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{sentence}: {error}.") from error


def inference_arrays(layer: keras.Layer) -> dict[str, np.ndarray]:
    """Dict of name to NumPy array: what inference needs of an adapted layer."""
    return layer.adapter.get_arrays(
        finalized=True, read_kernel=lambda: read_kernel(layer)
    )


def attach_adapter(layer: keras.Layer, adapter: Adapter) -> None:
    """Turns a layer into an adapted one, in place: the same object.

    Args:
        layer: Layer that `check_adaptable` accepts.
        adapter: What `build_adapter` returned for it.
    """
    with keras_internals.unlocked(layer):
        layer.adapter = adapter
    layer.__class__ = adapted_class_of(type(layer))  # type: ignore
    keras_internals.update_call_signature(layer)
    layer.freeze_base()


def detach_adapter(layer: keras.Layer) -> None:
    """Turns an adapted layer back into a plain one; the reverse of attaching.

    Args:
        layer: Adapted layer, whose base weights stay frozen.
    """
    keras_internals.untrack(layer, layer.adapter)
    del layer.adapter
    layer.__class__ = plain_class_of(layer)
    keras_internals.update_call_signature(layer)


def merged_weights(layer: keras.Layer) -> tuple[np.ndarray, np.ndarray | None]:
    """The weights of the plain layer that computes what an adapted one does.

    Args:
        layer: Adapted layer.

    Returns:
        Pair of NumPy arrays: the kernel, in its own shape, and a bias for each
        unit; `None` in the place of a bias that stays what it is.

    Raises:
        ValueError: If there are none.
    """
    if layer.quantization_mode is not None:
        raise ValueError(
            f"its kernel is quantized ('{layer.quantization_mode}'): nothing "
            "can be added to it. Call `finalize_adapter` instead"
        )
    linear_map = linear_map_of(layer)
    kernel = replicas.to_numpy(layer.kernel).astype("float64")
    matrix = kernel.transpose(linear_map.matrix_order).reshape(
        layer.adapter.width, layer.adapter.units
    )
    previous = np.zeros(layer.adapter.units)
    if layer.bias is not None:
        bias = replicas.to_numpy(layer.bias).astype("float64")
        shape = linear_map.bias_shape(layer.kernel.shape)
        previous = np.broadcast_to(bias, shape).reshape(-1)
    matrix, bias = layer.adapter.merge(matrix, previous)
    return linear_map.from_matrix(matrix, kernel.shape), (
        None if np.array_equal(bias, previous) else bias
    )


def set_merged_weights(
    layer: keras.Layer, kernel: np.ndarray, bias: np.ndarray | None
) -> None:
    """Sets the weights of a layer that `detach_adapter` made plain.

    Args:
        layer: Layer.
        kernel: What `merged_weights` returned for it before.
        bias: The same.
    """
    layer.kernel.assign(kernel)
    if bias is not None:
        widen_bias(layer)
        layer.bias.assign(bias.reshape(layer.bias.shape))


def widen_bias(layer: keras.Layer) -> None:
    """Gives a layer a bias for each unit, if it has none or a narrower one.

    Args:
        layer: Built layer of one of `BASES`.
    """
    linear_map = linear_map_of(layer)
    shape = linear_map.bias_shape(layer.kernel.shape)
    if layer.bias is not None and tuple(layer.bias.shape) == shape:
        return
    previous = layer.bias
    with (
        keras_internals.unlocked(layer),
        keras.name_scope(layer.name, caller=layer),
        replicas.scope_of(keras_internals.kernel_of(layer)),
    ):
        if previous is not None:
            keras_internals.untrack(layer, previous)
        layer.bias = layer.add_weight(
            name="bias", shape=shape, initializer="zeros", trainable=False
        )
    shard_like_kernel(layer, [layer.bias])
    if previous is not None:
        layer.bias.assign(ops.broadcast_to(previous, shape))
    if hasattr(layer, "bias_axes"):
        outputs = layer.equation.split("->")[1]
        kernel = layer.equation.split("->")[0].split(",")[1]
        layer.bias_axes = "".join(axis for axis in outputs if axis in kernel)
    else:
        layer.use_bias = True
    layer.has_widened_bias = True


def has_widened_bias(layer: keras.Layer) -> bool:
    """Whether `widen_bias` has changed the layer."""
    return getattr(layer, "has_widened_bias", False)
