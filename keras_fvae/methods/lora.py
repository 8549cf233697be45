"""LoRA, and the two methods that differ from it in one thing each."""

from __future__ import annotations

import dataclasses
from typing import Any
from typing import ClassVar

from keras_fvae.backend.noise import dropout
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall


class LoRAAdapter(LowRankAdapter):
    """The update `scale * x A B`, with dropout on x in training."""

    config: LoRAConfig

    def __init__(self, config: LoRAConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if config.dropout > 0:
            self.add_seed_generator()

    @property
    def trains_a(self) -> bool:  # type: ignore[override]
        return self.config.trains_a

    def project(self, frozen: FrozenCall, training: bool) -> Tensor:
        if not self.changes_state(training):
            return frozen.project(self.kernel_a)
        x = dropout(frozen.inputs, self.config.dropout, self.seed_generator)
        return frozen.project(self.kernel_a, x)

    def changes_state(self, training: bool) -> bool:
        return self.config.dropout > 0 and self.is_drawn(training)


@dataclasses.dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Settings of LoRA: `y = x W + b + scale * x A B`.

    The first method to try, and the one that all others are measured by. A is
    drawn uniformly from `[-1 / sqrt(d), 1 / sqrt(d)]`, as in the first LoRA
    and PEFT, and B is 0. Keras's own `enable_lora` draws A 2.45 times as wide,
    and gives each head of attention an A of its own.

    Learning rate: 1e-4 in PEFT's benchmark (AdamW, rank 32, Llama 3.2 3B), up
    to 5e-3 on small encoders. Cost: two thin products a layer in each step;
    merged, none.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        rank_stabilized: Boolean. Whether to scale by `alpha / sqrt(rank)`
            instead, as `keras_fvae.RSLoRAConfig` does. Defaults to `False`.
        dropout: Float in `[0, 1)`. Dropout rate of x before A, in training.
            Defaults to `0.0`.
        seed: Integer in `[0, 2**31)`. Seed of A and of dropout. `None`
            (default) draws one, which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> keras_fvae.LoRAConfig(rank=8, alpha=16).scale
    2.0

    Reference: [LoRA](https://arxiv.org/abs/2106.09685).
    """

    rank_stabilized: bool = False
    dropout: float = 0.0

    adapter_class = LoRAAdapter
    method_name = "LoRA"
    training_settings: ClassVar[tuple[str, ...]] = ("dropout", "seed")
    # Whether A trains, or stays as it was drawn.
    trains_a = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("rank_stabilized", (True, False))
        self._check_rate("dropout")

    @property
    def scale(self) -> float:
        """Float, the factor of the update."""
        alpha = self.rank if self.alpha is None else self.alpha
        power = 0.5 if self.rank_stabilized else 1
        return alpha / self.rank**power


@dataclasses.dataclass(frozen=True)
class RSLoRAConfig(LoRAConfig):
    """Settings of rsLoRA: LoRA with a scale of `alpha / sqrt(rank)`.

    With LoRA's `alpha / rank` a larger rank learns more slowly; with this
    scale it does not, so that high ranks pay. Where alpha is `rank`, as it is
    by default, the scale is `sqrt(rank)`: the learning rate is then not LoRA's.

    Learning rate: 1e-4 in PEFT's benchmark (rank 64, alpha as for LoRA, where
    rsLoRA is well ahead of LoRA). Cost: LoRA's.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / sqrt(rank)`.
            `None` (default) means `rank`.
        dropout: Float in `[0, 1)`. Dropout rate of x before A, in training.
            Defaults to `0.0`.
        seed: Integer in `[0, 2**31)`. Seed of A and of dropout. `None`
            (default) draws one, which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> keras_fvae.RSLoRAConfig(rank=16, alpha=8).scale
    2.0

    Reference: [A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA](
    https://arxiv.org/abs/2312.03732).
    """

    rank_stabilized: bool = dataclasses.field(default=True, init=False)

    method_name = "rsLoRA"


@dataclasses.dataclass(frozen=True)
class FFALoRAConfig(LoRAConfig):
    """Settings of FFA-LoRA: LoRA whose A stays as it was drawn.

    Half of LoRA's parameters train, and the update is linear in them. It was
    made for federated learning, where the mean of several B is then that of
    their updates: give all clients the same `seed`, for the same A.

    Learning rate: the published settings are not known; being linear in what
    trains, it bears higher ones than LoRA. Cost: LoRA's, and less memory for
    the optimizer.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        rank_stabilized: Boolean. Whether to scale by `alpha / sqrt(rank)`
            instead. Defaults to `False`.
        dropout: Float in `[0, 1)`. Dropout rate of x before A, in training.
            Defaults to `0.0`.
        seed: Integer in `[0, 2**31)`. Seed of A and of dropout. `None`
            (default) draws one, which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.FFALoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)
    >>> [weight.name for weight in layer.trainable_weights]
    ['kernel_b']

    Reference: [Improving LoRA in Privacy-preserving Federated Learning](
    https://arxiv.org/abs/2403.12313).
    """

    method_name = "FFA-LoRA"
    trains_a = False
