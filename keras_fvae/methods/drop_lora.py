"""DropLoRA: dropout between A and B."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_fvae.backend.noise import dropout
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall


class DropLoRAAdapter(LowRankAdapter):
    """The update `scale * dropout(x A) B`, for each token and rank."""

    config: DropLoRAConfig

    def __init__(self, config: DropLoRAConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.add_seed_generator()

    def project(self, frozen: FrozenCall, training: bool) -> Tensor:
        projected = super().project(frozen, training)
        if not self.changes_state(training):
            return projected
        return dropout(projected, self.config.dropout, self.seed_generator)

    def changes_state(self, training: bool) -> bool:
        return self.config.dropout > 0 and self.is_drawn(training)


@dataclasses.dataclass(frozen=True)
class DropLoRAConfig(AdapterConfig):
    """Settings of DropLoRA: LoRA with dropout between A and B.

    Each token trains another subset of the ranks, which keeps high ranks from
    overfitting. It computes what the authors' code does, where each token and
    rank is dropped by itself and what stays is scaled up; their paper has one
    mask for all tokens.

    Learning rate: 3e-4 in the authors' scripts (rank 64, alpha 128, rates of
    0.1 to 0.4). Cost: LoRA's, and a small mask; merged, none.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        dropout: Float in `[0, 1)`. Dropout rate of `x A`, in training. Defaults
            to `0.5`.
        seed: Integer in `[0, 2**31)`. Seed of A and of dropout. `None`
            (default) draws one, which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.DropLoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)

    Reference: [DropLoRA](https://arxiv.org/abs/2508.17337).
    """

    dropout: float = 0.5

    adapter_class = DropLoRAAdapter
    method_name = "DropLoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rate("dropout")
