"""LoRA-RITE: an optimizer of A and B that sees the product A B alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.config import check_boolean
from keras_fvae.optimizers.arguments import LearningRate
from keras_fvae.optimizers.arguments import check_number
from keras_fvae.optimizers.eigen import transpose
from keras_fvae.optimizers.lora_rite_step import State
from keras_fvae.optimizers.lora_rite_step import corrected_decay
from keras_fvae.optimizers.lora_rite_step import step_factors
from keras_fvae.optimizers.pair_optimizer import PairOptimizer
from keras_fvae.optimizers.pairs import find_pairs

# For how many steps a factor is skipped until that is told.
STALLED_STEPS = 10


@keras.saving.register_keras_serializable(package="keras_fvae")
class LoRARITE(PairOptimizer):
    """Optimizer that implements LoRA-RITE.

    An adaptive optimizer, as Adam, for each pair of `kernel_a`, A of shape
    `(d, rank)`, and `kernel_b`, B of shape `(rank, k)`. However a product A B
    is divided among its factors, and in whatever basis, its step is the same:
    the gradient of each factor is taken in an orthonormal basis of the other
    one ("unmagnified"), and so are its moments. Each expert is a pair. What is
    in no pair, such as a head, or B without an A that trains (FFA-LoRA,
    FVAE-LoRA), goes to `other_optimizer`.

    Learning rate: `3e-4` in the authors' script, for Adam, too; those of their
    paper's tables are not known to us. Rank: at most the width of the layer's
    input and of its outputs, because in a factor with fewer rows than the rank
    rounding decides what is divided by; `build` warns of others. Cost: two
    products of `rank` and the eigenvalues of four `(rank, rank)` matrices for
    each pair in each step, and Adam's memory. Those are of float32: directions
    of a factor that are smaller than about a thousandth of its largest one
    count as 0.

    A factor whose unmagnified gradient is above `skip_threshold` is left out
    of the step. If the loss is a sum over tokens, that may hold for all factors
    in all steps, and nothing trains: at the end of `fit` (or where
    `finalize_variable_values` is called) this is warned of.

    Args:
        learning_rate: Float, or
            `keras.optimizers.schedules.LearningRateSchedule`. Defaults to
            `3e-4`.
        other_optimizer: Optional `keras.optimizers.Optimizer` of the weights
            that are in no pair, with a learning rate and weight decay of its
            own. Needed if there are such weights. Defaults to `None`.
        beta_1: Float in `[0, 1)`, the decay rate of the first moment. Defaults
            to `0.9`.
        beta_2: Float in `[0, 1)`, the decay rate of the second moment. Defaults
            to `0.999`.
        epsilon: Positive float, what is added to the root of the second moment.
            Defaults to `1e-6`.
        unmagnified_clipnorm: Positive float. The unmagnified gradients of all
            pairs together are clipped to this norm. `None` for no clipping.
            Defaults to `1.0`.
        skip_threshold: Positive float. A factor whose unmagnified gradient has
            a larger root mean square is skipped. `None` to skip none. Defaults
            to `1.0`.
        escaped_mass: Boolean. Whether to make up for the part of the second
            moment that is lost when the basis turns, as the paper has it and
            the authors' code by default has not. Defaults to `False`.
        weight_decay: Optional float, of the pairs.
        name: String. Defaults to `"lora_rite"`.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, which come before
            all else and count for all weights, `gradient_accumulation_steps`,
            `loss_scale_factor`, `use_ema`, `ema_momentum` or
            `ema_overwrite_frequency`, as in `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If an argument is not allowed; in `build`, which `fit`
            calls, if there is no pair of A and B that train, or no
            `other_optimizer` for other weights.

    Example:

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((4,)),
    ...         keras.layers.Dense(4, name="query"),
    ...         keras.layers.Dense(3, name="head"),
    ...     ]
    ... )
    >>> summary = keras_fvae.enable_adapter(
    ...     model,
    ...     keras_fvae.LoRAConfig(2),
    ...     ["query"],
    ...     trainable_layer_names=["head"],
    ... )
    >>> optimizer = keras_fvae.optimizers.LoRARITE(
    ...     1e-3, other_optimizer=keras.optimizers.AdamW(1e-3)
    ... )
    >>> model.compile(optimizer, "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)

    Reference: [LoRA Done RITE: Robust Invariant Transformation Equilibration
    for LoRA Optimization](https://arxiv.org/abs/2410.20625).
    """

    def __init__(
        self,
        learning_rate: LearningRate = 3e-4,
        other_optimizer: keras.optimizers.Optimizer | None = None,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        unmagnified_clipnorm: float | None = 1.0,
        skip_threshold: float | None = 1.0,
        escaped_mass: bool = False,
        weight_decay: float | None = None,
        name: str = "lora_rite",
        **kwargs: Any,
    ) -> None:
        for argument, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            check_number(
                argument, value, "a number in [0, 1)", lambda v: 0 <= v < 1
            )
        for argument, number in (
            ("epsilon", epsilon),
            ("unmagnified_clipnorm", unmagnified_clipnorm),
            ("skip_threshold", skip_threshold),
        ):
            if number is not None or argument == "epsilon":
                check_number(
                    argument, number, "a positive number", lambda v: v > 0
                )
        check_boolean("escaped_mass", escaped_mass)
        super().__init__(
            learning_rate,
            other_optimizer,
            weight_decay=weight_decay,
            name=name,
            **kwargs,
        )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.unmagnified_clipnorm = unmagnified_clipnorm
        self.skip_threshold = skip_threshold
        self.escaped_mass = escaped_mass

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        pairs = find_pairs(variables, type(self).__name__)
        # A, B, A, B ...: so go all lists of what factors have.
        self.factors = tuple(index for pair in pairs for index in pair)
        warn_of_high_ranks([(variables[a], variables[b]) for a, b in pairs])
        self.build_others(variables, {*self.factors})
        super().build(variables)
        kernels = [variables[index] for index in self.factors]
        self.momentums, self.bases = self.add_optimizer_variables(
            kernels, ["momentum", "basis"]
        )
        self.second_moments, self.escaped_masses = [], []
        for index, kernel in enumerate(kernels):
            *experts, _, rank = kernels[index - index % 2].shape
            self.second_moments.append(
                self.add_variable(
                    (*experts, rank, rank),
                    dtype=kernel.dtype,
                    name="second_moment",
                )
            )
            if self.escaped_mass:
                self.escaped_masses.append(
                    self.add_variable(
                        (*experts, 1, 1),
                        dtype=kernel.dtype,
                        name="escaped_mass",
                    )
                )
        # For how many steps in a row each factor of each expert was skipped.
        self.paths = tuple(
            kernel.path
            for kernel in kernels
            for _ in range(math.prod(kernel.shape[:-2]))
        )
        self.skips = self.add_variable(
            (len(self.paths),), dtype="int32", name="skips"
        )

    def step_pairs(
        self, gradients: list[Tensor | None], learning_rate: Tensor
    ) -> None:
        variables = self.optimized_variables
        kernels = [variables[index] for index in self.factors]
        gradients = self.whole_gradients(gradients, self.factors)
        dtype = kernels[0].dtype
        learning_rate = ops.cast(learning_rate, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        weights = tall(kernels)
        directions, state, is_skipped = step_factors(
            weights,
            tall(gradients),
            State(
                tall(self.bases),
                tall(self.momentums),
                [ops.convert_to_tensor(v) for v in self.second_moments],
                [ops.convert_to_tensor(v) for v in self.escaped_masses],
            ),
            corrected_decay(self.beta_1, step),
            corrected_decay(self.beta_2, step),
            self.epsilon,
            self.unmagnified_clipnorm,
            self.skip_threshold,
        )
        weights = [
            weight
            - learning_rate
            * (direction + self.weight_decay_of(kernel) * weight)
            for kernel, weight, direction in zip(kernels, weights, directions)
        ]
        replicas.assign(
            [
                *kernels,
                *self.bases,
                *self.momentums,
                *self.second_moments,
                *self.escaped_masses,
                self.skips,
            ],
            [
                *tall(weights),
                *tall(state.bases),
                *tall(state.momentums),
                *state.second_moments,
                *state.escaped_masses,
                ops.where(is_skipped, self.skips + 1, 0),
            ],
        )

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        super().finalize_variable_values(var_list)
        if self.built:
            self._warn_of_stall()

    def _warn_of_stall(self):
        """Warns if factors were skipped in all of the last steps."""
        steps = int(ops.convert_to_numpy(self.iterations))
        skips = replicas.to_numpy(self.skips)
        stalled = np.flatnonzero(skips >= max(1, min(steps, STALLED_STEPS)))
        if not stalled.size:
            return
        warnings.warn(
            f"LoRA-RITE does not train {len(stalled)} of {len(self.paths)} "
            f"factors, such as '{self.paths[stalled[0]]}': it has skipped them "
            f"in the last {int(skips[stalled].min())} steps or more, because "
            "the root mean square of their unmagnified gradients is above "
            f"`skip_threshold={self.skip_threshold}`. If the loss is a sum, "
            "make it a mean. Else raise `skip_threshold`, or pass `None` to "
            "skip none.",
            stacklevel=3,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "unmagnified_clipnorm": self.unmagnified_clipnorm,
            "skip_threshold": self.skip_threshold,
            "escaped_mass": self.escaped_mass,
        }


def warn_of_high_ranks(
    pairs: Sequence[tuple[keras.Variable, keras.Variable]],
) -> None:
    """Warns if a rank is above the width of the layer's input or outputs.

    Args:
        pairs: List of pairs of variables, A and B.
    """
    for kernel_a, kernel_b in pairs:
        width, rank = kernel_a.shape[-2:]
        units = kernel_b.shape[-1]
        if rank > min(width, units):
            warnings.warn(
                f"'{kernel_a.path}' is of rank {rank}, more than a kernel of "
                f"shape {(width, units)} can have. There LoRA-RITE divides by "
                "what is 0 but for rounding, so that its steps are not "
                f"reliable. Adapt this layer with a rank of {min(width, units)}"
                " at most, or leave it out.",
                stacklevel=3,
            )
            return


def tall(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A as it is, every second tensor, of B, transposed; or back again."""
    return [
        transpose(tensor) if index % 2 else ops.convert_to_tensor(tensor)
        for index, tensor in enumerate(tensors)
    ]
