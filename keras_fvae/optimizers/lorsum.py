"""LoRSum: a sum of matrices, as a product of two factors of a low rank.

Sums are lists of terms, pairs of a coefficient and a tuple of matrices whose
product is meant: `[(-0.1, (G,)), (-0.05, (P, Q))]` is `-0.1 G - 0.05 P Q`.
Neither such a product nor the sum is ever formed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

import numpy as np
from keras import ops

from keras_fvae.backend.types import Tensor
from keras_fvae.optimizers.eigen import batched_eigh
from keras_fvae.optimizers.eigen import function_of
from keras_fvae.optimizers.eigen import transpose

Sum: TypeAlias = Sequence[tuple[Any, Sequence[Tensor]]]


def lorsum(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    sums: Sequence[Sum],
    proximal_weight: float | Tensor,
    num_iterations: int,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Brings products A B of two factors nearer to `A_0 B_0 + S`.

    A_0 and B_0 are the factors given, S is a sum, and w the proximal weight.
    Each iteration solves for the left factor, then for the right one:

        A = (w A_0 + (A_0 B_0 + S) B^T) (B B^T + w I)^-1
        B = (A^T A + w I)^-1 (w B_0 + A^T (A_0 B_0 + S))

    but by how much they differ from A_0 and B_0, so that these do not have to
    come out of a product with a nearly singular inverse.

    Args:
        lefts: List of tensors A_0 of shape `(d, rank)`.
        rights: List of tensors B_0 of shape `(rank, k)`.
        sums: List of sums S, of the shape `(d, k)` each.
        proximal_weight: Positive scalar, how much the factors are held where
            they are. It is at least what rounding leaves of the matrices that
            are inverted.
        num_iterations: Non-negative integer. With 0 both factors are solved
            for once, each with the other one as given.

    Returns:
        The new lists of A and B.
    """
    new_lefts, new_rights = lefts, rights
    for _ in range(max(num_iterations, 1)):
        inverses = proximal_inverses(
            [ops.matmul(right, transpose(right)) for right in new_rights],
            proximal_weight,
        )
        new_lefts = [
            left
            + ops.matmul(
                times(
                    [*terms, (1.0, (left, right - new_right))],
                    transpose(new_right),
                ),
                inverse,
            )
            for left, right, new_right, terms, inverse in zip(
                lefts, rights, new_rights, sums, inverses
            )
        ]
        known_lefts = new_lefts if num_iterations else lefts
        inverses = proximal_inverses(
            [ops.matmul(transpose(left), left) for left in known_lefts],
            proximal_weight,
        )
        new_rights = [
            right
            + ops.matmul(
                inverse,
                multiply(
                    transpose(known_left),
                    [*terms, (1.0, (left - known_left, right))],
                ),
            )
            for left, right, known_left, terms, inverse in zip(
                lefts, rights, known_lefts, sums, inverses
            )
        ]
    return new_lefts, new_rights


def scaled_lorsum(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    sums: Sequence[Sum],
    scales: Sequence[tuple[Tensor, Tensor]],
    proximal_weight: float | Tensor,
    num_iterations: int,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """LoRSum that is near in a norm of its own, `|rows * . * columns|`.

    So it is LoRSum of `rows * A_0` and `B_0 * columns`. Sums are of gradients,
    which go the other way: they enter as `S / rows / columns`.

    Args:
        lefts: List of tensors A_0 of shape `(d, rank)`.
        rights: List of tensors B_0 of shape `(rank, k)`.
        sums: List of sums S, of the shape `(d, k)` each.
        scales: List of pairs of positive tensors: what the rows weigh, of shape
            `(d, 1)`, and the columns, of shape `(k,)`.
        proximal_weight: As of `lorsum`.
        num_iterations: As of `lorsum`.

    Returns:
        The new lists of A and B.
    """
    rows, columns = zip(*scales)
    lefts, rights = lorsum(
        [left * scale for left, scale in zip(lefts, rows)],
        [right * scale for right, scale in zip(rights, columns)],
        [unscale(terms, *pair) for terms, pair in zip(sums, scales)],
        proximal_weight,
        num_iterations,
    )
    return (
        [left / scale for left, scale in zip(lefts, rows)],
        [right / scale for right, scale in zip(rights, columns)],
    )


def unscale(terms: Sum, rows: Tensor, columns: Tensor) -> Sum:
    """A sum whose rows and columns are divided by what they weigh."""
    unscaled = []
    for coefficient, factors in terms:
        parts = [*factors]
        parts[0] = parts[0] / rows
        parts[-1] = parts[-1] / columns
        unscaled.append((coefficient, parts))
    return unscaled


def proximal_inverses(
    grams: Sequence[Tensor], proximal_weight: float | Tensor
) -> list[Tensor]:
    """`(M + w I)^-1` of positive semidefinite matrices M of `(rank, rank)`."""
    inverses = []
    for eigenvalues, eigenvectors in batched_eigh(grams):
        rounding = eigenvalues.shape[-1] * float(np.finfo("float32").eps)
        weight = ops.maximum(proximal_weight, rounding * ops.max(eigenvalues))
        inverses.append(function_of(1 / (eigenvalues + weight), eigenvectors))
    return inverses


def times(terms: Sum, matrix: Tensor) -> Tensor:
    """A sum times a matrix of few columns."""
    return sum(
        coefficient
        * functools.reduce(
            lambda product, factor: ops.matmul(factor, product),
            reversed(factors),
            matrix,
        )
        for coefficient, factors in terms
    )


def multiply(matrix: Tensor, terms: Sum) -> Tensor:
    """A matrix of few rows times a sum."""
    return sum(
        coefficient * functools.reduce(ops.matmul, factors, matrix)
        for coefficient, factors in terms
    )
