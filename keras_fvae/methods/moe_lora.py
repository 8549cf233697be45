"""MoE-LoRA: experts of a low rank each, and a router that weighs them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from typing import ClassVar
from typing import NoReturn

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import noise
from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.linear_map import LinearMap
from keras_fvae.layers.sharding import WeightAxes


class MoELoRAAdapter(Adapter):
    """The update `scale * sum_i g_i (x A_i) B_i`, over the experts i.

    All experts are computed for each token, as one LoRA whose ranks are those
    of all experts, with the gates g between A and B.

    In training, an expert E_i enters by `r_i E_i + (g_i - r_i) E_i`, where no
    gradient goes through `r_i = sqrt(g_i)`, nor through the second E_i.
    """

    config: MoELoRAConfig

    weight_axes: WeightAxes = {
        "kernel_a": (None, "input", None),
        "kernel_b": (None, None, "output"),
        "kernel_gate": ("input", None),
    }

    def __init__(self, config: MoELoRAConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if config.dropout > 0:
            self.add_seed_generator()

    def build(
        self,
        linear_map: LinearMap,
        kernel_shape: tuple[int, ...],
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().build(linear_map, kernel_shape, read_kernel)
        num_experts, rank = self.config.num_experts, self.config.rank
        shape_a = (num_experts, self.width, rank)
        shape_b = (num_experts, rank, self.units)
        shape_gate = (self.width, num_experts)
        self.kernel_a: keras.Variable = self.add_adapter_weight(
            "kernel_a",
            shape_a,
            lambda: self.draw("kernel_a", shape_a),
            regularizer=self.regularizer,
        )
        self.kernel_b: keras.Variable = self.add_adapter_weight(
            "kernel_b",
            shape_b,
            lambda: np.zeros(shape_b),
            regularizer=self.regularizer,
        )
        self.kernel_gate: keras.Variable = self.add_adapter_weight(
            "kernel_gate",
            shape_gate,
            lambda: self.draw("kernel_gate", shape_gate),
        )

    def draw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """NumPy array, the first values of a weight that x is multiplied by."""
        limit = 1 / math.sqrt(self.width)
        generator = noise.initial_generator(self.initial_seed, name)
        return generator.uniform(-limit, limit, shape)

    @property
    def is_zero(self) -> bool:
        return not replicas.to_numpy(self.kernel_b).any()

    def project(self, frozen: FrozenCall, training: bool) -> Tensor:
        """What the experts apply B to: `x A_i`, side by side.

        Returns:
            Tensor of shape `(..., num_experts * rank)`.
        """
        kernel_a = ops.transpose(self.kernel_a.value, (1, 0, 2))
        kernel_a = ops.reshape(kernel_a, (self.width, -1))
        if not self.changes_state(training):
            return frozen.project(kernel_a)
        x = noise.dropout(
            frozen.inputs, self.config.dropout, self.seed_generator
        )
        return frozen.project(kernel_a, x)

    def gates(self, frozen: FrozenCall) -> Tensor:
        """How much each expert weighs for each token.

        Returns:
            Float32 tensor of shape `(..., num_experts)`. Those of a token sum
            to 1, and all but its `top_k` are 0.
        """
        logits = ops.cast(frozen.project(self.kernel_gate), "float32")
        _, chosen = ops.top_k(logits, self.config.top_k)
        # `ops.one_hot` would have Python wait for a GPU on PyTorch.
        experts = ops.arange(self.config.num_experts, dtype=chosen.dtype)
        is_chosen = ops.any(chosen[..., None] == experts, axis=-2)
        kept = ops.softmax(logits) * ops.cast(is_chosen, logits.dtype)
        return kept / ops.sum(kept, axis=-1, keepdims=True)

    def adapt(self, frozen: FrozenCall, training: bool) -> Tensor:
        projected = self.project(frozen, training)
        # One for each rank of an expert.
        gates = ops.repeat(self.gates(frozen), self.config.rank, axis=-1)
        kernel_b = ops.reshape(self.kernel_b.value, (-1, self.units))
        kernel_b = self.config.scale * kernel_b

        def weighted(weights, projected):
            return ops.cast(weights, projected.dtype) * projected

        outputs = frozen.outputs()
        if not (training and self.config.gate_rescaling):
            return frozen.add_product(
                outputs, weighted(gates, projected), kernel_b
            )
        roots = ops.stop_gradient(ops.sqrt(gates))
        outputs = frozen.add_product(
            outputs, weighted(roots, projected), kernel_b
        )
        return frozen.add_product(
            outputs,
            weighted(gates - roots, ops.stop_gradient(projected)),
            ops.stop_gradient(kernel_b),
        )

    def merge(self, kernel: np.ndarray, bias: np.ndarray) -> NoReturn:
        raise ValueError(
            "its router gives each token experts of its own, so its update is "
            "no linear function of the input. Leave the adapter in the model"
        )

    def changes_state(self, training: bool) -> bool:
        return self.config.dropout > 0 and self.is_drawn(training)


@dataclasses.dataclass(frozen=True)
class MoELoRAConfig(AdapterConfig):
    """Settings of MoE-LoRA: LoRA by experts, which a router weighs per token.

    `y = x W + b + scale * sum_i g_i (x A_i) B_i`, where the gates g are the
    `top_k` largest of `softmax(x W_g)`, divided by their sum. No loss balances
    the experts. In training, their gradients have `sqrt(g_i)` in the place of
    `g_i`, which the authors combine with a Riemannian preconditioner for each
    expert.

    The router has a learning rate of its own, far below the experts'. In Keras
    that takes an optimizer of its own, as in the example: a factor on the
    router's gradient would change nothing for Adam.

    Learning rate: 1e-5 (AdamW) and 3e-5 (SGD) in the authors' scripts (20
    experts of rank 4, the top 10, alpha 16, dropout 0.05); the router's is
    3e-8, with its gradients clipped to a norm of 1. Cost: LoRA's at a rank of
    `num_experts * rank`, and the products with B a second time in training.
    The update differs from token to token, so it cannot be merged.

    Args:
        rank: Positive integer, the rank of each expert. Defaults to `4`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1.
        num_experts: Positive integer, the experts of each layer. Defaults to
            `20`.
        top_k: Positive integer, at most `num_experts`: how many of them each
            token gets. Defaults to `10`.
        gate_rescaling: Boolean. Whether the gradients of the experts have the
            square roots of the gates, as above. `False` gives them the plain
            gradients. Defaults to `True`.
        dropout: Float in `[0, 1)`. Dropout rate of x before the A of all
            experts, in training. Defaults to `0.0`.
        seed: Integer in `[0, 2**31)`. Seed of the A of all experts, of the
            router and of dropout. `None` (default) draws one, which
            `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> config = keras_fvae.MoELoRAConfig(rank=2, num_experts=4, top_k=2)
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, config)
    >>> model.compile(
    ...     keras.optimizers.MultiOptimizer(
    ...         keras.optimizers.OptimizerMap(
    ...             keras.optimizers.AdamW(1e-5),
    ...             {
    ...                 ".*/kernel_gate": keras.optimizers.AdamW(
    ...                     3e-8, global_clipnorm=1.0
    ...                 )
    ...             },
    ...         )
    ...     ),
    ...     "mse",
    ... )
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)

    Reference: [A Stronger Mixture of Low-Rank Experts for Fine-Tuning
    Foundation Models](https://arxiv.org/abs/2502.15828).
    """

    rank: int = 4
    num_experts: int = 20
    top_k: int = 10
    gate_rescaling: bool = True
    dropout: float = 0.0

    adapter_class = MoELoRAAdapter
    method_name = "MoE-LoRA"
    training_settings: ClassVar[tuple[str, ...]] = (
        "gate_rescaling",
        "dropout",
        "seed",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("num_experts", minimum=1)
        self._check_integer("top_k", minimum=1)
        if self.top_k > self.num_experts:
            raise ValueError(
                "`top_k` must be at most `num_experts`. Received: "
                f"top_k={self.top_k}, num_experts={self.num_experts}"
            )
        self._check_choice("gate_rescaling", (True, False))
        self._check_rate("dropout")
