"""Flat-LoRA: LoRA that trains under noise on the merged kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend.noise import next_seed
from keras_fvae.backend.noise import noise_and_masks
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import is_finite
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.linear_map import LinearMap


class NoiseFactor:
    """The factor of the noise, which grows while a model trains.

    It is state that a compiled step reads, and no weight of the model: neither
    trained nor saved. At first it is 1.
    """

    def __init__(self) -> None:
        self.variable: keras.Variable = keras.Variable(
            "ones",
            shape=(),
            dtype="float32",
            trainable=False,
            autocast=False,
            name="noise_factor",
        )

    def set(self, value: float) -> None:
        """Sets it to a float."""
        self.variable.assign(value)


class FlatLoRAAdapter(LowRankAdapter):
    """LoRA's update, and in training `x N`, with noise N on the kernel.

    N is as if it were added to the frozen kernel, which stays what it is.
    """

    config: FlatLoRAConfig

    without_callback: str | None = (
        "Flat-LoRA's noise grows by a callback, without which it is what it "
        "was last, and all of it at first: pass `keras_fvae.FlatLoRASchedule()`"
        " to `fit`. In a loop of your own, call `layer.adapter.set_progress("
        "share)` of each adapted layer before a step."
    )

    def __init__(self, config: FlatLoRAConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.add_seed_generator()
        self.noise_factor: Any = None

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        if not self.finalized:
            self.noise_factor = NoiseFactor()

    def set_progress(self, share: float) -> None:
        """Says how far training is: the noise grows with it.

        Args:
            share: Float in `[0, 1]`, the share of its steps that is done.

        Raises:
            ValueError: If it is no such share, or the adapter is finalized.
        """
        self.refuse_if_finalized()
        if not is_finite(share) or not 0 <= share <= 1:
            raise ValueError(
                f"`share` must be a number in [0, 1]. Received: share={share!r}"
            )
        self.noise_factor.set((1 - math.cos(math.pi * share)) / 2)

    def noise(self, frozen: FrozenCall) -> Tensor:
        """The noise N on the merged kernel, without a gradient.

        The standard deviation is the same for all weights of a unit: `rho`
        times the norm of its column of the merged kernel, over `sqrt(d)`.

        Args:
            frozen: `FrozenCall`, the call of the frozen layer.

        Returns:
            Float32 tensor of shape `(d, k)`.
        """
        kernel = ops.cast(frozen.kernel(full_precision=True), "float32")
        update = ops.matmul(self.kernel_a.value, self.kernel_b.value)
        norms = ops.norm(kernel + self.config.scale * update, axis=0)
        rho = self.noise_factor.variable.value * self.config.rho
        normal, _ = noise_and_masks(
            (self.width,), next_seed(self.seed_generator), self.units
        )
        return ops.stop_gradient(rho / math.sqrt(self.width) * norms * normal)

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        outputs = super().adapt(frozen, training)
        if not self.changes_state(training):
            return outputs
        return outputs + frozen.multiply(self.noise(frozen))

    def changes_state(self, training: bool) -> bool:
        return training and self.config.rho > 0

    @property
    def variables(self) -> list[keras.Variable]:
        """List of all state: the weights, the seed, the noise's factor."""
        # On PyTorch that would count as a parameter, and need not be known.
        is_parameter = keras_internals.lists_variables_as_parameters()
        if self.noise_factor is None or is_parameter:
            return super().variables
        return [*super().variables, self.noise_factor.variable]


@dataclasses.dataclass(frozen=True)
class FlatLoRAConfig(AdapterConfig):
    """Settings of Flat-LoRA: LoRA that looks for flat minima of the loss.

    Each training step sees the loss of `W + scale * A B + N`. The noise N is
    drawn anew in each call of a layer, the same for all tokens, with a
    standard deviation of `f * rho / sqrt(d)` times the norm of each unit's
    merged weights. `f` grows from 0 to 1 as training goes on, which
    `keras_fvae.FlatLoRASchedule` sees to: pass it to `fit`, or else `f` is 1
    throughout. At inference there is no noise, and all is as with LoRA.

    Learning rate: 5e-4 in the authors' settings (rank 8, alpha 16, `rho` 0.05,
    for Llama). Cost: in a training step a matrix of noise as large as the
    kernel, which is kept for the gradient, and its product with x; else, and
    merged, LoRA's.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        rho: Non-negative float, how large the noise is beside the merged
            kernel. 0 is LoRA. Defaults to `0.05`.
        seed: Integer in `[0, 2**31)`. Seed of A and of the noise. `None`
            (default) draws one, which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(
    ...     model, keras_fvae.FlatLoRAConfig(rank=2)
    ... )
    >>> model.compile("adamw", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     callbacks=[keras_fvae.FlatLoRASchedule()],
    ...     verbose=0,
    ... )

    Reference: [Flat-LoRA](https://arxiv.org/abs/2409.14396).
    """

    rho: float = 0.05

    adapter_class = FlatLoRAAdapter
    method_name = "Flat-LoRA"
    training_settings: ClassVar[tuple[str, ...]] = ("rho", "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("rho", "a number >= 0", lambda v: v >= 0)
