"""SRLoRA: a rank that matters little is fused, and another takes its place.

The papers' own code is not known, nor all of its text: what was assumed is in
the docstring of `SRLoRAConfig`.
"""

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
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.sharding import WeightAxes
from keras_fvae.methods.pissa import FactorAdapter
from keras_fvae.methods.pissa import PiSSAConfig


class SRLoRAAdapter(FactorAdapter):
    """PiSSA, and what was fused: `scale * (x A B - x A0 B0 + x Af Bf)`.

    The kernel stays as it is. A pair that is fused is in Af and Bf, frozen, by
    two columns and rows: where it got to, less where it started.
    """

    config: SRLoRAConfig
    fused_kernel_a: keras.Variable
    fused_kernel_b: keras.Variable

    without_callback: str | None = (
        "SRLoRA fuses ranks and starts others by a callback, without which it "
        "is PiSSA: pass `keras_fvae.SRLoRARestarter()` to `fit`."
    )
    weight_axes: WeightAxes = {
        **FactorAdapter.weight_axes,
        "fused_kernel_a": FactorAdapter.weight_axes["kernel_a"],
        "fused_kernel_b": FactorAdapter.weight_axes["kernel_b"],
    }

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        directions_left = min(self.width, self.units) - self.config.rank
        number = 2 * min(self.config.num_fused, directions_left)
        self.fused_kernel_a, self.fused_kernel_b = (
            self.add_adapter_weight(
                f"fused_{name}",
                shape,
                functools.partial(np.zeros, shape),
                trainable=False,
            )
            for name, shape in (
                ("kernel_a", (self.width, number)),
                ("kernel_b", (number, self.units)),
            )
        )

    @property
    def is_zero(self) -> bool:
        return super().is_zero and self.num_fused == 0

    @property
    def num_fused(self) -> int:
        """Integer, how many pairs have been fused."""
        is_used = replicas.to_numpy(self.fused_kernel_a).any(axis=0)
        return int(np.count_nonzero(is_used)) // 2

    @property
    def max_fused(self) -> int:
        """Integer, how many pairs can be."""
        return self.fused_kernel_a.shape[1] // 2

    def all_factors(self) -> tuple[Tensor, Tensor]:
        kernel_a, kernel_b = super().all_factors()
        return (
            ops.concatenate([kernel_a, self.fused_kernel_a], axis=1),
            ops.concatenate([kernel_b, self.fused_kernel_b], axis=0),
        )

    def fuse(self, rank: int, kernel: np.ndarray) -> None:
        """Fuses a pair; the next singular vectors of the kernel take its place.

        The update stays what it is.

        Args:
            rank: Integer, which.
            kernel: Array of shape `(d, k)`, the frozen kernel.
        """
        arrays = {name: a.copy() for name, a in self.get_arrays().items()}
        number = self.num_fused
        for factor, sign, axis in (("kernel_a", 1, 1), ("kernel_b", -1, 0)):
            own, initial, fused = (
                np.moveaxis(arrays[name], axis, 0)
                for name in (factor, f"initial_{factor}", f"fused_{factor}")
            )
            fused[2 * number] = own[rank]
            fused[2 * number + 1] = sign * initial[rank]
        new = self.config.factorize(kernel, self.config.rank + number)
        for prefix in ("", "initial_"):
            arrays[f"{prefix}kernel_a"][:, rank] = new[0][:, 0]
            arrays[f"{prefix}kernel_b"][rank] = new[1][0]
        self.set_arrays(arrays)


@dataclasses.dataclass(frozen=True)
class SRLoRAConfig(PiSSAConfig):
    """Settings of SRLoRA: PiSSA whose least important ranks start anew.

    **Experimental.** In training `keras_fvae.SRLoRARestarter`, a callback,
    fuses the pairs of A and B that matter least, and starts them anew from
    singular vectors of the kernel that were not used yet. So an update of a
    low rank at a time comes to a higher one.

    The paper is known in part, and no code of its authors. Assumed here: what
    is fused stays in the adapter, since a frozen kernel is never changed; what
    the new pair starts with is taken off, so that the model's outputs do not
    jump; a pair's importance is AdaLoRA's, of its column of A and its row of
    B; the optimizer forgets its moments of a pair that starts anew.

    Learning rate: not known; PiSSA's is 2e-5. Cost: PiSSA's, and two thin
    products for each pair that can be fused; a singular value decomposition of
    each kernel whenever pairs are fused; merged, none.

    Args:
        rank: Positive integer, the rank that trains, at most that of the
            kernel. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`.
        num_fused: Positive integer, how many pairs of a layer can be fused in
            all: fewer if the kernel has not as many singular vectors. Defaults
            to `16`.
        seed: Unused, because nothing is drawn.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.SRLoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)

    Reference: [SRLoRA](https://arxiv.org/abs/2505.12433).
    """

    num_fused: int = 16

    adapter_class: ClassVar[Any] = SRLoRAAdapter
    method_name = "SRLoRA (experimental)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("num_fused", minimum=1)
