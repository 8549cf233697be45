"""Layers with an adapter: frozen, and with what a method adds to them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NoReturn
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import fast_ops
from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers import call_context
from keras_fvae.layers import sharding
from keras_fvae.layers import switching
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import check_config
from keras_fvae.layers.frozen import BASES
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.frozen import linear_map_of
from keras_fvae.layers.sharding import WeightAxes

# One more entry among the weights that an adapted layer saves.
ADAPTED_MARK = "keras_fvae"


class AdaptedLayer(keras_internals.NotRematerialized, keras_internals.Pickled):
    """What the adapted layers share: all but what they compute.

    The frozen layer computes what it always did, with Keras's own code for
    its weights, quantized or not; the adapter has its say before the
    activation.
    """

    # What the frozen layer computes, by which of its methods.
    _base_calls: dict[str, Callable[..., Tensor]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = super()
        # As functions, of which PyTorch's compiler traces a call with another
        # `self`, as it does not trace one of `super()`.
        cls._base_calls = {
            name: getattr(base, name)
            for name in ("call", "quantized_call")
            if hasattr(base, name)
        }

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Of the same class as a layer that was adapted in place.
        return super().__new__(in_place_class(cls), *args, **kwargs)

    def _init_adapter(self, config: AdapterConfig) -> None:
        """The part of `__init__` that the adapted layers share."""
        if self.lora_rank:
            raise ValueError(
                "An adapted layer takes no LoRA of Keras's besides. "
                f"Received: lora_rank={self.lora_rank}. Leave it out."
            )
        check_config(config)
        self.adapter: Adapter = new_adapter(self, config)

    @property
    def config(self) -> AdapterConfig:
        """The config of the layer's adapter."""
        return self.adapter.config

    @property
    def trainable(self) -> bool:
        """Boolean, whether the adapter trains. The base weights never do."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Layer.trainable.fset(self, value)
        self.freeze_base()

    def freeze_base(self) -> None:
        """Keeps every weight but the adapter's from training."""
        adapter_ids = {id(variable) for variable in self.adapter.variables}
        for variable in self.variables:
            if id(variable) not in adapter_ids:
                variable.trainable = False

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        with sharding.distributed_by(None):
            self.adapter.build(
                linear_map_of(self, len(input_shape)),
                self.kernel.shape,
                functools.partial(read_kernel, self),
            )
        shard_like_kernel(
            self, self.adapter.variables, self.adapter.weight_axes
        )
        self.freeze_base()

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self._adapt("call", inputs, training)

    def quantized_call(
        self, inputs: Tensor, training: bool | None = None
    ) -> Tensor:
        return self._adapt("quantized_call", inputs, training)

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """What Keras's convolutions call, and what it computes there."""
        return fast_ops.conv(
            inputs,
            kernel,
            self.strides,
            self.padding,
            self.data_format,
            self.dilation_rate,
        )

    def enable_lora(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"Layer '{self.name}' is adapted by {self.config.method_name} "
            "already, and takes no other method beside it. Call "
            "`keras_fvae.remove_adapter` first."
        )

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        # A layer without an adapter would load the base weights and pass the
        # adapter's over. One more entry than it expects makes it refuse.
        store[ADAPTED_MARK] = np.ones((), "int8")

    def load_own_variables(self, store: Any) -> None:
        own = {name: store[name] for name in [*store.keys()]}
        own.pop(ADAPTED_MARK, None)
        super().load_own_variables(own)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "config": keras.saving.serialize_keras_object(self.config),
            "finalized": self.adapter.finalized,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Layer:
        finalized = config["finalized"]
        config = {key: config[key] for key in config if key != "finalized"}
        config["config"] = keras.saving.deserialize_keras_object(
            config["config"]
        )
        layer = super().from_config(config)
        layer.adapter.finalized = finalized
        return layer

    def _adapt(self, name, inputs, training):
        base_call = self._base_calls[name]
        call_context.note_entries()
        if switching.is_any_switched() and replicas.are_several():
            raise ValueError(
                "With several replicas of TensorFlow adapters can neither be "
                "switched off nor sampled: each replica is a thread of its "
                "own, and does not know. Leave the `adapter_disabled` or "
                "`adapter_sampling` block first."
            )
        if switching.is_off(self):
            return base_call(self, inputs)
        training = self._trains(inputs, training)
        if self.adapter.changes_state(training):
            call_context.refuse_inside_transformation(self)
        is_linear = self.activation in (None, keras.activations.linear)
        layer = self if is_linear else _WithoutActivation(self)
        frozen = FrozenCall(
            self,
            functools.partial(base_call, layer, inputs),
            keras_internals.to_features(inputs, self.compute_dtype),
        )
        outputs = self.adapter.adapt(frozen, training)
        return outputs if is_linear else self.activation(outputs)

    def _trains(self, inputs, training):
        """Whether the layer computes as in training.

        As all of Keras's layers do, it does not while it is frozen. Nor is
        there anything to draw for no tokens.
        """
        if not call_context.is_training(training):
            return False
        self.adapter.refuse_if_finalized()
        return 0 not in inputs.shape and self.adapter.is_trainable


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedDense(AdaptedLayer, keras.layers.Dense):
    """`keras.layers.Dense`, frozen, with the adapter of a low-rank method.

    Args:
        units: Positive integer, dimensionality of the output space.
        config: Config of the method, such as `keras_fvae.LoRAConfig(rank=8)`.
        **kwargs: Every argument of `keras.layers.Dense`, but for LoRA's. The
            `kernel_regularizer` applies to the low-rank factors; the
            `kernel_constraint` has nothing to act on, since the kernel is
            frozen.

    Input shape:
        N-D tensor with shape `(batch_size, ..., input_dim)`.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units)`.

    Raises:
        ValueError: If a LoRA argument of Keras's is given.
        TypeError: If `config` is none of a low-rank method.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.LoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 10, 32))).shape)
    (2, 10, 8)
    >>> [weight.name for weight in layer.trainable_weights]
    ['kernel_a', 'kernel_b']
    """

    def __init__(
        self, units: int, config: AdapterConfig, **kwargs: Any
    ) -> None:
        super().__init__(units, **kwargs)
        self._init_adapter(config)


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedEinsumDense(AdaptedLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense`, frozen, with the adapter of a method.

    As `keras_fvae.AdaptedDense`, for any equation in which each kernel axis is
    either contracted with the input or carried to the output. A token is the
    vector of all contracted axes, a unit one index of all carried axes.

    Args:
        equation: String, an einsum equation such as `"abc,cde->abde"`.
        output_shape: Integer or tuple, as in `keras.layers.EinsumDense`.
        config: Config of the method, such as `keras_fvae.LoRAConfig(rank=8)`.
        **kwargs: Every argument of `keras.layers.EinsumDense`, but for
            LoRA's. The `kernel_regularizer` applies to the low-rank factors;
            the `kernel_constraint` has nothing to act on, since the kernel is
            frozen.

    Raises:
        ValueError: If a LoRA argument of Keras's is given, or (when the layer
            is built) the equation cannot be adapted.
        TypeError: If `config` is none of a low-rank method.

    Example:

    >>> layer = keras_fvae.AdaptedEinsumDense(
    ...     "abc,cde->abde",
    ...     output_shape=(None, 2, 8),
    ...     config=keras_fvae.LoRAConfig(rank=4),
    ... )
    >>> tuple(layer(np.ones((2, 10, 32))).shape)
    (2, 10, 2, 8)
    """

    def __init__(
        self,
        equation: str,
        output_shape: int | tuple[int | None, ...],
        config: AdapterConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(equation, output_shape, **kwargs)
        self._init_adapter(config)


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedConv1D(AdaptedLayer, keras.layers.Conv1D):
    """`keras.layers.Conv1D`, frozen, with the adapter of a low-rank method.

    As `keras_fvae.AdaptedConv2D`, along one axis, and with padding that may be
    `"causal"`.

    Args:
        filters: Positive integer, the number of channels of the output.
        kernel_size: Integer or tuple of one.
        config: Config of the method, such as `keras_fvae.LoRAConfig(rank=8)`.
        **kwargs: Every argument of `keras.layers.Conv1D`, but for LoRA's.

    Raises:
        ValueError: If a LoRA argument of Keras's is given, the method does not
            fit (FVAE-LoRA takes a `kernel_size` of 1 alone), or (when the
            layer is built) the channels are in several groups.
        TypeError: If `config` is none of a low-rank method.

    Example:

    >>> layer = keras_fvae.AdaptedConv1D(8, 3, keras_fvae.LoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 10, 16))).shape)
    (2, 8, 8)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int],
        config: AdapterConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, kernel_size, **kwargs)
        self._init_adapter(config)


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedConv2D(AdaptedLayer, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, frozen, with the adapter of a low-rank method.

    A token is a patch, what the kernel sees of the input for one position of
    the output; a unit is a filter. So a convolution of size 1 is adapted as a
    `Dense` layer is, at each position. Of a larger one A is a convolution of
    the same size, strides, padding and dilation to `rank` channels, and B one
    of size 1, as in `keras.layers.Conv2D.enable_lora`.

    Args:
        filters: Positive integer, the number of channels of the output.
        kernel_size: Integer or tuple of two.
        config: Config of the method, such as `keras_fvae.LoRAConfig(rank=8)`.
        **kwargs: Every argument of `keras.layers.Conv2D`, but for LoRA's. The
            `kernel_regularizer` applies to the low-rank factors; the
            `kernel_constraint` has nothing to act on, since the kernel is
            frozen.

    Raises:
        ValueError: If a LoRA argument of Keras's is given, the method does not
            fit (FVAE-LoRA takes a `kernel_size` of 1 alone), or (when the
            layer is built) the channels are in several groups.
        TypeError: If `config` is none of a low-rank method.

    Example:

    >>> layer = keras_fvae.AdaptedConv2D(
    ...     8, 3, keras_fvae.LoRAConfig(rank=4), strides=2, padding="same"
    ... )
    >>> tuple(layer(np.ones((2, 10, 10, 16))).shape)
    (2, 5, 5, 8)
    >>> [tuple(weight.shape) for weight in layer.trainable_weights]
    [(144, 4), (4, 8)]
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int],
        config: AdapterConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, kernel_size, **kwargs)
        self._init_adapter(config)


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedConv3D(AdaptedLayer, keras.layers.Conv3D):
    """`keras.layers.Conv3D`, frozen, with the adapter of a low-rank method.

    As `keras_fvae.AdaptedConv2D`, along three axes.

    Args:
        filters: Positive integer, the number of channels of the output.
        kernel_size: Integer or tuple of three.
        config: Config of the method, such as `keras_fvae.LoRAConfig(rank=8)`.
        **kwargs: Every argument of `keras.layers.Conv3D`, but for LoRA's.

    Raises:
        ValueError: If a LoRA argument of Keras's is given, the method does not
            fit (FVAE-LoRA takes a `kernel_size` of 1 alone), or (when the
            layer is built) the channels are in several groups.
        TypeError: If `config` is none of a low-rank method.

    Example:

    >>> layer = keras_fvae.AdaptedConv3D(8, 3, keras_fvae.LoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 5, 5, 5, 16))).shape)
    (2, 3, 3, 3, 8)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int, int],
        config: AdapterConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, kernel_size, **kwargs)
        self._init_adapter(config)


@functools.cache
def in_place_class(adapted_class: type) -> type:
    """The class of adapted layers that have the name of their plain class.

    Keras finds the weights of the layers in a list by the names of their
    classes, which so stay what they were.

    Args:
        adapted_class: Class that derives from `AdaptedLayer`, or what this
            function returned.
    """
    if getattr(adapted_class, "is_in_place", False):
        return adapted_class
    base = next(base for base in BASES if issubclass(adapted_class, base))
    register = keras.saving.register_keras_serializable(
        package="keras_fvae", name=f"{adapted_class.__name__}InPlace"
    )
    return register(
        type(
            base.__name__,
            (adapted_class,),
            {"__module__": adapted_class.__module__, "is_in_place": True},
        )
    )


@contextlib.contextmanager
def seen_as(layer: keras.Layer, cls: type) -> Iterator[None]:
    """Makes a layer one of another class, for the time of the block.

    Args:
        layer: Layer.
        cls: Class that it is of without its adapters.
    """
    own_class = type(layer)
    layer.__class__ = cls
    try:
        yield
    finally:
        layer.__class__ = own_class


@keras.saving.register_keras_serializable(package="keras_fvae")
class AdaptedSubclass(AdaptedLayer):
    """A layer of a class that derives from Keras's, with an adapter.

    What it is without the adapter is saved as that, by whatever name the class
    is known.
    """

    plain_class: type

    def get_config(self) -> dict[str, Any]:
        with seen_as(self, self.plain_class):
            layer = keras.saving.serialize_keras_object(self)
        # What is loaded is built by the config of this layer.
        layer.pop("build_config", None)
        return {
            "layer": layer,
            "config": keras.saving.serialize_keras_object(self.config),
            "finalized": self.adapter.finalized,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Layer:
        # For its class, which may be known by a name of the user's.
        plain = keras.saving.deserialize_keras_object(config["layer"])
        # Made so, because Keras binds `build` when a layer is made.
        layer = type(plain).from_config.__func__(
            adapted_class_of(type(plain)), config["layer"]["config"]
        )
        if not isinstance(layer, AdaptedSubclass):
            raise ValueError(
                f"`from_config` of `{type(plain).__name__}` makes a layer of "
                "that class whatever class it is called on, so that it cannot "
                "be loaded with an adapter. Have it return `cls(**config)`."
            )
        layer._init_adapter(
            keras.saving.deserialize_keras_object(config["config"])
        )
        layer.adapter.finalized = config["finalized"]
        return layer


# By the class of a plain layer.
ADAPTED_CLASSES: dict[type, type] = {
    keras.layers.Dense: in_place_class(AdaptedDense),
    keras.layers.EinsumDense: in_place_class(AdaptedEinsumDense),
    keras.layers.Conv1D: in_place_class(AdaptedConv1D),
    keras.layers.Conv2D: in_place_class(AdaptedConv2D),
    keras.layers.Conv3D: in_place_class(AdaptedConv3D),
}
# What a class may not compute in another way than the one it derives from.
COMPUTATIONS = (
    "__call__",
    "call",
    "quantized_call",
    "kernel",
    "convolution_op",
)


@functools.cache
def adapted_class_of(plain_class: type) -> type | None:
    """The class of layers of a class that have an adapter.

    Args:
        plain_class: Class, such as `keras.layers.Dense`, or one that derives
            from it and computes the same.

    Returns:
        Class that derives from `AdaptedLayer` and from `plain_class`; `None`
        if there is none.
    """
    if plain_class in ADAPTED_CLASSES:
        return ADAPTED_CLASSES[plain_class]
    computes_the_same = any(
        issubclass(plain_class, base)
        and all(
            inspect.getattr_static(plain_class, name, None)
            is inspect.getattr_static(base, name, None)
            for name in COMPUTATIONS
        )
        for base in ADAPTED_CLASSES
    )
    if not computes_the_same or issubclass(plain_class, AdaptedLayer):
        return None
    adapted_class = type(
        plain_class.__name__,
        (AdaptedSubclass, plain_class),
        {
            "__module__": AdaptedSubclass.__module__,
            "is_in_place": True,
            "plain_class": plain_class,
        },
    )
    # One name stands for all such classes, and for the one that loads them.
    name = "AdaptedSubclass"
    register = keras.saving.register_keras_serializable("keras_fvae", name)
    register(adapted_class)
    registered_name = keras.saving.get_registered_name(adapted_class)
    keras.saving.get_custom_objects()[registered_name] = AdaptedSubclass
    return adapted_class


def plain_class_of(layer: keras.Layer) -> type:
    """The class of which an adapted layer is without its adapter."""
    if isinstance(layer, AdaptedSubclass):
        return layer.plain_class
    return next(base for base in ADAPTED_CLASSES if isinstance(layer, base))


def new_adapter(
    layer: keras.Layer, config: AdapterConfig, finalized: bool = False
) -> Adapter:
    """An adapter for a layer, neither built nor attached.

    Args:
        layer: Layer of a class that can be adapted.
        config: Config of the method.
        finalized: Boolean. Whether to hold only what inference needs.

    Returns:
        An `Adapter`.

    Raises:
        ValueError: If the method does not fit the layer.
    """
    misfit = config.why_not(layer)
    if misfit:
        raise ValueError(
            f"The layer '{layer.path or layer.name}' cannot be adapted by "
            f"{config.method_name}: {misfit}."
        )
    return config.adapter_class(
        config,
        regularizer=layer.kernel_regularizer,
        finalized=finalized,
        dtype=layer.compute_dtype,
        name="adapter",
    )


def read_kernel(layer: keras.Layer) -> np.ndarray:
    """The kernel of a built layer, dequantized: float32 array `(d, k)`.

    Raises:
        ValueError: If it has numbers that are not finite.
    """
    kernel = linear_map_of(layer).to_matrix(
        keras_internals.float_kernel(layer, full_precision=True)
    )
    kernel = replicas.to_numpy(ops.cast(kernel, "float32"))
    if not np.isfinite(kernel).all():
        raise ValueError(
            "its kernel has numbers that are not finite, and the method starts "
            "from it. Load the base model's weights before"
        )
    return kernel


def shard_like_kernel(
    layer: keras.Layer,
    variables: Sequence[keras.Variable],
    weight_axes: WeightAxes = types.MappingProxyType({}),
) -> None:
    """Lays variables of a layer out as its kernel is, on a mesh of devices.

    Args:
        layer: Layer that is adapted or is to be, built.
        variables: List of `keras.Variable`, of its adapter or a bias.
        weight_axes: Dict, as `Adapter.weight_axes`.
    """
    sharding.lay_out_like_kernel(
        keras_internals.kernel_of(layer),
        linear_map_of(layer),
        variables,
        weight_axes,
    )


class _WithoutActivation:
    """A layer seen without its activation, so that its call leaves it out."""

    activation = None

    def __init__(self, layer):
        self._layer = layer

    def __getattr__(self, name):
        value = getattr(self._layer, name)
        if getattr(value, "__self__", None) is self._layer:
            # What a method calls in its turn has no activation either.
            # (PyTorch's compiler does not trace that a method is made.)
            return functools.partial(value.__func__, self)
        return value
