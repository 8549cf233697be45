"""Splits that share nothing, and pictures as an image library resizes them."""

import re

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from examples.paper import image_classification
from examples.paper import images
from examples.paper import mock
from examples.paper import spurious_correlations

pytestmark = pytest.mark.always_one_backend

DATASETS = image_classification.DATASETS | spurious_correlations.DATASETS
SETTINGS = {"side": 16, "batch_size": 8, "num_examples": None}


def percents(split):
    """The set of (split, percent) that slices cover; none of them twice."""
    covered = []
    for part in split.split("+"):
        name, begin, end = re.fullmatch(
            r"(\w+)(?:\[(\d*)%?:(\d*)%?\])?", part
        ).groups()
        covered += [(name, p) for p in range(int(begin or 0), int(end or 100))]
    assert len({*covered}) == len(covered) > 0
    return {*covered}


@pytest.mark.parametrize("seed", [0, 1, 2, 9, 42])
@pytest.mark.parametrize("name", DATASETS)
def test_splits_share_nothing(name, seed):
    dataset = DATASETS[name]
    train, validation, test = (
        percents(dataset.split(part, seed))
        for part in ("train", "validation", "test")
    )
    assert not train & validation
    assert not (train | validation) & test
    if dataset.validation is None:
        # A tenth of each split to train on, and nothing is left over.
        assert train | validation == percents(dataset.train)
        assert 10 * len(validation) == len(train | validation)


def test_each_seed_has_validation_data_of_its_own():
    dataset = DATASETS["dtd"]
    for first, second in ((1, 2), (1, 42), (2, 42)):
        assert not percents(dataset.split("validation", first)) & percents(
            dataset.split("validation", second)
        )
    parts = [percents(dataset.split("validation", seed)) for seed in range(10)]
    assert set.union(*parts) == percents(dataset.train)
    assert sum(map(len, parts)) == len(percents(dataset.train))


def test_halves_of_the_test_split():
    dataset = image_classification.HALVES["gtsrb_halves"]
    assert dataset.split("train", 1) == "train"
    with mock.pictures(dataset):
        whole = [*dataset.read("train", 1)]
        halves = {
            (part, seed): {
                example["image"].numpy().tobytes()
                for example in dataset.read(part, seed)
            }
            for part in ("validation", "test")
            for seed in (1, 2)
        }
    for seed in (1, 2):
        validation, test = halves["validation", seed], halves["test", seed]
        assert len(validation) == len(test) == len(whole) // 2
        assert not validation & test
    assert halves["test", 1] != halves["test", 2]


def test_svhn_is_chosen_on_the_whole_test_split_as_theirs_is():
    dataset = image_classification.HALVES["svhn_halves"]
    assert dataset.split("validation", 1) == dataset.split("test", 1) == "test"


@pytest.mark.parametrize(
    "shape", [(300, 451), (451, 300), (224, 224), (32, 32)]
)
def test_pictures_are_resized_as_by_an_image_library(shape, rng):
    coarse = rng.integers(0, 256, (9, 9, 3), "uint8")
    picture = PIL.Image.fromarray(coarse).resize(
        shape[::-1], PIL.Image.Resampling.BICUBIC
    )
    height, width = shape
    scale = 224 / min(shape)
    size = round(width * scale), round(height * scale)
    expected = picture.resize(size, PIL.Image.Resampling.BILINEAR)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    expected = expected.crop((left, top, left + 224, top + 224))
    found = images.resize(tf.constant(np.asarray(picture)), 224)
    assert found.shape == (224, 224, 3)
    assert found.dtype == tf.uint8
    difference = np.abs(found.numpy().astype(int) - np.asarray(expected))
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99) <= 3


def test_grey_pictures_get_three_channels(rng):
    picture = rng.integers(0, 256, (30, 20, 1), "uint8")
    found = images.resize(tf.constant(picture), 16).numpy()
    assert found.shape == (16, 16, 3)
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("name", ["waterbirds", "celeb_a", "spuco_animals"])
def test_labels_and_groups_are_in_the_order_of_the_pictures(name):
    dataset = DATASETS[name]
    with mock.pictures(dataset):
        pairs = images.load(dataset, "test", 0, SETTINGS)
        labels, groups = images.labels_and_groups(dataset, "test", 0, SETTINGS)
        pictures, of_pictures = map(
            np.concatenate, zip(*pairs.as_numpy_iterator())
        )
    np.testing.assert_array_equal(labels, of_pictures)
    assert len(groups) == len(labels) == mock.NUM_EXAMPLES
    assert {*groups} <= {*dataset.group_names}
    assert len({*groups}) > 1
    assert pictures.dtype == np.float32
    assert -1.0 <= pictures.min() < pictures.max() <= 1.0


def test_groups_are_what_their_names_say():
    celeb_a, waterbirds = DATASETS["celeb_a"], DATASETS["waterbirds"]
    for blond in (0, 1):
        for male in (0, 1):
            example = {"attributes": {"Blond_Hair": blond, "Male": male}}
            name = celeb_a.group_names[int(celeb_a.group(example))]
            assert celeb_a.label(example) == blond
            assert ("not" in name) == (not blond)
            assert name.endswith(", man") == bool(male)
    assert waterbirds.group_names == (
        "landbird on land",
        "landbird on water",
        "waterbird on land",
        "waterbird on water",
    )


def test_training_data_are_shuffled_and_the_others_are_not():
    dataset = DATASETS["svhn"]
    with mock.pictures(dataset):

        def labels(part, seed):
            pairs = images.load(dataset, part, seed, SETTINGS)
            return np.concatenate([y for _, y in pairs.as_numpy_iterator()])

        train = labels("train", 0)
        np.testing.assert_array_equal(labels("test", 0), labels("test", 0))
        in_order, _ = images.labels_and_groups(dataset, "train", 0, SETTINGS)
    assert sorted(train) == sorted(in_order)
    assert train.tolist() != in_order.tolist()
