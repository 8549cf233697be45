"""Eigenvalues of the many small matrices of a model's pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from keras import ops

from keras_fvae.backend.types import Tensor


def batched_eigh(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors of positive semidefinite matrices.

    Those of one size go in one call, because a GPU takes about as long for a
    single one.

    Args:
        matrices: List of tensors of shape `(..., r, r)`.

    Returns:
        List of pairs: the eigenvalues, of shape `(..., r)`, of which rounding
        makes none negative, and the eigenvectors, the columns of a tensor of
        shape `(..., r, r)`.
    """
    results = {}
    for size in sorted({matrix.shape[-1] for matrix in matrices}):
        chosen = [i for i, m in enumerate(matrices) if m.shape[-1] == size]
        batches = [tuple(matrices[i].shape[:-2]) for i in chosen]
        counts = [math.prod(batch) for batch in batches]
        ends = [*itertools.accumulate(counts)]
        eigenvalues, eigenvectors = ops.eigh(
            ops.concatenate(
                [ops.reshape(matrices[i], (-1, size, size)) for i in chosen]
            )
        )
        eigenvalues = ops.maximum(eigenvalues, 0.0)
        for i, batch, count, end in zip(chosen, batches, counts, ends):
            own = slice(end - count, end)
            results[i] = (
                ops.reshape(eigenvalues[own], (*batch, size)),
                ops.reshape(eigenvectors[own], (*batch, size, size)),
            )
    return [results[i] for i in range(len(matrices))]


def function_of(eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """The symmetric matrices with these eigenvalues and eigenvectors."""
    return ops.matmul(
        eigenvectors * ops.expand_dims(eigenvalues, -2), transpose(eigenvectors)
    )


def transpose(matrix: Tensor) -> Tensor:
    """A tensor of shape `(..., n, m)`, of one of shape `(..., m, n)`."""
    return ops.swapaxes(matrix, -1, -2)
