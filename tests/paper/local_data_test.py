"""The data of the local table, and what makes them hard."""

import collections

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import keras_fvae
from examples import texts
from examples.paper import digit_pretraining
from examples.paper import local
from examples.paper import local_data
from examples.paper import local_digits
from examples.paper import local_emoji
from examples.paper import local_resnet
from examples.paper import local_texts
from examples.paper import situations

pytestmark = pytest.mark.always_one_backend

SEED = 3


def load(name, seed=SEED):
    return local.TABLE.datasets[name].load(seed)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "spurious_digits",
        "resnet_digits",
        "docstrings",
        pytest.param("marked_docstrings", marks=pytest.mark.slow),
        pytest.param("kinds", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.slow
def test_markers_go_with_the_class_in_training_alone():
    parts, plain = load("marked_docstrings"), load("docstrings")
    assert len(parts["train"].labels) == len(plain["train"].labels)
    own, other = local_texts.read_marked_docstrings(0)
    own_rows = {row.tobytes() for row in own.x["lower_blocks"]}
    is_own = [r.tobytes() in own_rows for r in parts["train"].x["lower_blocks"]]
    assert np.mean(is_own) == pytest.approx(0.9, abs=0.03)
    for name in ("validation", "test"):
        groups, counts = np.unique(parts[name].groups, return_counts=True)
        assert groups.tolist() == ["marker of another", "marker of the class"]
        assert counts[0] == counts[1] == len(plain[name].labels)
    # One that is of another class is never that of the class.
    for one, another in zip(own.x["lower_blocks"], other.x["lower_blocks"]):
        assert (one != another).any()


@pytest.mark.slow
def test_kinds_are_tested_on_other_packages():
    train, test = texts.read_kinds()
    for part, number in ((train, 320), (test, 106)):
        kinds = collections.Counter(kind for _, kind in part)
        assert kinds == dict.fromkeys(("module", "class", "function"), number)
    assert not {text for text, _ in train} & {text for text, _ in test}


def test_glosses():
    dataset = local.TABLE.datasets["glosses"]
    with dataset.stand_in():
        parts = dataset.load(SEED)
    del parts["foreign"]
    sizes = {name: len(part.labels) for name, part in parts.items()}
    # A quarter is tested on, and a sixth of the rest validated on.
    assert sizes == {"train": 30, "validation": 6, "test": 12}
    assert {*parts["train"].labels} == {0, 1, 2, 3}


def test_emoji(monkeypatch):
    monkeypatch.setattr(local_data, "NUM_PATCHES", 1)
    dataset = local.TABLE.datasets["emoji"]
    with dataset.stand_in():
        parts = dataset.load(SEED)
    own, other = local_emoji.read_emoji().values()
    # Of 48 there are 42, each of which has other features.
    number_of = {row.tobytes(): i for i, row in enumerate(own.x)}
    number_of |= {row.tobytes(): i for i, row in enumerate(other.x)}
    assert len(number_of) == 2 * 42
    numbers = {
        name: [number_of[row.tobytes()] for row in parts[name].x]
        for name in ("train", "validation", "test")
    }
    # The same emoji of both designers, and none of those to train on.
    assert numbers["test"] == 2 * [*range(10)]
    assert sorted(numbers["train"] + numbers["validation"]) == [*range(10, 42)]
    assert len(numbers["validation"]) == 5
    for name in numbers:
        labels = own.labels[numbers[name]]
        np.testing.assert_array_equal(parts[name].labels, labels)
    names = ["same designer", "other designer"]
    assert parts["test"].groups.tolist() == [*np.repeat(names, 10)]
    np.testing.assert_array_equal(parts["test"].x[10:], other.x[:10])
    assert parts["foreign"].x.shape[1:] == own.x.shape[1:]


def test_emoji_are_on_white():
    picture = np.array([[[200, 100, 0, opacity] for opacity in (255, 0, 51)]])
    np.testing.assert_allclose(
        local_emoji.on_white(picture),
        [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]],
    )


@pytest.mark.parametrize(
    "name, num_layers",
    [
        # Of each bottleneck two, and one beside it.
        ("resnet_digits", 6),
        # Of each bottleneck one more, and the first of all.
        ("resnet_digits_all_convolutions", 9),
    ],
)
def test_convolutions_of_the_resnet(name, num_layers):
    dataset = local.TABLE.datasets[name]
    model = dataset.make_classifier(SEED)
    picture = dataset.load(SEED)["test"].x[:1]
    assert model.predict(picture, verbose=0).shape == (1, 10)
    summary = keras_fvae.enable_adapter(
        model.backbone, keras_fvae.LoRAConfig(2), dataset.target_layer_names
    )
    assert len(summary.layers) == num_layers


@pytest.mark.parametrize("name", ["digits", "resnet_digits"])
def test_base_model_knows_digits(name):
    """What it tells of a digit that stands upright, by a linear classifier."""
    model = local.TABLE.datasets[name].make_classifier(SEED)
    features, labels = [], []
    for pictures, digits in local_digits.read_digits():
        pictures = local_digits.to_rgb(pictures)
        if name == "resnet_digits":
            pictures = local_resnet.enlarge(pictures)
        outputs = model.backbone.predict(pictures, verbose=0)
        features.append(outputs.mean(axis=tuple(range(1, outputs.ndim - 1))))
        labels.append(digits)
    probe = LogisticRegression(max_iter=2000).fit(features[0], labels[0])
    assert probe.score(features[1], labels[1]) > 0.9


def test_pretraining_writes_weights(tmp_path, capsys):
    digit_pretraining.main(["--epochs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for file in (local_digits.VIT_WEIGHTS, local_resnet.RESNET_WEIGHTS):
        assert file.name in printed
    model = local_digits.make_vit_classifier()
    embedding = model.backbone.get_weights()[0].copy()
    model.backbone.load_weights(tmp_path / local_digits.VIT_WEIGHTS.name)
    assert np.abs(model.backbone.get_weights()[0] - embedding).max() > 1e-3


def test_version_is_of_the_weights(tmp_path):
    weights = tmp_path / "vit.weights.h5"
    weights.write_bytes(local_digits.VIT_WEIGHTS.read_bytes())
    version = local.TABLE.datasets["digits"].version
    assert local_digits.version(weights) == version
    weights.write_bytes(b"other weights")
    assert local_digits.version(weights) != version


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
    for name in ("digits", "docstrings", "glosses"):
        assert {*situations.in_all(name, local.TABLE.datasets[name])} <= {
            *local.TABLE.datasets
        }
