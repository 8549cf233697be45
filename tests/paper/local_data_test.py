"""The data of the local table, and what makes them hard."""

import numpy as np
import pytest

from examples.paper import local
from examples.paper import situations

pytestmark = pytest.mark.always_one_backend

SEED = 3


def load(name, seed=SEED):
    return local.TABLE.datasets[name].load(seed)


@pytest.mark.parametrize("name", ["digits", "spurious_digits", "docstrings"])
def test_parts(name):
    parts, again, other = load(name), load(name), load(name, SEED + 1)
    assert [*parts] == ["train", "validation", "test", "foreign"]
    for part in ("train", "validation", "test"):
        labels = parts[part].labels
        np.testing.assert_array_equal(labels, again[part].labels)
        first, *_ = flat(parts[part].x)
        assert len(first) == len(labels)
    assert (parts["train"].labels != other["train"].labels).any()
    # Each class is there to learn.
    assert {*parts["test"].labels} <= {*parts["train"].labels}
    assert parts["foreign"].labels is None
    own, foreign = flat(parts["test"].x), flat(parts["foreign"].x)
    assert [x.shape[1:] for x in own] == [x.shape[1:] for x in foreign]


def flat(x):
    return [*x.values()] if isinstance(x, dict) else [x]


def test_colours_go_with_the_label_in_training_alone():
    parts = load("spurious_digits")
    for name, expected in (("train", 0.95), ("validation", 0.5), ("test", 0.5)):
        groups = [group.split(", ") for group in parts[name].groups]
        agrees = [
            (kind == "5-9") == (color == "green") for kind, color in groups
        ]
        assert np.mean(agrees) == pytest.approx(expected, abs=0.04)
        red, green, _ = np.moveaxis(parts[name].x.max((1, 2)), 1, 0)
        assert (green > red).tolist() == [
            color == "green" for _, color in groups
        ]


@pytest.mark.parametrize("number", [5, 20])
def test_few_examples(number):
    parts, whole = load(f"digits_{number}_a_class"), load("digits")
    labels = parts["train"].labels
    assert np.bincount(labels).tolist() == [number] * 10
    pictures = {picture.tobytes(): y for picture, y in pairs(whole["train"])}
    assert all(pictures[p.tobytes()] == y for p, y in pairs(parts["train"]))
    assert len({p.tobytes() for p, _ in pairs(parts["train"])}) > 9 * number
    for name in ("validation", "test"):
        np.testing.assert_array_equal(parts[name].x, whole[name].x)


def pairs(part):
    return zip(part.x, part.labels)


@pytest.mark.parametrize("percentage", [20, 40])
def test_wrong_labels(percentage):
    whole = load("docstrings")
    parts = situations.load_wrong(lambda seed: whole, percentage, SEED)
    for name, atol in (("train", 0.05), ("validation", 0.1)):
        is_wrong = parts[name].labels != whole[name].labels
        assert is_wrong.mean() == pytest.approx(percentage / 100, abs=atol)
        assert {*parts[name].labels} <= {*whole[name].labels}
        assert parts[name].x is whole[name].x
    assert parts["test"] is whole["test"]
    again = situations.load_wrong(lambda seed: whole, percentage, SEED)
    np.testing.assert_array_equal(parts["train"].labels, again["train"].labels)


def test_every_situation_is_a_data_set():
    for name in ("digits", "docstrings"):
        assert {*situations.in_all(name, local.TABLE.datasets[name])} <= {
            *local.TABLE.datasets
        }
