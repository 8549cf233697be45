"""What makes a data set hard: few examples, wrong labels.

What is tested on stays as it is.
"""

import dataclasses
import functools

import numpy as np

# By the examples of each class, how often a run sees them.
EPOCHS_OF_FEW = {5: 60, 20: 30}
WRONG_PERCENTAGES = (20, 40)


def in_all(name, dataset):
    """A data set as it is, and in each situation.

    Args:
        name: String.
        dataset: `local_data.LocalDataset`.

    Returns:
        Dict of name to `local_data.LocalDataset`.
    """
    datasets = {name: dataset}
    for number, epochs in EPOCHS_OF_FEW.items():
        datasets[f"{name}_{number}_a_class"] = dataclasses.replace(
            dataset,
            epochs=epochs,
            load=functools.partial(load_few, dataset.load, number),
        )
    for percentage in WRONG_PERCENTAGES:
        datasets[f"{name}_{percentage}_percent_wrong"] = dataclasses.replace(
            dataset,
            load=functools.partial(load_wrong, dataset.load, percentage),
        )
    return datasets


def load_few(load, number, seed):
    """A data set with a few training examples of each class.

    Args:
        load: Function, as that of a `local_data.LocalDataset`.
        number: Integer, how many.
        seed: Integer, which.

    Returns:
        What `load` returns.
    """
    parts = load(seed)
    labels = parts["train"].labels
    # `load` draws from the seed itself.
    rng = np.random.default_rng([seed, 1])
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label in np.unique(labels)
    ]
    return {**parts, "train": parts["train"].take(np.concatenate(chosen))}


def load_wrong(load, percentage, seed):
    """A data set in whose training and validation data labels are wrong.

    Args:
        load: Function, as that of a `local_data.LocalDataset`.
        percentage: Integer, how probable it is for each label.
        seed: Integer, which, and what is there in their place.

    Returns:
        What `load` returns.
    """
    parts = dict(load(seed))
    num_classes = parts["train"].labels.max() + 1
    rng = np.random.default_rng([seed, 1])
    for name in ("train", "validation"):
        labels = parts[name].labels
        is_wrong = 100 * rng.random(len(labels)) < percentage
        step = rng.integers(1, num_classes, len(labels))
        labels = np.where(is_wrong, (labels + step) % num_classes, labels)
        parts[name] = dataclasses.replace(parts[name], labels=labels)
    return parts
