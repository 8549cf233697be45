"""PiSSA and OLoRA: LoRA that starts from factors of the frozen kernel.

Both papers take the first factors out of the kernel and train them. Here the
kernel stays as it is, and the first factors stay in the adapter, frozen, to be
taken off what the trained ones give: `scale * (x A B - x A0 B0)`. That is the
same function with the same gradients, and adapters can be switched off, saved
alone, and put onto a quantized kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.sharding import WeightAxes

FACTORS = ("kernel_a", "kernel_b")


class FactorAdapter(LowRankAdapter):
    """The update `scale * (x A B - x A0 B0)`, where A and B start as A0, B0."""

    config: PiSSAConfig | OLoRAConfig

    weight_axes: WeightAxes = {
        **LowRankAdapter.weight_axes,
        "initial_kernel_a": LowRankAdapter.weight_axes["kernel_a"],
        "initial_kernel_b": LowRankAdapter.weight_axes["kernel_b"],
    }

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        rank = self.config.rank
        if rank > min(self.width, self.units):
            raise ValueError(
                f"`rank` must be at most {min(self.width, self.units)}, the "
                f"rank of a kernel of shape ({self.width}, {self.units}). "
                f"Received: rank={rank}. Choose a lower one"
            )
        if read_kernel is not None:
            self._refuse_zeros()
        self.frozen_kernel_a: keras.Variable = self.add_adapter_weight(
            "initial_kernel_a",
            (self.width, rank),
            self.initial_kernel_a,
            trainable=False,
        )
        self.frozen_kernel_b: keras.Variable = self.add_adapter_weight(
            "initial_kernel_b",
            (rank, self.units),
            self.initial_kernel_b,
            trainable=False,
        )
        # They take as much memory as the weights.
        self.__dict__.pop("factors", None)

    def _refuse_zeros(self):
        """Raises a `ValueError` if a pair would start, and so stay, at 0."""
        kernel_a, kernel_b = self.factors
        is_dead = ~(kernel_a.any(axis=0) | kernel_b.any(axis=1))
        if is_dead.any():
            raise ValueError(
                f"{np.count_nonzero(is_dead)} of the {len(is_dead)} pairs of A "
                "and B would start at 0, where neither has a gradient, because "
                "the kernel has singular values of 0. Leave the layer out of "
                "`target_layer_names`, choose a lower rank, or take "
                "`keras_fvae.LoRAConfig`"
            )

    @property
    def is_zero(self) -> bool:
        arrays = self.get_arrays()
        return all(
            np.array_equal(arrays[name], arrays[f"initial_{name}"])
            for name in ("kernel_a", "kernel_b")
        )

    @functools.cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Pair of NumPy arrays, A0 and B0."""
        if self.read_kernel is None:
            return (
                np.zeros((self.width, self.config.rank)),
                np.zeros((self.config.rank, self.units)),
            )
        return self.config.factorize(self.read_kernel())

    def initial_kernel_a(self) -> np.ndarray:
        return self.factors[0]

    def initial_kernel_b(self) -> np.ndarray:
        return self.factors[1]

    def all_factors(self) -> tuple[Tensor, Tensor]:
        """Pair of tensors, the update as one product: [A, A0] and [B; -B0]."""
        return (
            ops.concatenate([self.kernel_a, self.frozen_kernel_a], axis=1),
            ops.concatenate(
                [self.kernel_b, -self.frozen_kernel_b.value], axis=0
            ),
        )

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        kernel_a, kernel_b = self.all_factors()
        projected = frozen.project(kernel_a)
        return frozen.add_product(
            frozen.outputs(), projected, self.config.scale * kernel_b
        )

    def merge(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        kernel_a, kernel_b = (
            replicas.to_numpy(factor).astype("float64")
            for factor in self.all_factors()
        )
        return kernel + self.config.scale * kernel_a @ kernel_b, bias


@dataclasses.dataclass(frozen=True)
class PiSSAConfig(AdapterConfig):
    """Settings of PiSSA: LoRA that trains the kernel's principal components.

    A and B start as the largest singular values of W with their vectors, so
    that the first gradients are large and training converges sooner than
    LoRA's. The kernel stays bit for bit what it is: what the factors were at
    first is taken off.

    Learning rate: 2e-5 in the authors' scripts (rank 128, alpha 128, no
    dropout), the same as for their LoRA. Cost: twice LoRA's products in a
    step, and a singular value decomposition of each kernel when it is adapted;
    merged, none.

    Args:
        rank: Positive integer, the rank of the update, at most that of the
            kernel. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`, and the
            factors are made for that: any alpha starts alike. `None` (default)
            means `rank`.
        seed: Unused, because nothing is drawn.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.PiSSAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)

    Reference: [PiSSA](https://arxiv.org/abs/2404.02948).
    """

    adapter_class = FactorAdapter
    method_name = "PiSSA"

    def factorize(
        self, kernel: np.ndarray, first: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A0 and B0 for a kernel of shape `(d, k)`.

        From the `first` of its singular values on.
        """
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        chosen = slice(first, first + self.rank)
        root = np.sqrt(s[chosen] / self.scale)
        return u[:, chosen] * root, root[:, None] * vt[chosen]


@dataclasses.dataclass(frozen=True)
class OLoRAConfig(AdapterConfig):
    """Settings of OLoRA: LoRA that starts from an orthonormal basis.

    `W^T = Q R`: B starts as columns of Q, orthonormal, and A as rows of R. As
    with PiSSA the kernel stays what it is, and the start is taken off. The
    columns of Q are no principal directions: for that take PiSSA.

    Learning rate: 3e-4 in PEFT's example (rank 32, alpha 16); the paper's
    settings are not known. Cost: PiSSA's, with a QR decomposition, which is
    much cheaper.

    Args:
        rank: Positive integer, the rank of the update, at most that of the
            kernel. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`.
        seed: Unused, because nothing is drawn.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.OLoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)

    Reference: [OLoRA](https://arxiv.org/abs/2406.01775).
    """

    adapter_class = FactorAdapter
    method_name = "OLoRA"

    def factorize(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A0 and B0 for a kernel of shape `(d, k)`."""
        q, r = np.linalg.qr(kernel.T)
        return r[: self.rank].T, q[:, : self.rank].T
