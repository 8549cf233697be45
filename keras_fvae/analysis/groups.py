"""Accuracy by group: whether a model leans on what need not hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class GroupAccuracy:
    """What `evaluate_groups` found; `print` it to read it as a table.

    Args:
        accuracies: Dict of group to float, the accuracy on its examples.
        counts: Dict of group to integer, how many examples it has.
    """

    accuracies: dict[int | str, float]
    counts: dict[int | str, int]

    @property
    def mean(self) -> float:
        """Float, the accuracy on all examples."""
        right = sum(
            self.accuracies[group] * count
            for group, count in self.counts.items()
        )
        return right / sum(self.counts.values())

    @property
    def worst_group(self) -> int | str:
        """The group with the lowest accuracy."""
        return min(self.accuracies, key=self.accuracies.__getitem__)

    @property
    def worst(self) -> float:
        """Float, the accuracy of the worst group."""
        return self.accuracies[self.worst_group]

    @property
    def gap(self) -> float:
        """Float, by how much the worst group is below the mean."""
        return self.mean - self.worst

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as a dict that JSON can hold."""
        return {
            "mean": self.mean,
            "worst": self.worst,
            "worst_group": str(self.worst_group),
            "gap": self.gap,
            "accuracies": {str(g): a for g, a in self.accuracies.items()},
            "counts": {str(g): n for g, n in self.counts.items()},
        }

    def __str__(self) -> str:
        rows = [
            (str(group), f"{accuracy:.3f}", f"{self.counts[group]:,}")
            for group, accuracy in self.accuracies.items()
        ]
        rows += [
            ("mean", f"{self.mean:.3f}", f"{sum(self.counts.values()):,}"),
            (f"worst ({self.worst_group})", f"{self.worst:.3f}", ""),
            ("gap", f"{self.gap:.3f}", ""),
        ]
        rows.insert(0, ("group", "accuracy", "examples"))
        width = max(len(row[0]) for row in rows)
        return "\n".join(
            f"{name:<{width}}  {accuracy:>8}  {count:>8}".rstrip()
            for name, accuracy, count in rows
        )


def evaluate_groups(
    model: keras.Model,
    x: Any,
    y: npt.ArrayLike,
    groups: npt.ArrayLike,
    batch_size: int | None = None,
) -> GroupAccuracy:
    """The accuracy of a classifier in each group of examples.

    A group is often a class together with what goes with it in training and
    need not elsewhere, such as its background: a model that leans on the
    background fails in the groups that are rare.

    Args:
        model: `keras.Model`, any classifier. Its outputs are scores of shape
            `(examples, classes)`; of shape `(examples, 1)` or `(examples,)`
            they are logits of the class 1, or probabilities if the last
            activation is a sigmoid.
        x: Anything that `model.predict` takes, in a fixed order.
        y: Array of shape `(examples,)`, the classes as integers.
        groups: Array of shape `(examples,)`, the group of each example: an
            integer or a string.
        batch_size: Optional integer, as in `model.predict`.

    Returns:
        `keras_fvae.analysis.groups.GroupAccuracy`: the accuracy in each group,
        the mean over examples, the worst group, and the gap between the two.

    Raises:
        ValueError: If `y` and `groups` have not one value for each prediction,
            an integer or, for a group, a string, or the predictions are not
            one row of scores for each example.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Softmax()])
    >>> x = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> groups = ["day", "day", "night", "night"]
    >>> result = keras_fvae.evaluate_groups(model, x, [0, 0, 1, 1], groups)
    >>> result.mean, result.worst_group, result.worst
    (0.75, 'night', 0.5)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 4: worst-group accuracy.
    """
    y, groups = _check_labels(y, groups)
    scores = model.predict(x, batch_size=batch_size, verbose=0)
    predicted = _classes(model, scores)
    if predicted.shape != y.shape:
        raise ValueError(
            "`x` and `y` must have as many examples. Received: "
            f"{len(predicted)} in `x`, {len(y)} in `y`."
        )
    right = predicted == y
    names = np.unique(groups)
    return GroupAccuracy(
        accuracies={n.item(): float(right[groups == n].mean()) for n in names},
        counts={n.item(): int((groups == n).sum()) for n in names},
    )


class WorstGroupAccuracy(keras.callbacks.Callback):
    """Logs the worst group's accuracy at the end of each epoch.

    It adds `worst_group_accuracy` and `mean_group_accuracy` to the logs, so
    that `ModelCheckpoint` and `EarlyStopping` can go by them, with
    `monitor="worst_group_accuracy", mode="max"`. Put it before them in the
    list of callbacks.

    Args:
        x: What to evaluate on, as in `keras_fvae.evaluate_groups`: validation
            data, apart from what the model is trained and tested on.
        y: Array of shape `(examples,)`, the classes as integers.
        groups: Array of shape `(examples,)`, the group of each example.
        batch_size: Optional integer, as in `model.predict`.

    Raises:
        ValueError: As `keras_fvae.evaluate_groups` does.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> x, y, groups = np.ones((8, 4)), np.arange(8) % 2, np.arange(8) // 4
    >>> model.compile("adamw", "sparse_categorical_crossentropy")
    >>> history = model.fit(
    ...     x,
    ...     y,
    ...     callbacks=[keras_fvae.WorstGroupAccuracy(x, y, groups)],
    ...     verbose=0,
    ... )
    >>> history.history["worst_group_accuracy"]
    [0.5]

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 4: worst-group accuracy.
    """

    y: np.ndarray
    groups: np.ndarray

    def __init__(
        self,
        x: Any,
        y: npt.ArrayLike,
        groups: npt.ArrayLike,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.x = x
        self.y, self.groups = _check_labels(y, groups)
        self.batch_size = batch_size

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        logs = {} if logs is None else logs
        result = evaluate_groups(
            self.model, self.x, self.y, self.groups, self.batch_size
        )
        logs["worst_group_accuracy"] = result.worst
        logs["mean_group_accuracy"] = result.mean


def _check_labels(
    y: npt.ArrayLike, groups: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    y, groups = np.asarray(y), np.asarray(groups)
    if y.ndim != 1 or len(y) == 0 or groups.shape != y.shape:
        raise ValueError(
            "`y` and `groups` must have one value for each example, so the "
            f"same shape (examples,). Received: y of shape {y.shape}, groups "
            f"of shape {groups.shape}."
        )
    if y.dtype.kind not in "biu" or groups.dtype.kind not in "biuSU":
        raise ValueError(
            "`y` must be integers, and `groups` integers or strings. "
            f"Received: y of dtype {y.dtype}, groups of dtype {groups.dtype}."
        )
    return y, groups


def _classes(model, scores):
    """The class that each row of scores is highest for."""
    if not isinstance(scores, np.ndarray) or scores.ndim not in (1, 2):
        raise ValueError(
            f"Model '{model.name}' must predict one row of scores for each "
            "example, of shape (examples, classes). Received: "
            f"{keras.tree.map_structure(np.shape, scores)}."
        )
    if scores.ndim == 2 and scores.shape[1] > 1:
        return scores.argmax(axis=1)
    activation = getattr(model.layers[-1], "activation", None)
    threshold = 0.5 if activation is keras.activations.sigmoid else 0.0
    return (scores.reshape(-1) > threshold).astype(int)
