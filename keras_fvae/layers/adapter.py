"""What a method is: the weights beside one frozen layer, and their update."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NoReturn

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import noise
from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers import switching
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.sharding import WeightAxes


def refuse_quantization() -> NoReturn:
    """Raises a `ValueError` that says in which order to go."""
    raise ValueError(
        "A model must be quantized before it is adapted. To quantize the base "
        "of a trained model: save the adapters by `save_adapter`, quantize a "
        "base model without them, and load them by `load_adapter`."
    )


def refuse_finalized() -> NoReturn:
    """Raises a `ValueError` that says what to do."""
    raise ValueError(
        "This model is finalized: its adapters kept only what inference needs, "
        "and can neither be trained nor sampled. To go on, load the adapters "
        "as they were before, from a file that `save_adapter` or `model.save` "
        "wrote."
    )


class Adapter(keras.Layer):
    """The base class of each method: the weights, the update, no models.

    A frozen layer is seen as a matrix W of shape `(d, k)`: all contracted axes
    of its kernel are one axis of width d, all carried axes one of k units.
    Layers hold an adapter and call its `adapt`. It is not called itself: for
    what it does, that would take as long on PyTorch.

    A method overrides `build`, `adapt` and `merge`, says in `weight_axes` how
    its weights lie beside the kernel's, and gets all else: saving, restoring,
    merging, sharding, quantized bases.

    Args:
        config: Config of the method.
        regularizer: Optional regularizer of the weights that the method says.
        finalized: Boolean. Whether to hold only what inference needs.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.
    """

    # What `FVAELoRAMonitor` has seen of its weights last, in a word.
    health: str | None = None
    # What is missing, in words, where a `fit` has not the callback that the
    # method needs; and that callback, while such a `fit` runs: its `leave()`
    # is called where an error ends that.
    without_callback: str | None = None
    callback: Any = None
    # Whether it adds a loss in training, of which each adapter has a share.
    adds_loss = False

    # By the name of a weight, for each of its axes, which axes of the kernel
    # it has: "input" (contracted), "output" (carried) or `None`. On a mesh of
    # devices it is sharded as those are.
    weight_axes: WeightAxes = {}

    def __init__(
        self,
        config: AdapterConfig,
        regularizer: Callable[[Tensor], Tensor] | None = None,
        finalized: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.regularizer = regularizer
        self.finalized = finalized
        self.initial_seed: int = noise.choose_seed(config.seed)

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        """Makes the weights.

        Args:
            linear_map: `LinearMap`, what the layer is.
            kernel_shape: Tuple of integers, the shape of the layer's kernel.
            read_kernel: Optional function that returns the frozen kernel as a
                float32 NumPy array of shape `(d, k)`, for methods that start
                from it; to be called inside an initializer. `None` if the
                initial values do not matter, since others will be set.
        """
        self.kernel_shape: tuple[int, ...] = tuple(kernel_shape)
        self.width: int = linear_map.width(kernel_shape)
        self.units: int = linear_map.units(kernel_shape)
        self.read_kernel = read_kernel

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        """What the layer computes before its activation.

        Args:
            frozen: `FrozenCall`, the call of the frozen layer.
            training: Boolean.

        Returns:
            Tensor of the shape and dtype of `frozen.outputs()`.
        """
        raise NotImplementedError

    def merge(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The weights of a plain layer that computes the same.

        Args:
            kernel: Float64 NumPy array of shape `(d, k)`.
            bias: Float64 NumPy array of shape `(k,)`, 0 if there is none.

        Returns:
            Pair of such arrays.

        Raises:
            ValueError: If there are none; the message says why.
        """
        raise NotImplementedError

    def changes_state(self, training: bool) -> bool:
        """Whether a call draws random numbers or adds a loss.

        Neither gets out of a function that the backend transforms.
        """
        return False

    def share_loss(self, num_adapters: int) -> None:
        """Says among how many adapters of a model the loss is shared.

        Args:
            num_adapters: Positive integer, how many add one.
        """

    def add_to_mean_loss(self, loss: Tensor) -> None:
        """Adds a loss such that those of all calls in a step sum to the mean.

        A layer that is called twice, such as ALBERT's, weighs as much as one
        that is called once.
        """
        previous = keras_internals.added_losses(self)
        if previous:
            loss = (loss - sum(previous)) / (len(previous) + 1)
        self.add_loss(loss)

    def is_drawn(self, training: bool) -> bool:
        """Whether what is random in the update is drawn: also to sample it."""
        return training or switching.is_sampling(self)

    @property
    def is_zero(self) -> bool:
        """Boolean, whether the update is known to be 0, as at the start."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Boolean, whether there is something to draw random numbers for."""
        return bool(self.trainable_weights)

    @property
    def num_ranks(self) -> int:
        """Integer, how many ranks the update has."""
        return self.config.rank

    @property
    def inference_config(self) -> AdapterConfig:
        """The config of the adapter that is left for inference."""
        return self.config

    def check_can_finalize(self) -> None:
        """Raises a `ValueError` if inference needs all that training does."""

    def check_can_scale(self) -> None:
        """Raises a `ValueError` if its update cannot weigh more or less."""

    @property
    def saved_weights(self) -> list[keras.Variable]:
        """List of the weights that `get_arrays` returns."""
        return self.weights

    def get_arrays(
        self,
        finalized: bool = False,
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The weights as NumPy arrays.

        Args:
            finalized: Boolean. Whether to return only what inference needs:
                the arrays of a finalized adapter.
            read_kernel: Function, as in `build`, if `finalized`.

        Returns:
            Dict of name to NumPy array.
        """
        return {w.name: replicas.to_numpy(w) for w in self.saved_weights}

    def set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the weights from what `get_arrays` returned."""
        for weight in self.saved_weights:
            weight.assign(arrays[weight.name])

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Dict of name to shape, of the arrays that `get_arrays` returns."""
        return {
            weight.name: tuple(weight.shape) for weight in self.saved_weights
        }

    @property
    def num_inference_parameters(self) -> int:
        """Integer, the parameters that inference needs."""
        return sum(math.prod(shape) for shape in self.array_shapes.values())

    def add_adapter_weight(
        self,
        name: str,
        shape: tuple[int, ...],
        initializer: Callable[[], np.ndarray],
        **kwargs: Any,
    ) -> keras.Variable:
        """A weight that is float32 whatever the dtype policy.

        Args:
            name: String, which `weight_axes` has.
            shape: Tuple of integers.
            initializer: Function without arguments that returns its first
                values as a NumPy array.
            **kwargs: Arguments of `keras.Layer.add_weight`.

        Returns:
            `keras.Variable`.
        """

        def initial_tensor(shape, dtype=None):
            # Of its own dtype, an array takes no operation.
            return ops.convert_to_tensor(initializer().astype(dtype), dtype)

        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initial_tensor,
            dtype="float32",
            autocast=False,
            **kwargs,
        )

    def add_seed_generator(self) -> None:
        """The generator of what the adapter draws, in its attribute."""
        self.seed_generator: keras.random.SeedGenerator = (
            keras.random.SeedGenerator(self.initial_seed)
        )

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        noise.save_seed(self, store)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(noise.load_seed(self, store))
        self.health = None

    def compute_mask(
        self, inputs: Tensor, previous_mask: Tensor | None
    ) -> None:
        return None

    def quantize(self, *args: Any, **kwargs: Any) -> NoReturn:
        # Keras would pass an adapted layer over, without a word.
        refuse_quantization()

    def refuse_if_finalized(self) -> None:
        """Raises a `ValueError` if only what inference needs is left."""
        if self.finalized:
            refuse_finalized()


class LowRankAdapter(Adapter):
    """A method of the form `y += scale * project(x) B`.

    A method overrides `build_projection` and `project`: what stands in the
    place of LoRA's A. Here that is A itself, drawn uniformly from
    `[-1 / sqrt(d), 1 / sqrt(d)]`; B is 0 at first. One whose ranks weigh
    unlike overrides `scaled_kernel_a` alone.
    """

    weight_axes: WeightAxes = {
        "kernel_a": ("input", None),
        "kernel_b": (None, "output"),
    }
    # Whether A trains, or stays as it was drawn.
    trains_a = True

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        self.build_projection()
        self.kernel_b: keras.Variable = self.add_adapter_weight(
            "kernel_b",
            (self.config.rank, self.units),
            self.initial_kernel_b,
            regularizer=self.regularizer_of("kernel_b"),
        )

    def build_projection(self) -> None:
        """Makes the weights of what stands in the place of A."""
        self.kernel_a: keras.Variable = self.add_adapter_weight(
            "kernel_a",
            (self.width, self.config.rank),
            self.initial_kernel_a,
            regularizer=self.regularizer_of("kernel_a"),
            # Made so, because Keras flips the flags of all that once trained.
            trainable=self.trains_a,
        )

    def regularizer_of(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The regularizer of "kernel_a" or "kernel_b", or `None`."""
        return self.regularizer

    @property
    def is_zero(self) -> bool:
        return not replicas.to_numpy(self.kernel_b).any()

    def initial_kernel_a(self) -> np.ndarray:
        """NumPy array of shape `(d, rank)`, the first values of A."""
        limit = 1 / math.sqrt(self.width)
        generator = noise.initial_generator(self.initial_seed, "kernel_a")
        return generator.uniform(-limit, limit, (self.width, self.config.rank))

    def initial_kernel_b(self) -> np.ndarray:
        """NumPy array of shape `(rank, k)`, the first values of B."""
        return np.zeros((self.config.rank, self.units))

    @property
    def scaled_kernel_a(self) -> Tensor:
        """Variable or tensor of shape `(d, rank)`, A as x is times it."""
        return self.kernel_a

    def project(self, frozen: FrozenCall, training: bool) -> Tensor:
        """What B is applied to: `x A`, of shape `(..., rank)`."""
        return frozen.project(self.scaled_kernel_a)

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        projected = self.project(frozen, training)
        kernel_b = self.config.scale * self.kernel_b.value
        return frozen.add_product(frozen.outputs(), projected, kernel_b)

    def merge(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        kernel_a = replicas.to_numpy(self.scaled_kernel_a).astype("float64")
        kernel_b = replicas.to_numpy(self.kernel_b)
        return kernel + self.config.scale * kernel_a @ kernel_b, bias
