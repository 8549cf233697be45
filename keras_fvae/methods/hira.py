"""HiRA: the kernel times a low-rank matrix, element by element."""

from __future__ import annotations

import dataclasses

import numpy as np
from keras import ops

from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall


class HiRAAdapter(LowRankAdapter):
    """`y = x (W * (1 + A B)) + b`.

    The product takes the place of the frozen layer's. Where that is quantized,
    which quantizes x too, `x (W * A B)` is added to it.
    """

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        kernel = frozen.kernel()
        factor = ops.matmul(self.kernel_a.value, self.kernel_b.value)
        if frozen.is_quantized:
            factor = ops.cast(factor, kernel.dtype)
            return frozen.outputs() + frozen.multiply(kernel * factor)
        outputs = frozen.multiply(kernel * ops.cast(1 + factor, kernel.dtype))
        bias = frozen.bias()
        return outputs if bias is None else outputs + bias

    def merge(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        arrays = self.get_arrays()
        kernel_a = arrays["kernel_a"].astype("float64")
        return kernel * (1 + kernel_a @ arrays["kernel_b"]), bias


@dataclasses.dataclass(frozen=True)
class HiRAConfig(AdapterConfig):
    """Settings of HiRA: `y = x (W * (1 + A B)) + b`, element by element.

    The change of the kernel has a rank of up to `rank` times that of the
    kernel, with LoRA's parameters. Where W is 0, nothing can change. There is
    no scale, and no alpha.

    Learning rate: far above LoRA's: 4.5e-3 in PEFT's benchmark, where LoRA has
    1e-4 (rank 32); the authors give 1e-3 in their script, 1e-4 to 2e-4 in
    their table. Cost: a matrix as large as the kernel in each step, kept for
    the gradient; merged, none.

    Args:
        rank: Positive integer, the rank of `A B`. Defaults to `16`.
        seed: Integer in `[0, 2**31)`. Seed of A. `None` (default) draws one,
            which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.HiRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)

    Reference: [HiRA](https://openreview.net/forum?id=TwJrTz9cRS).
    """

    alpha: None = dataclasses.field(default=None, init=False)

    adapter_class = HiRAAdapter
    method_name = "HiRA"
