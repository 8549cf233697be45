"""What the optimizers of pairs have in common: the weights in no pair."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import keras
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.keras_internals import JointOptimizer
from keras_fvae.backend.types import Tensor
from keras_fvae.optimizers.arguments import BEFORE_THE_STEP
from keras_fvae.optimizers.arguments import LearningRate
from keras_fvae.optimizers.arguments import get_inner_optimizer


class PairOptimizer(JointOptimizer):
    """An optimizer of the factors A and B of each adapter.

    One that derives from it overrides `step_pairs`, and calls `build_others`
    in `build`.

    Args:
        learning_rate: Float, or
            `keras.optimizers.schedules.LearningRateSchedule`.
        other_optimizer: Optional `keras.optimizers.Optimizer` of the weights
            that are in no pair. Needed if there are such weights.
        **kwargs: As of `keras.optimizers.Optimizer`.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        other_optimizer: keras.optimizers.Optimizer | None,
        **kwargs: Any,
    ) -> None:
        if other_optimizer is not None:
            other_optimizer = get_inner_optimizer(
                "other_optimizer",
                other_optimizer,
                type(self).__name__,
                (*BEFORE_THE_STEP, "use_ema"),
            )
        super().__init__(learning_rate, **kwargs)
        self.other_optimizer: Any = other_optimizer

    def step_pairs(
        self, gradients: list[Tensor | None], learning_rate: Tensor
    ) -> None:
        """Steps what belongs to pairs; the arguments are `joint_step`'s."""
        raise NotImplementedError

    def build_others(
        self, variables: Sequence[keras.Variable], of_pairs: AbstractSet[int]
    ) -> None:
        """Builds the optimizer of the weights that are in no pair.

        Args:
            variables: List of `keras.Variable`, what trains.
            of_pairs: Set of integers, where in the list is what is.

        Raises:
            ValueError: If there are such weights, and no optimizer.
        """
        self.others: tuple[int, ...] = tuple(
            index for index in range(len(variables)) if index not in of_pairs
        )
        others = [variables[index] for index in self.others]
        if self.other_optimizer is not None:
            self.other_optimizer.build(others)
        elif others:
            paths = ", ".join(f"'{variable.path}'" for variable in others[:3])
            raise ValueError(
                f"`{type(self).__name__}` optimizes pairs of `kernel_a` and "
                f"`kernel_b`. {len(others)} other variables train, too "
                f"({paths}{', ...' if len(others) > 3 else ''}): say what is "
                "to optimize them, for example by "
                "`other_optimizer=keras.optimizers.AdamW(1e-3)`."
            )

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        super().exclude_from_weight_decay(var_list, var_names)
        if self.other_optimizer is not None:
            self.other_optimizer.exclude_from_weight_decay(var_list, var_names)

    def joint_step(
        self, gradients: list[Tensor | None], learning_rate: Tensor
    ) -> None:
        self.step_pairs(gradients, learning_rate)
        variables = self.optimized_variables
        others = [
            (gradients[index], variables[index])
            for index in self.others
            if gradients[index] is not None
        ]
        if others:
            self.other_optimizer.apply_gradients(others)

    def whole_gradients(
        self, gradients: list[Tensor | None], indices: Iterable[int]
    ) -> list[Tensor]:
        """Gradients over all replicas, 0 for what the loss does not depend on.

        Args:
            gradients: List, as in `joint_step`.
            indices: Iterable of integers, of which variables.

        Returns:
            List of tensors of the variables' shapes and dtypes.
        """
        variables = self.optimized_variables
        found = [(gradients[index], variables[index]) for index in indices]
        return replicas.sum_over_replicas(
            [
                ops.zeros(variable.shape, variable.dtype)
                if gradient is None
                else ops.cast(gradient, variable.dtype)
                for gradient, variable in found
            ]
        )

    @property
    def variables(self) -> list[keras.Variable]:
        if self.other_optimizer is None:
            return super().variables
        return super().variables + self.other_optimizer.variables

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "other_optimizer": self.other_optimizer
            and keras.saving.serialize_keras_object(self.other_optimizer),
        }
