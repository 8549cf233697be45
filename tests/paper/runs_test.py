"""Each table at its tiny size: every line of the way but the download."""

import json

import pytest

from examples.paper import harness
from examples.paper import image_classification
from examples.paper import images
from examples.paper import local
from examples.paper import mock
from examples.paper import phoneme_recognition
from examples.paper import spurious_correlations
from examples.paper import tables

# All of them in the long tail.
ONE_METHOD = ("--method", "fvae_lora")


def run(module, folder, *arguments):
    """Runs a table; returns the results of the table itself."""
    harness.main(
        module.TABLE,
        module.__doc__,
        ["--size", "tiny", "--output", str(folder), *arguments],
    )
    paths = sorted(folder.glob(f"{module.TABLE.name}/tiny/*/*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    for result in found:
        assert result["status"] == "done", result
        assert result["cost"]["step_seconds"] > 0
        assert result["cost"]["peak_memory_mib"] > 100
        is_adapted = result["run"]["method"] not in (
            "head_only",
            "full_fine_tuning",
        )
        assert (result["cost"]["inference_parameters"] > 0) == is_adapted
    return [result for result in found if not result["run"]["is_trial"]]


def check_all_methods(module, folder, dataset):
    """Each method once, as the authors would, and all of it as a table."""
    found = run(module, folder, "--dataset", dataset, "--authors")
    assert [*sorted(module.TABLE.methods)] == sorted(
        result["run"]["method"] for result in found
    )
    tables.main(
        [
            "--size", "tiny", "--table", module.TABLE.name,
            "--output", str(folder),
        ]
    )  # fmt: skip
    text = (folder / "tables.md").read_text()
    for label in ("LoRA", "FVAE-LoRA as published"):
        assert text.count(f"\n| {label} |") == 1


@pytest.mark.one_backend
def test_images(tmp_path):
    dataset = ("--dataset", "eurosat")
    (result,) = run(image_classification, tmp_path, *dataset, *ONE_METHOD)
    assert 0 <= result["test"]["accuracy"] <= 1
    accuracies = result["history"]["val_accuracy"]
    assert result["validation_score"] == max(accuracies)


@pytest.mark.one_backend
def test_groups(tmp_path):
    dataset = ("--dataset", "waterbirds")
    (result,) = run(spurious_correlations, tmp_path, *dataset, *ONE_METHOD)
    worst = result["history"]["worst_group_accuracy"]
    assert result["validation_score"] == max(worst)
    by_worst, by_mean = result["test"].values()
    assert sum(by_worst["counts"].values()) == 48
    assert by_worst["worst"] == min(by_worst["accuracies"].values())
    assert by_mean.keys() == by_worst.keys()


@pytest.mark.one_backend
def test_phonemes(tmp_path):
    (result,) = run(phoneme_recognition, tmp_path, *ONE_METHOD)
    rates = result["history"]["phoneme_error_rate"]
    assert result["validation_score"] == -min(rates)
    assert result["test"]["phoneme_error_rate"] > 0


@pytest.mark.one_backend
def test_local_data(tmp_path):
    dataset = ("--dataset", "spurious_digits")
    (result,) = run(local, tmp_path, *dataset, *ONE_METHOD)
    assert result["validation_score"] == result["validation"]["worst"]
    assert result["test"]["worst"] <= result["test"]["accuracy"]
    assert 0 <= result["test"]["foreign_auroc"] <= 1
    # A temperature changes no order.
    assert result["calibrated"]["accuracy"] == result["test"]["accuracy"]
    accuracies = result["history"]["val_accuracy"]
    assert result["validation"]["accuracy"] == pytest.approx(max(accuracies))


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_images_by_all_methods(tmp_path):
    check_all_methods(image_classification, tmp_path, "eurosat")


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_groups_by_all_methods(tmp_path):
    check_all_methods(spurious_correlations, tmp_path, "spuco_animals")


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_phonemes_by_all_methods(tmp_path):
    check_all_methods(phoneme_recognition, tmp_path, "timit")


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_local_data_by_all_methods(tmp_path):
    check_all_methods(local, tmp_path, "digits")


@pytest.mark.slow
@pytest.mark.always_one_backend
@pytest.mark.parametrize(
    "module",
    [image_classification, spurious_correlations, phoneme_recognition, local],
)
def test_all_data_sets(module, tmp_path):
    names = [*module.TABLE.datasets]
    found = run(
        module, tmp_path, "--authors", "--method", "lora", "--dataset", *names
    )
    assert sorted(result["run"]["dataset"] for result in found) == sorted(names)


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("method", ["lora", "fvae_lora", "full_fine_tuning"])
def test_pictures_are_learned(method):
    """Where there is something to learn, the way from disk to test keeps it."""
    settings = image_classification.authors_settings(method)
    settings |= {"learning_rate": 2e-2, "global_clipnorm": 1.0}
    size = image_classification.SIZES["tiny"].settings
    result = image_classification.run(
        image_classification.DATASETS["svhn"],
        method,
        settings,
        seed=1,
        size=size
        | {
            "num_examples": None,
            "epochs": 40,
            "patience": None,
            "backup": None,
        },
    )
    assert result["test"]["accuracy"] > 0.3


@pytest.mark.one_backend
def test_without_a_stand_in_the_data_are_asked_for(tmp_path, monkeypatch):
    """By hand, with the command that gets them; no run is wasted on it."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    dataset = image_classification.DATASETS["gtsrb"]
    with pytest.raises(harness.MissingDataError, match="hf download tanganke"):
        images.load_parts(
            dataset, 1, image_classification.SIZES["full"].settings
        )
    with mock.pictures(dataset):
        assert len(images.load_parts(dataset, 1, image_classification.FULL))
