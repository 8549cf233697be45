"""The step of LoRA-RITE, as functions of tensors.

All matrices are tall: A of shape `(..., d, rank)`, and B transposed, of shape
`(..., k, rank)`; leading axes are of experts. All lists have what A has, then
what B has, pair by pair.

With W = U R, U an orthonormal basis of W's columns, the product of a pair is
`A (U R)^T = (A R^T) U^T` for W the transpose of B, and the other way around. So
the gradient of each factor times the inverse of the other one's R, called
unmagnified, does not depend on how the product is divided, but for the basis
U, from which the moments turn to that of the next step.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_fvae.backend.types import Tensor
from keras_fvae.optimizers.eigen import batched_eigh
from keras_fvae.optimizers.eigen import function_of
from keras_fvae.optimizers.eigen import transpose


class State(typing.NamedTuple):
    """What is kept from step to step, a list of tensors each.

    Attributes:
        bases: Of shape `(..., n, rank)`, of each factor itself.
        momentums: Of shape `(..., n, rank)`, in the basis of the partner.
        second_moments: Of shape `(..., rank, rank)`, in that basis, too.
        escaped_masses: Of shape `(..., 1, 1)`; none, to do without.
    """

    bases: list[Tensor]
    momentums: list[Tensor]
    second_moments: list[Tensor]
    escaped_masses: list[Tensor]


def step_factors(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: State,
    beta_1: Tensor,
    beta_2: Tensor,
    epsilon: float,
    unmagnified_clipnorm: float | None,
    skip_threshold: float | None,
) -> tuple[list[Tensor], State, Tensor]:
    """In which directions the factors go.

    Args:
        weights: List of tensors of shape `(..., n, rank)`.
        gradients: List of tensors of the same shapes.
        state: `State` after the step before.
        beta_1: Scalar, the decay rate of the momentums in this step.
        beta_2: Scalar, the decay rate of the second moments in this step.
        epsilon: Float, added to the roots of the second moments.
        unmagnified_clipnorm: Optional float.
        skip_threshold: Optional float.

    Returns:
        List of tensors of the same shapes, to be subtracted from the weights
        times the learning rate; the new `State`; and a tensor of booleans,
        which of all the matrices in the lists were skipped.
    """
    bases, inverses = orthonormal_bases(weights)
    inverses = of_partners(inverses)
    turns = of_partners(
        [
            ops.matmul(transpose(basis), previous)
            for basis, previous in zip(bases, state.bases)
        ]
    )
    unmagnified = [ops.matmul(g, i) for g, i in zip(gradients, inverses)]
    unmagnified, is_skipped = skip(unmagnified, skip_threshold)
    unmagnified = clip(unmagnified, unmagnified_clipnorm)

    turned = [
        ops.matmul(turn, ops.matmul(moment, transpose(turn)))
        for turn, moment in zip(turns, state.second_moments)
    ]
    second_moments = [
        symmetric((1 - beta_2) * mean_square(gradient) + beta_2 * moment)
        for gradient, moment in zip(unmagnified, turned)
    ]
    escaped_masses = [
        beta_2 * (mass + escaped)
        for mass, escaped in zip(
            state.escaped_masses,
            escape(state.second_moments, turned)
            if state.escaped_masses
            else (),
        )
    ]
    whitened = whiten(unmagnified, second_moments, escaped_masses, epsilon)
    momentums = [
        (1 - beta_1) * gradient + beta_1 * ops.matmul(momentum, transpose(turn))
        for gradient, momentum, turn in zip(whitened, state.momentums, turns)
    ]
    directions = [
        ops.matmul(momentum, transpose(inverse))
        for momentum, inverse in zip(momentums, inverses)
    ]
    new_state = State(bases, momentums, second_moments, escaped_masses)
    return directions, new_state, is_skipped


def of_partners(values: Sequence[Tensor]) -> list[Tensor]:
    """For each factor, what there is of the other one of its pair."""
    return [values[index ^ 1] for index in range(len(values))]


def corrected_decay(beta: float, step: Tensor) -> Tensor:
    """The decay rate with which a moving average needs no correction.

    That is `beta (1 - beta^(step - 1)) / (1 - beta^step)`, without the
    rounding of `1 - beta^step`.

    Args:
        beta: Float in `[0, 1)`.
        step: Scalar tensor, from 1 on.
    """
    if beta == 0:
        return 0.0
    log_beta = math.log(beta)
    return beta * ops.expm1((step - 1) * log_beta) / ops.expm1(step * log_beta)


def orthonormal_bases(
    weights: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal bases U of the columns of matrices W = U R.

    Args:
        weights: List of tensors of shape `(..., n, rank)`.

    Returns:
        The list of U, of the same shapes, and that of the pseudo-inverses of
        R, of shape `(..., rank, rank)`. In directions in which W is 0, up to
        rounding, both are 0.
    """
    grams = [ops.matmul(transpose(weight), weight) for weight in weights]
    inverses = []
    for values, vectors in batched_eigh(grams):
        rounding = values.shape[-1] * float(np.finfo("float32").eps)
        is_zero = values <= rounding * ops.max(values, axis=-1, keepdims=True)
        values = ops.where(is_zero, 1.0, values)
        scales = ops.where(is_zero, 0.0, ops.rsqrt(values))
        inverses.append(vectors * ops.expand_dims(scales, -2))
    bases = [ops.matmul(w, inverse) for w, inverse in zip(weights, inverses)]
    return bases, inverses


def skip(
    gradients: Sequence[Tensor], threshold: float | None
) -> tuple[list[Tensor], Tensor]:
    """Sets gradients to 0 whose root mean square is above a threshold.

    Args:
        gradients: List of tensors of shape `(..., n, rank)`.
        threshold: Float, or `None` to skip none.

    Returns:
        List of tensors of the same shapes, and a tensor of booleans, which of
        all the matrices in the list are 0 now.
    """
    limit = math.inf if threshold is None else threshold**2
    is_skipped = [
        ops.mean(ops.square(g), axis=(-2, -1), keepdims=True) > limit
        for g in gradients
    ]
    kept = [ops.where(skip, 0.0, g) for skip, g in zip(is_skipped, gradients)]
    return kept, ops.concatenate([ops.reshape(s, (-1,)) for s in is_skipped])


def clip(gradients: list[Tensor], norm: float | None) -> list[Tensor]:
    """Clips a list of tensors to a norm of them all; `None` leaves them."""
    if norm is None:
        return gradients
    total = ops.sqrt(sum(ops.sum(ops.square(g)) for g in gradients))
    return [g * (norm / ops.maximum(total, norm)) for g in gradients]


def mean_square(gradient: Tensor) -> Tensor:
    """`G^T G / n`, of shape `(..., rank, rank)`."""
    return ops.matmul(transpose(gradient), gradient) / gradient.shape[-2]


def symmetric(matrix: Tensor) -> Tensor:
    """A symmetric matrix again, after rounding."""
    return (matrix + transpose(matrix)) / 2


def escape(before: Sequence[Tensor], turned: Sequence[Tensor]) -> list[Tensor]:
    """How much of second moments is lost where they turn.

    Args:
        before: List of tensors of shape `(..., rank, rank)`.
        turned: List of tensors of the same shapes.

    Returns:
        List of tensors of shape `(..., 1, 1)`: the largest loss of an
        eigenvalue, but no more than that of the trace.
    """
    eigenvalues = [values for values, _ in batched_eigh([*before, *turned])]
    losses = [
        old - new
        for old, new in zip(
            eigenvalues[: len(before)], eigenvalues[len(before) :]
        )
    ]
    escaped = [
        ops.minimum(ops.max(loss, axis=-1), ops.sum(loss, axis=-1))
        for loss in losses
    ]
    return [
        ops.expand_dims(ops.maximum(mass, 0.0), (-2, -1)) for mass in escaped
    ]


def whiten(
    gradients: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    escaped_masses: Sequence[Tensor],
    epsilon: float,
) -> list[Tensor]:
    """`G (V + escaped_mass I)^(-1/2)`, with epsilon added to the roots.

    Args:
        gradients: List of tensors of shape `(..., n, rank)`.
        second_moments: List of tensors of shape `(..., rank, rank)`.
        escaped_masses: List of tensors of shape `(..., 1, 1)`, or empty.
        epsilon: Float.
    """
    if escaped_masses:
        second_moments = [
            moment + mass * ops.eye(moment.shape[-1], dtype=moment.dtype)
            for moment, mass in zip(second_moments, escaped_masses)
        ]
    return [
        ops.matmul(
            gradient, function_of(1 / (ops.sqrt(values) + epsilon), vectors)
        )
        for gradient, (values, vectors) in zip(
            gradients, batched_eigh(second_moments)
        )
    ]
