"""The steps of OPLoRA: of all pairs of a model together, as pure functions.

A list of pairs `(A, B)` is of tensors of shape `(d, rank)` and `(rank, k)`; the
gradients are those of the kernels, G of shape `(d, k)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_fvae.backend.types import Tensor
from keras_fvae.optimizers.eigen import transpose
from keras_fvae.optimizers.lorsum import lorsum
from keras_fvae.optimizers.lorsum import proximal_inverses
from keras_fvae.optimizers.lorsum import scaled_lorsum


def step(
    pairs: Sequence[tuple[Tensor, Tensor]],
    momentums: Sequence[tuple[Tensor, Tensor]],
    gradients: Sequence[Tensor],
    coefficients: tuple[float, float],
    learning_rate: Tensor,
    proximal_weight: float | Tensor,
    num_iterations: int,
    scales: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Brings A B near to `A B - learning_rate * (a G + b M)`.

    And then M to `a G + b M`, which is a product of two factors as well.

    Args:
        pairs: List of pairs.
        momentums: List of pairs whose products are M; empty without momentum.
        gradients: List of tensors.
        coefficients: Pair of floats `(a, b)`.
        learning_rate: Scalar.
        proximal_weight: Positive scalar.
        num_iterations: Non-negative integer.
        scales: List of what the rows and the columns of `A B` weigh, as of
            `scaled_lorsum`. `None` (default) means that all weigh the same.

    Returns:
        The new lists of pairs and of momentums.
    """
    of_gradient, of_momentum = coefficients
    sums: list[list[tuple[Any, tuple[Tensor, ...]]]] = [
        [(-learning_rate * of_gradient, (g,))] for g in gradients
    ]
    for terms, momentum in zip(sums, momentums):
        terms.append((-learning_rate * of_momentum, momentum))
    sums += [
        [(of_gradient, (gradient,)), (of_momentum - 1.0, momentum)]
        for gradient, momentum in zip(gradients, momentums)
    ]
    lefts, rights = zip(*pairs, *momentums)
    how = proximal_weight, num_iterations
    if scales is None:
        stepped = [*zip(*lorsum(lefts, rights, sums, *how))]
    else:
        # The momentum is a sum of gradients, whatever the scales are by then.
        scales = [*scales, *((1.0, 1.0) for _ in momentums)]
        stepped = [*zip(*scaled_lorsum(lefts, rights, sums, scales, *how))]
    return stepped[: len(pairs)], stepped[len(pairs) :]


def projected_step(
    pairs: Sequence[tuple[Tensor, Tensor]],
    former_pairs: Sequence[tuple[Tensor, Tensor]],
    momentums: Sequence[tuple[Tensor, Tensor]],
    gradients: Sequence[Tensor],
    momentum: float,
    learning_rate: Tensor,
    proximal_weight: float | Tensor,
    num_iterations: int,
) -> tuple[
    list[tuple[Tensor, Tensor]],
    list[tuple[Tensor, Tensor]],
    list[tuple[Tensor, Tensor]],
]:
    """Brings A B near to `A B - learning_rate * G`, then on by a momentum.

    A momentum `(M_A, M_B)` stands for `M_A B' + A' M_B`, with the factors A'
    and B' that it was made at. Each part is carried to the present factors by
    least squares, then added to that of G.

    Args:
        pairs: List of pairs.
        former_pairs: List of pairs `(A', B')`.
        momentums: List of pairs `(M_A, M_B)`, of the shapes of A and B.
        gradients: List of tensors.
        momentum: Float, how much is kept of what is carried.
        learning_rate: Scalar.
        proximal_weight: Positive scalar.
        num_iterations: Non-negative integer.

    Returns:
        The new lists of pairs, former pairs and momentums.
    """
    sums = [[(-learning_rate, (gradient,))] for gradient in gradients]
    lefts, rights = zip(*pairs)
    middle = [
        *zip(*lorsum(lefts, rights, sums, proximal_weight, num_iterations))
    ]
    inverses = proximal_inverses(
        [
            *(ops.matmul(b, transpose(b)) for _, b in middle),
            *(ops.matmul(transpose(a), a) for a, _ in middle),
        ],
        proximal_weight,
    )
    new_pairs, new_momentums = [], []
    for (a, b), (former_a, former_b), (
        of_a,
        of_b,
    ), g, of_rows, of_columns in zip(
        middle,
        former_pairs,
        momentums,
        gradients,
        inverses[: len(pairs)],
        inverses[len(pairs) :],
    ):
        # The least squares of `. B` and of `A .`, for what is in their places.
        after_b = ops.matmul(transpose(b), of_rows)
        before_a = ops.matmul(of_columns, transpose(a))
        carried_a = momentum * ops.matmul(of_a, ops.matmul(former_b, after_b))
        carried_b = momentum * ops.matmul(ops.matmul(before_a, former_a), of_b)
        new_momentums.append(
            (
                carried_a + ops.matmul(g, after_b),
                carried_b + ops.matmul(before_a, g),
            )
        )
        new_pairs.append(
            (a - learning_rate * carried_a, b - learning_rate * carried_b)
        )
    return new_pairs, middle, new_momentums
