"""Riemannian preconditioning: gradients in the metric of the product A B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_fvae.backend.keras_internals import JointOptimizer
from keras_fvae.backend.types import Tensor
from keras_fvae.optimizers.arguments import BEFORE_THE_STEP
from keras_fvae.optimizers.arguments import LearningRate
from keras_fvae.optimizers.arguments import check_number
from keras_fvae.optimizers.arguments import get_inner_optimizer
from keras_fvae.optimizers.eigen import batched_eigh
from keras_fvae.optimizers.eigen import function_of
from keras_fvae.optimizers.eigen import transpose
from keras_fvae.optimizers.pairs import find_pairs


@keras.saving.register_keras_serializable(package="keras_fvae")
class RiemannianPreconditioning(JointOptimizer):
    """Preconditions the gradients of A and B for another optimizer.

    Where A is large and B small, as LoRA starts, plain gradients move B fast
    and A hardly. For each pair of `kernel_a`, A of shape `(d, rank)`, and
    `kernel_b`, B of shape `(rank, k)`, the inner optimizer gets

        g_A (B B^T + regularization I)^-1
        (A^T A + regularization I)^-1 g_B

    for the gradients g_A and g_B, both from the weights before the step. All
    other weights go on to it as they are, B without an A that trains among
    them (FFA-LoRA, FVAE-LoRA). Experts are preconditioned each by itself.

    Clipping and gradient accumulation come first, and are settings of this
    optimizer; learning rate, weight decay and moving averages are the inner
    one's. `keras.optimizers.LossScaleOptimizer` and `MultiOptimizer` go around
    it.

    Learning rate: that of the inner optimizer, 1e-4 in PEFT's benchmark (AdamW,
    weight decay 0.1). Cost: two products of `rank` and the eigenvalues of two
    `(rank, rank)` matrices for each pair in each step, no memory. With AdamW it
    is not `AdamWr` of MoE-LoRA's authors, which does not correct Adam's
    averages, and preconditions B by A as it has just been stepped.

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, which does the steps.
        regularization: Positive float, what is added to the diagonals. While B
            is still smaller, the gradient of A is divided by it. Defaults to
            `1e-2`, as in PEFT; the authors have `1e-6`.
        name: Optional string.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`,
            `gradient_accumulation_steps` or `loss_scale_factor`, as in
            `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If an argument is not allowed; in `build`, which `fit`
            calls, if there is no pair of A and B that train.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    >>> optimizer = keras_fvae.optimizers.RiemannianPreconditioning(
    ...     keras.optimizers.AdamW(1e-4, weight_decay=0.1), global_clipnorm=1.0
    ... )
    >>> model.compile(optimizer, "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)

    Reference: [Riemannian Preconditioned LoRA for Fine-Tuning Foundation
    Models](https://arxiv.org/abs/2402.02347).
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        regularization: float = 1e-2,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for setting in kwargs:
            if setting not in BEFORE_THE_STEP:
                raise ValueError(
                    f"`RiemannianPreconditioning` has no `{setting}`, only "
                    f"{BEFORE_THE_STEP}. What the inner optimizer does after, "
                    "set there. "
                    f"Received: {setting}={kwargs[setting]!r}"
                )
        check_number(
            "regularization",
            regularization,
            "a positive number",
            lambda v: v > 0,
        )
        inner_optimizer = get_inner_optimizer(
            "inner_optimizer",
            inner_optimizer,
            type(self).__name__,
            BEFORE_THE_STEP,
        )
        super().__init__(learning_rate=0.0, name=name, **kwargs)
        self.inner_optimizer = inner_optimizer
        self.regularization = regularization

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        self.pairs = find_pairs(variables, type(self).__name__)
        self.inner_optimizer.build(variables)
        super().build(variables)

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def joint_step(
        self, gradients: list[Tensor | None], learning_rate: Tensor
    ) -> None:
        gradients = self.precondition(gradients)
        self.inner_optimizer.apply_gradients(
            (gradient, variable)
            for gradient, variable in zip(gradients, self.optimized_variables)
            if gradient is not None
        )

    def precondition(
        self, gradients: list[Tensor | None]
    ) -> list[Tensor | None]:
        """What the inner optimizer gets in the place of gradients.

        Args:
            gradients: List, as in `joint_step`.

        Returns:
            List of the same length.
        """
        variables = self.optimized_variables
        metrics = []
        for a, b in self.pairs:
            kernel_a = ops.convert_to_tensor(variables[a])
            kernel_b = ops.convert_to_tensor(variables[b])
            metrics += [
                ops.matmul(kernel_b, transpose(kernel_b)),
                ops.matmul(transpose(kernel_a), kernel_a),
            ]
        inverses = [
            function_of(1 / (values + self.regularization), vectors)
            for values, vectors in batched_eigh(metrics)
        ]
        result = list(gradients)
        for (a, b), for_a, for_b in zip(
            self.pairs, inverses[::2], inverses[1::2]
        ):
            if gradients[a] is not None:
                result[a] = ops.matmul(gradients[a], for_a)
            if gradients[b] is not None:
                result[b] = ops.matmul(for_b, gradients[b])
        return result

    @property
    def variables(self) -> list[keras.Variable]:
        return super().variables + self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
            "regularization": self.regularization,
            **{setting: getattr(self, setting) for setting in BEFORE_THE_STEP},
        }
