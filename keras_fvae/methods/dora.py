"""DoRA: the kernel's direction by LoRA, and a magnitude for each unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from keras import ops

from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.sharding import WeightAxes


class DoRAAdapter(LowRankAdapter):
    """`y = x (V * m / c) + b`, where `V = W + scale * A B` has the norms c.

    A norm is of all that one unit is connected to: over all contracted axes,
    for each index of all carried axes. Once finalized, the ratio m / c is
    held, and neither m nor what c is computed from.
    """

    config: DoRAConfig

    weight_axes: WeightAxes = {
        **LowRankAdapter.weight_axes,
        "magnitude": ("output",),
        "ratio": ("output",),
    }

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        name = "ratio" if self.finalized else "magnitude"
        weight = self.add_adapter_weight(
            name, (self.units,), self.initial_magnitude
        )
        setattr(self, name, weight)

    def initial_magnitude(self) -> np.ndarray:
        """NumPy array of shape `(k,)`: the norms of the frozen kernel."""
        if self.read_kernel is None:
            return np.ones(self.units)
        norms = np.linalg.norm(self.read_kernel(), axis=0)
        if not norms.all():
            raise ValueError(
                f"the weights of unit {int(np.argmin(norms))} of "
                f"{self.units} are all 0, so they have no direction. Leave the "
                "layer out of `target_layer_names`, or take "
                "`keras_fvae.LoRAConfig`"
            )
        return norms

    def norms(self, frozen: FrozenCall) -> Tensor:
        """The norms c of V, from products no larger than `(k, rank)`.

        `|W_j + s (A B)_j|^2 = |W_j|^2 + 2 s (W^T A)_j B_j + s^2 |(A B)_j|^2`,
        for each unit j.

        Args:
            frozen: `FrozenCall`, the call of the frozen layer.

        Returns:
            Float32 tensor of shape `(k,)`.
        """
        kernel = ops.cast(frozen.kernel(full_precision=True), "float32")
        kernel_a, kernel_b = self.kernel_a.value, self.kernel_b.value
        if not self.config.gradient_through_norm:
            kernel_a = ops.stop_gradient(kernel_a)
            kernel_b = ops.stop_gradient(kernel_b)
        kernel_b = self.config.scale * kernel_b
        of_kernel = ops.square(ops.norm(kernel, axis=0))
        of_both = ops.matmul(ops.transpose(kernel_a), kernel)
        of_update = ops.matmul(
            ops.matmul(ops.transpose(kernel_a), kernel_a), kernel_b
        )
        squares = of_kernel + ops.sum(
            (2 * of_both + of_update) * kernel_b, axis=0
        )
        return ops.sqrt(squares)

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        if self.finalized:
            ratio = self.ratio.value
        else:
            ratio = self.magnitude.value / self.norms(frozen)
        outputs = super().adapt(frozen, training)
        ratio = ops.cast(frozen.for_units(ratio), outputs.dtype)
        bias = frozen.bias()
        if bias is None:
            return outputs * ratio
        # The bias is not of the direction.
        return outputs * ratio + bias * (1 - ratio)

    def check_can_scale(self) -> None:
        if self.finalized:
            raise ValueError(
                "it is finalized, and its norms were taken at the scale that "
                "it had. Scale it before"
            )

    def merge(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        direction, bias = super().merge(kernel, bias)
        return direction * self._final_ratio(direction), bias

    def get_arrays(
        self,
        finalized: bool = False,
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        arrays = super().get_arrays()
        if finalized and not self.finalized:
            del arrays["magnitude"]
            kernel = read_kernel().astype("float64")  # type: ignore[misc]
            direction, _ = super().merge(kernel, np.zeros(self.units))
            arrays["ratio"] = self._final_ratio(direction).astype("float32")
        return arrays

    def _final_ratio(self, direction):
        """NumPy array of shape `(k,)`: m / c, for V as a NumPy array."""
        arrays = super().get_arrays()
        if self.finalized:
            return arrays["ratio"]
        return arrays["magnitude"] / np.linalg.norm(direction, axis=0)


@dataclasses.dataclass(frozen=True)
class DoRAConfig(AdapterConfig):
    """Settings of DoRA: LoRA for the direction, and a magnitude for each unit.

    Learns closer to how full fine-tuning does than LoRA, and does so at low
    ranks above all: half of LoRA's rank often does.

    Learning rate: slightly below LoRA's (the authors: 1e-4 to 2e-4 at ranks 16
    and 32, alpha twice the rank, AdamW). Cost: the norms of the units in each
    step, from products of the kernel with A, and a pass over the outputs;
    finalized, LoRA's and that pass; merged, none.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        gradient_through_norm: Boolean. Whether A and B get a gradient through
            the norms as well. `False` (default) takes less memory, for hardly
            any difference (section 4.3).
        seed: Integer in `[0, 2**31)`. Seed of A. `None` (default) draws one,
            which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.DoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)
    >>> [weight.name for weight in layer.trainable_weights]
    ['kernel_a', 'kernel_b', 'magnitude']

    Reference: [DoRA](https://arxiv.org/abs/2402.09353), section 4.
    """

    gradient_through_norm: bool = False

    adapter_class = DoRAAdapter
    method_name = "DoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("gradient_through_norm", (True, False))
