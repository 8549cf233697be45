"""LoRSum: a sum of matrices, as a product of two factors of a low rank.

Sums are lists of terms, pairs of a coefficient and a tuple of matrices whose
product is meant: `[(-0.1, (G,)), (-0.05, (P, Q))]` is `-0.1 G - 0.05 P Q`.
Neither such a product nor the sum is ever formed.
"""

import functools

import numpy as np
from keras import ops

from keras_fvae.optimizers.eigen import batched_eigh
from keras_fvae.optimizers.eigen import function_of
from keras_fvae.optimizers.eigen import transpose


def lorsum(lefts, rights, sums, proximal_weight, num_iterations):
    """Brings products A B of two factors nearer to `A_0 B_0 + S`.

    A_0 and B_0 are the factors given, S is a sum, and w the proximal weight.
    Each iteration solves for the left factor, then for the right one:

        A = (w A_0 + (A_0 B_0 + S) B^T) (B B^T + w I)^-1
        B = (A^T A + w I)^-1 (w B_0 + A^T (A_0 B_0 + S))

    but by how much they differ from A_0 and B_0, so that these do not have to
    come out of a product with a nearly singular inverse. For diagonal metrics,
    scale factors and sums before, and unscale the results.

    Args:
        lefts: List of tensors A_0 of shape `(d, rank)`.
        rights: List of tensors B_0 of shape `(rank, k)`.
        sums: List of sums S, of the shape `(d, k)` each.
        proximal_weight: Positive scalar, how much the factors are held where
            they are. It is at least what rounding leaves of the matrices that
            are inverted.
        num_iterations: Positive integer.

    Returns:
        The new lists of A and B.
    """
    new_lefts, new_rights = lefts, rights
    for _ in range(num_iterations):
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
        inverses = proximal_inverses(
            [ops.matmul(transpose(left), left) for left in new_lefts],
            proximal_weight,
        )
        new_rights = [
            right
            + ops.matmul(
                inverse,
                multiply(
                    transpose(new_left),
                    [*terms, (1.0, (left - new_left, right))],
                ),
            )
            for left, right, new_left, terms, inverse in zip(
                lefts, rights, new_lefts, sums, inverses
            )
        ]
    return new_lefts, new_rights


def proximal_inverses(grams, proximal_weight):
    """`(M + w I)^-1` of positive semidefinite matrices M of `(rank, rank)`."""
    inverses = []
    for eigenvalues, eigenvectors in batched_eigh(grams):
        rounding = eigenvalues.shape[-1] * float(np.finfo("float32").eps)
        weight = ops.maximum(proximal_weight, rounding * ops.max(eigenvalues))
        inverses.append(function_of(1 / (eigenvalues + weight), eigenvectors))
    return inverses


def times(terms, matrix):
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


def multiply(matrix, terms):
    """A matrix of few rows times a sum."""
    return sum(
        coefficient * functools.reduce(ops.matmul, factors, matrix)
        for coefficient, factors in terms
    )
