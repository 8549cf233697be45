"""LoRA for OPLoRA, with the gradient of the whole kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.token_mean import token_mean
from keras_fvae.backend.types import Tensor
from keras_fvae.layers import masking
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.sharding import WeightAxes
from keras_fvae.methods.lora import LoRAConfig


@ops.custom_gradient
def zero_product(x: Tensor, kernel: Tensor) -> Any:
    """0 for each token, with the gradient that `x kernel` has for the kernel.

    Args:
        x: Tensor of shape `(..., d)`, which has no gradient.
        kernel: Tensor of shape `(d, k)`, whatever it is.

    Returns:
        Tensor of shape `(..., k)` and of the dtype of `x`.
    """

    def gradients(*arguments, upstream=None):
        # PyTorch passes it by its name.
        upstream = arguments[-1] if upstream is None else upstream
        product = ops.matmul(ops.transpose(_rows(x)), _rows(upstream))
        return None, ops.cast(product, kernel.dtype)

    shape = (*ops.shape(x)[:-1], kernel.shape[-1])
    return ops.zeros(shape, x.dtype), gradients


@ops.custom_gradient
def note_squares(
    outputs: Tensor, squares: Tensor, token_weights: Tensor | None
) -> Any:
    """The outputs as they are; their squared gradients go to `squares`.

    The loss is taken for a mean over the tokens, with these weights. So if u is
    the gradient of a token's outputs and w its weight, `u / w` is that of the
    token's own loss, and the mean of its square is the sum of `u^2 / w`.

    Args:
        outputs: Tensor of shape `(..., k)`.
        squares: Tensor of shape `(k,)`, whatever it is. That mean is its
            gradient.
        token_weights: Tensor of shape `(tokens,)`, 0 for those that do not
            count.

    Returns:
        Tensor, `outputs`.
    """

    def gradients(*arguments, upstream=None):
        upstream = arguments[-1] if upstream is None else upstream
        u = ops.cast(_rows(upstream), "float32")
        squared = ops.divide_no_nan(ops.square(u), token_weights[:, None])
        return upstream, ops.sum(squared, axis=0), None

    return outputs, gradients


@ops.custom_gradient
def divide_by_loss_scale(squares: Tensor) -> Any:
    """A vector whose gradient is divided by that of a loss.

    Squares of gradients go with the square of what the loss is multiplied by,
    as loss scaling and replicas do it. Divided once, they go with it as
    gradients do, and are put right with these.

    Args:
        squares: Tensor of shape `(k,)`, whatever it is.

    Returns:
        Tensor of shape `(k + 1,)`, zeros: what is to take the place of
        `squares`, and a loss.
    """

    def gradients(*arguments, upstream=None):
        upstream = arguments[-1] if upstream is None else upstream
        return upstream[:-1] / upstream[-1]

    return ops.zeros((squares.shape[0] + 1,), squares.dtype), gradients


def _rows(x):
    return ops.reshape(x, (-1, x.shape[-1]))


class OPLoRAAdapter(LowRankAdapter):
    """LoRA's update, and in training x times a kernel that counts as 0.

    The gradient of that kernel is the one that the frozen kernel would have.
    """

    config: OPLoRAConfig

    weight_axes: WeightAxes = {
        **LowRankAdapter.weight_axes,
        "zero_kernel": ("input", "output"),
        "input_squares": ("input",),
        "output_squares": ("output",),
    }

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        if self.finalized:
            return
        self.zero_kernel: keras.Variable = self._add_zeros(
            "zero_kernel", (self.width, self.units)
        )
        if self.config.mean_squares:
            self.input_squares: keras.Variable = self._add_zeros(
                "input_squares", (self.width,)
            )
            self.output_squares: keras.Variable = self._add_zeros(
                "output_squares", (self.units,)
            )

    def _add_zeros(self, name, shape):
        return self.add_adapter_weight(
            name, shape, functools.partial(np.zeros, shape)
        )

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        outputs = super().adapt(frozen, training)
        if not training:
            return outputs
        x = ops.stop_gradient(frozen.tokens)
        zeros = zero_product(x, self.zero_kernel.value)
        if self.config.mean_squares:
            zeros = self._note_mean_squares(x, zeros, frozen.find_mask())
        return frozen.add_for_tokens(outputs, zeros)

    def _note_mean_squares(self, x, outputs, mask):
        """The outputs, and a loss of 0, with gradients of the mean squares."""
        token_shape = ops.shape(x)[:-1]
        if mask is None:
            mask = ops.ones(token_shape)
        mask = masking.flatten_mask(mask, token_shape)
        weights = replicas.token_weights(mask, ops.shape(mask)[0])
        squares = ops.square(ops.cast(_rows(x), "float32"))
        means = token_mean(squares, weights, feature_axes=1)
        of_inputs = self.input_squares.value
        loss = ops.sum(means * (of_inputs - ops.stop_gradient(of_inputs)))
        of_outputs = divide_by_loss_scale(self.output_squares.value)
        self.add_to_mean_loss(loss + of_outputs[-1])
        return note_squares(outputs, of_outputs[:-1], weights)

    def changes_state(self, training: bool) -> bool:
        return training and self.config.mean_squares

    @property
    def saved_weights(self) -> list[keras.Variable]:
        return [self.kernel_a, self.kernel_b]

    @property
    def inference_config(self) -> LoRAConfig:
        """The LoRA that it is."""
        return LoRAConfig(self.config.rank, seed=self.config.seed)

    def save_own_variables(self, store: Any) -> None:
        for index, weight in enumerate(self.saved_weights):
            store[f"{index}"] = weight

    def load_own_variables(self, store: Any) -> None:
        for index, weight in enumerate(self.saved_weights):
            weight.assign(store[f"{index}"])


@dataclasses.dataclass(frozen=True)
class OPLoRAConfig(AdapterConfig):
    """Settings of LoRA for the optimizer OPLoRA: `y = x W + b + x A B`.

    `keras_fvae.optimizers.OPLoRA` needs the gradient of the whole kernel. So
    there is a weight more beside each kernel, `zero_kernel`, as large as that
    and always 0, of which that is the gradient. It changes no output, is in
    no file, and gone when the adapter is finalized, merged or removed. All
    else is LoRA without dropout and with a scale of 1, which OPLoRA is
    defined for. Other optimizers train it as LoRA, and pay for the gradient in
    vain; where they clip all gradients by their norm, it counts among them, so
    that they clip more than with LoRA.

    With `scaled=True` that optimizer needs the mean squares, over the tokens,
    of a layer's input and of its outputs' gradients. With `mean_squares=True`
    they are the gradients of two vectors of the same kind, `input_squares` and
    `output_squares`. The first comes from a loss of 0 that is added to the
    model's. A token's outputs have here the gradient of the token's own loss,
    as if the model's were the mean of those over the tokens. Tokens of padding
    do not count. The calls of a layer that is called several times count alike.

    Learning rate: as `keras_fvae.optimizers.OPLoRA` says. Cost: in training,
    two float32 arrays as large as the kernel for each adapted layer, the zeros
    and their gradient (one more with gradient accumulation or moving
    averages), and a product as large as the layer's own; else, and merged,
    LoRA's. `model.summary()` counts `zero_kernel` among what trains.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        mean_squares: Boolean. Whether to compute what
            `keras_fvae.optimizers.OPLoRA(scaled=True)` needs. Defaults to
            `False`.
        seed: Integer in `[0, 2**31)`. Seed of A. `None` (default) draws one,
            which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.OPLoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)
    >>> [weight.name for weight in layer.trainable_weights]
    ['kernel_a', 'kernel_b', 'zero_kernel']

    Reference: [OPLoRA](https://arxiv.org/abs/2509.19977).
    """

    alpha: None = dataclasses.field(default=None, init=False)
    mean_squares: bool = False

    adapter_class = OPLoRAAdapter
    method_name = "OPLoRA"
    training_settings: ClassVar[tuple[str, ...]] = ("mean_squares", "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("mean_squares", (True, False))
