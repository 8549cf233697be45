"""AdaLoRA: ranks that are given to the layers that need them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import noise
from keras_fvae.backend import replicas
from keras_fvae.backend.lean_gradients import clip
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.sharding import WeightAxes
from keras_fvae.methods.lora import LoRAConfig

INITIAL_STD = 0.02
# Beside the number of ranks, in the scale.
RANK_OFFSET = 1e-5
# A singular value that was pruned. At the start all are +0, so that a layer
# without any rank left differs from a new one, in every file.
# (Of Python's -0.0 TensorFlow makes 0.0, because it keeps numbers it has seen.)
PRUNED = np.array(-0.0, "float32")


class AdaLoRAAdapter(LowRankAdapter):
    """The update `scale * (x A * E) B`, with A and B nearly orthogonal.

    E holds a singular value for each rank, and is 0 at first.
    `keras_fvae.AdaLoRAAllocator` sets the least important to 0 in training.
    """

    config: AdaLoRAConfig

    adds_loss = True
    without_callback: str | None = (
        "AdaLoRA gives ranks to layers by a callback, without which each "
        "layer keeps them all: pass `keras_fvae.AdaLoRAAllocator()` to "
        "`fit`."
    )
    weight_axes: WeightAxes = {
        **LowRankAdapter.weight_axes,
        "singular_values": (None,),
    }
    # Among how many adapters the loss is shared.
    num_sharing: int = 1

    def build_projection(self) -> None:
        super().build_projection()
        self.singular_values: keras.Variable = self.add_adapter_weight(
            "singular_values",
            (self.config.rank,),
            lambda: np.zeros(self.config.rank),
        )

    def regularizer_of(self, name: str) -> Callable[[Tensor], Tensor] | None:
        weight = self.config.orthogonality_weight
        if weight == 0:
            return self.regularizer
        return Orthogonality(self, name == "kernel_a", self.regularizer)

    def initial_kernel_a(self) -> np.ndarray:
        generator = noise.initial_generator(self.initial_seed, "kernel_a")
        return generator.normal(0, INITIAL_STD, (self.width, self.config.rank))

    def initial_kernel_b(self) -> np.ndarray:
        generator = noise.initial_generator(self.initial_seed, "kernel_b")
        return generator.normal(0, INITIAL_STD, (self.config.rank, self.units))

    @property
    def is_zero(self) -> bool:
        values = replicas.to_numpy(self.singular_values)
        return not values.any() and not np.signbit(values).any()

    @property
    def num_ranks(self) -> int:
        if self.is_zero:
            return self.config.rank
        values = replicas.to_numpy(self.singular_values)
        return int(np.count_nonzero(values))

    def share_loss(self, num_adapters: int) -> None:
        self.num_sharing = num_adapters

    @property
    def scaled_kernel_a(self) -> Tensor:
        return self.kernel_a.value * self.singular_values.value

    @property
    def inference_config(self) -> LoRAConfig:
        """The LoRA that is left."""
        rank = len(self._ranks_left())
        return LoRAConfig(rank, rank * self.config.scale, seed=self.config.seed)

    def get_arrays(
        self,
        finalized: bool = False,
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        if not finalized:
            return super().get_arrays()
        left = self._ranks_left()
        return {
            "kernel_a": replicas.to_numpy(self.scaled_kernel_a)[:, left],
            "kernel_b": replicas.to_numpy(self.kernel_b)[left],
        }

    @property
    def num_inference_parameters(self) -> int:
        return max(1, self.num_ranks) * (self.width + self.units)

    def _ranks_left(self):
        """Array of the indices of the ranks that inference needs.

        There is always one, of zeros if need be, since no LoRA has none.
        """
        left = np.flatnonzero(replicas.to_numpy(self.singular_values))
        return left if left.size else np.arange(1)


class Orthogonality(keras.regularizers.Regularizer):
    """How far a factor is from orthonormal: the norm of its Gram matrix - I.

    As in the authors' code; their paper has the square of the norm.

    Args:
        adapter: `AdaLoRAAdapter`, which knows the weight of the loss.
        is_a: Boolean. Whether the factor is A, of shape `(d, rank)`, or B, of
            shape `(rank, k)`.
        other: Optional regularizer, whose loss is added.
    """

    def __init__(
        self,
        adapter: AdaLoRAAdapter,
        is_a: bool,
        other: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.adapter = adapter
        self.is_a = is_a
        self.other = other

    def __call__(self, factor: Tensor) -> Tensor:
        factor = ops.convert_to_tensor(factor)
        rows = ops.transpose(factor) if self.is_a else factor
        gram = ops.matmul(rows, ops.transpose(rows))
        square = ops.sum(ops.square(gram - ops.eye(gram.shape[0])))
        # The root has no gradient at 0.
        norm = ops.sqrt(clip(square, keras.config.epsilon() ** 4, math.inf))
        # Of each adapter both factors.
        num_factors = 2 * self.adapter.num_sharing
        weight = self.adapter.config.orthogonality_weight
        loss = weight / num_factors * norm
        return loss if self.other is None else loss + self.other(factor)


@dataclasses.dataclass(frozen=True)
class AdaLoRAConfig(AdapterConfig):
    """Settings of AdaLoRA: `y = x W + b + scale * ((x A) * E) B`.

    All layers begin with the same rank. In training
    `keras_fvae.AdaLoRAAllocator`, a callback, finds the ranks that matter
    least, over all layers together, and sets their singular values E to 0,
    until a share of them is left. A loss keeps A and B close to orthonormal,
    so that E says what a rank is worth.

    Learning rate: 5e-4 to 8e-4 in the authors' scripts (alpha 16). At LoRA's
    1e-4 it is the weakest of its kind in PEFT's benchmark. Cost: LoRA's, the
    loss, and two averages of the size of A and B; finalized or merged, that of
    the ranks that are left, or none.

    Args:
        rank: Positive integer, the rank of each layer's update at first.
            Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / (rank + 1e-5)`,
            however many ranks are left. `None` (default) means `rank`.
        target_rank: Positive integer, at most `rank`: the mean rank that is
            left at the end. `None` (default) means two thirds of `rank`.
        orthogonality_weight: Float, not negative: the weight of the mean over
            all A and B of `|A^T A - I|` and `|B B^T - I|` in the loss. 0.1 in
            the authors' scripts. Defaults to `0.5`, as in PEFT.
        seed: Integer in `[0, 2**31)`. Seed of A and B. `None` (default) draws
            one, which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(
    ...     model, keras_fvae.AdaLoRAConfig(rank=3, target_rank=2)
    ... )
    >>> model.compile("adamw", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     batch_size=1,
    ...     callbacks=[keras_fvae.AdaLoRAAllocator()],
    ...     verbose=0,
    ... )
    >>> history.history["mean_rank"]
    [2.0]

    Reference: [AdaLoRA](https://arxiv.org/abs/2303.10512).
    """

    target_rank: int | None = None
    orthogonality_weight: float = 0.5

    adapter_class = AdaLoRAAdapter
    method_name = "AdaLoRA"
    training_settings: ClassVar[tuple[str, ...]] = (
        "seed",
        "target_rank",
        "orthogonality_weight",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank is not None:
            self._check_integer("target_rank", minimum=1)
            if self.target_rank > self.rank:
                self._refuse("target_rank", f"at most the rank, {self.rank}")
        self._check_number(
            "orthogonality_weight", "a number >= 0", lambda v: v >= 0
        )

    @property
    def scale(self) -> float:
        """Float, the factor of the update."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank + RANK_OFFSET)

    @property
    def final_rank(self) -> int:
        """Integer, the rank that is left at the end, in the mean."""
        if self.target_rank is not None:
            return self.target_rank
        return max(1, round(self.rank * 2 / 3))
