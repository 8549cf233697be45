"""How much a loss depends on each element of some weights, while they train."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.adapter import Adapter


class Importance:
    """Two moving averages of `|weight * gradient|`: its value, how it varies.

    Args:
        optimizer: `keras.optimizers.Optimizer`, whose state the averages are.
        adapter: `Adapter`.
        rank_axes: Dict of the name of each of its weights that count to the
            axis that has the ranks.
        betas: Pair of floats, the decays of the averages.

    Reference: [AdaLoRA](https://arxiv.org/abs/2303.10512), equations 8 to 10.
    """

    sensitivity: dict[str, keras.Variable]
    uncertainty: dict[str, keras.Variable]

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        adapter: Adapter,
        rank_axes: Mapping[str, int],
        betas: tuple[float, float],
    ) -> None:
        self.weights: dict[str, keras.Variable] = {
            name: getattr(adapter, name) for name in rank_axes
        }
        self.rank_axes = rank_axes
        self.betas = betas
        self.sensitivity, self.uncertainty = (
            {
                name: optimizer.add_variable_from_reference(
                    weight, name=average
                )
                for name, weight in self.weights.items()
            }
            for average in ("sensitivity", "uncertainty")
        )

    def update(
        self, gradients: Mapping[int, Tensor], is_scored: bool | Tensor = True
    ) -> None:
        """Goes on with the averages, after an update of the optimizer.

        Args:
            gradients: Dict of the id of a variable to its gradient. A weight
                without one, because no call used it, keeps its averages.
            is_scored: Boolean or scalar boolean tensor. Whether to do so.
        """
        beta_1, beta_2 = self.betas
        for name, weight in self.weights.items():
            gradient = gradients.get(id(weight))
            if gradient is None:
                continue
            sensitivity = self.sensitivity[name]
            uncertainty = self.uncertainty[name]
            value = ops.abs(weight * gradient)
            mean = beta_1 * sensitivity.value + (1 - beta_1) * value
            deviation = ops.abs(value - mean)
            spread = beta_2 * uncertainty.value + (1 - beta_2) * deviation
            for average, new in ((sensitivity, mean), (uncertainty, spread)):
                average.assign(ops.where(is_scored, new, average.value))

    def forget(self, rank: int) -> None:
        """Sets to 0 what is known of a rank."""
        for name, rank_axis in self.rank_axes.items():
            for averages in (self.sensitivity, self.uncertainty):
                array = replicas.to_numpy(averages[name]).copy()
                np.moveaxis(array, rank_axis, 0)[rank] = 0
                averages[name].assign(array)

    def scores_of_ranks(self) -> Tensor:
        """Tensor of shape `(rank,)`: the importance of each rank.

        The product of both averages is that of an element; a rank has the sum
        over the weights of the mean of its elements.
        """
        scores = []
        for name, rank_axis in self.rank_axes.items():
            score = self.sensitivity[name] * self.uncertainty[name]
            axes = [a for a in range(len(score.shape)) if a != rank_axis]
            scores.append(ops.mean(score, axis=axes) if axes else score)
        return sum(scores)
