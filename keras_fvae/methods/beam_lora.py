"""BeamLoRA: ranks with scores, and the best in the place of the worst."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.sharding import WeightAxes
from keras_fvae.methods.lora import LoRAConfig


class BeamLoRAAdapter(LowRankAdapter):
    """The update `scale * (x A * scores) B`, the scores of a softmax."""

    config: BeamLoRAConfig

    without_callback: str | None = (
        "BeamLoRA puts the best ranks in the place of the worst by a "
        "callback, without which it only weighs them: pass "
        "`keras_fvae.BeamLoRAPruner()` to `fit`."
    )
    weight_axes: WeightAxes = {**LowRankAdapter.weight_axes, "gate": (None,)}

    def build_projection(self) -> None:
        super().build_projection()
        self.gate: keras.Variable = self.add_adapter_weight(
            "gate", (self.config.rank,), lambda: np.zeros(self.config.rank)
        )

    @property
    def scores(self) -> Tensor:
        """Tensor of shape `(rank,)`, what each rank weighs; 1 in the mean."""
        gate = self.gate.value / self.config.temperature
        return self.config.rank * ops.softmax(gate)

    @property
    def scaled_kernel_a(self) -> Tensor:
        return self.kernel_a.value * self.scores

    @property
    def inference_config(self) -> LoRAConfig:
        """The LoRA that it is when its scores stay."""
        return LoRAConfig(
            self.config.rank, self.config.alpha, seed=self.config.seed
        )

    def get_arrays(
        self,
        finalized: bool = False,
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        arrays = super().get_arrays()
        if finalized:
            del arrays["gate"]
            arrays["kernel_a"] = replicas.to_numpy(self.scaled_kernel_a)
        return arrays

    @property
    def num_inference_parameters(self) -> int:
        return self.config.rank * (self.width + self.units)


@dataclasses.dataclass(frozen=True)
class BeamLoRAConfig(AdapterConfig):
    """Settings of BeamLoRA: `y = x W + b + scale * ((x A) * scores) B`.

    The scores, a softmax over the ranks, say what each rank is worth. In
    training `keras_fvae.BeamLoRAPruner`, a callback, prunes the ranks of the
    lowest scores, over all layers together, and starts them anew from those of
    the highest.

    Learning rate: 3e-4 with a cosine in the authors' scripts (rank 64, alpha
    128). Cost: LoRA's, and a copy of A and B in training; finalized it is
    LoRA, merged, none.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        temperature: Positive float, by which the gate is divided before the
            softmax. The authors have 0.03 for learning rates below 1e-4.
            Defaults to `0.05`.
        seed: Integer in `[0, 2**31)`. Seed of A, and of which rank starts anew
            from which. `None` (default) draws one, which
            `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.BeamLoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)
    >>> [weight.name for weight in layer.trainable_weights]
    ['kernel_a', 'gate', 'kernel_b']

    Reference: [BeamLoRA](https://arxiv.org/abs/2502.13604).
    """

    temperature: float = 0.05

    adapter_class = BeamLoRAAdapter
    method_name = "BeamLoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("temperature", "a positive number", lambda v: v > 0)
