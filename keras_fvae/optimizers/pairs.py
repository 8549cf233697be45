"""Which of a model's variables are the two factors of one update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras


def find_pairs(
    variables: Sequence[keras.Variable], optimizer_name: str
) -> tuple[tuple[int, int], ...]:
    """Finds the factors A and B of each adapter.

    These are `kernel_a` of shape `(..., d, rank)` and `kernel_b` of shape
    `(..., rank, k)`, whose paths are the same but for that. Leading axes are
    of experts. Of adapters with the same path, as in models that were built by
    themselves, each A belongs to the B that follows it.

    Args:
        variables: List of `keras.Variable`, what trains.
        optimizer_name: String, for messages.

    Returns:
        Tuple of pairs of integers, where A and B are in the list.

    Raises:
        ValueError: If there is none; the message says what is needed.
    """
    pairs, index_of_a, lone_b = [], {}, None
    for index, variable in enumerate(variables):
        adapter, _, name = variable.path.rpartition("/")
        if name == "kernel_a":
            index_of_a[adapter] = index
        elif name == "kernel_b":
            a = index_of_a.pop(adapter, None)
            if a is not None and _are_factors(variables[a], variable):
                pairs.append((a, index))
            else:
                lone_b = variable.path
    if not pairs:
        message = (
            f"`{optimizer_name}` is for models with pairs of weights "
            "`kernel_a` and `kernel_b` that train, and found none among the "
            f"{len(variables)} variables it is to optimize. Adapt the model "
            "before, by a method that trains both, such as "
            "`keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig())`."
        )
        if lone_b is not None:
            message += (
                f" There is '{lone_b}', but no A that trains beside it: "
                "FFA-LoRA keeps A frozen, FVAE-LoRA has none. Train those by "
                "one of Keras's optimizers."
            )
        raise ValueError(message)
    return tuple(pairs)


def find_beside(
    name: str,
    variables: Sequence[keras.Variable],
    pairs: Sequence[tuple[int, int]],
) -> tuple[Any, ...]:
    """Finds the variables of a name that the adapters have beside their pairs.

    Args:
        name: String, the last part of their paths.
        variables: List of `keras.Variable`, what trains.
        pairs: What `find_pairs` returned for them.

    Returns:
        Tuple with one entry for each pair: the integer where it is in the list,
        or `None` if there is none.
    """
    indices = []
    for _, b in pairs:
        adapter = variables[b].path.rpartition("/")[0]
        path = f"{adapter}/{name}"
        # Up to the next adapter of that path.
        later = (
            a
            for a, _ in pairs
            if a > b and variables[a].path == f"{adapter}/kernel_a"
        )
        end = next(later, len(variables))
        found = (
            index
            for index in range(b + 1, end)
            if variables[index].path == path
        )
        indices.append(next(found, None))
    return tuple(indices)


def _are_factors(a, b):
    """Whether the product of two variables is an update, or one an expert."""
    return (
        len(a.shape) == len(b.shape) >= 2
        and tuple(a.shape[:-2]) == tuple(b.shape[:-2])
        and a.shape[-1] == b.shape[-2]
    )
