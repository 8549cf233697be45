"""Methods beside each other, seed by seed."""

import numpy as np
import pytest

from examples.paper import comparison
from examples.paper import results

pytestmark = pytest.mark.always_one_backend


def write(folder, method, seed, accuracy, dataset="digits", draws=False):
    run = results.Run("local", "full", dataset, method, seed)
    test = {
        "accuracy": accuracy,
        "negative_log_likelihood": 1 - accuracy,
        "calibration_error": 0.1,
        "brier_score": 0.3,
        "foreign_auroc": 0.8,
    }
    content = {
        "status": "done",
        **({"sampled": {**test, "brier_score": 0.2}} if draws else {}),
        "train": {"accuracy": 1.0},
        "test": test,
        "calibrated": {"negative_log_likelihood": 0.2},
        "history": {"val_accuracy": [0.4, accuracy]},
    }
    provenance = {
        "versions": {"the methods": 1},
        "date": "2026-01-01T00:00:00+00:00",
        "backend": "jax",
        "device": "cpu",
    }
    results.write(run, folder, content, provenance)


def compare(folder, capsys, *arguments):
    comparison.main(["--output", str(folder), *arguments])
    printed = capsys.readouterr().out
    assert (folder / "comparison.md").read_text() in printed
    return {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in printed.splitlines()
        if len(cells := line.split("|")[1:-1]) > 1
    }


def test_differences_are_those_of_the_same_seeds(tmp_path, capsys):
    gains = [0.05, 0.0, -0.01, 0.04]
    for seed, gain in enumerate(gains):
        write(tmp_path, "lora", seed, 0.5 + 0.1 * seed)
        accuracy = 0.5 + 0.1 * seed + gain
        write(tmp_path, "fvae_lora", seed, accuracy, draws=True)
    # It has no other beside it.
    write(tmp_path, "fvae_lora", 9, 0.1)
    found = compare(tmp_path, capsys)
    assert "LoRA" not in found
    row = dict(zip(found[""], found["FVAE-LoRA as published"]))
    mean, low, high = map(
        float,
        row["accuracy"]
        .replace("[", "")
        .replace("]", "")
        .replace(",", "")
        .split(),
    )
    assert mean == pytest.approx(100 * np.mean(gains))
    assert -1 <= low < mean < high <= 5
    assert row["loss"].startswith("-0.02 [")
    assert row["calibration error"] == "+0.00"
    assert row["train - test"].startswith("-2.00 [")
    assert row["wins, ties, losses"] == "2, 1, 1"
    sampled = dict(zip(found[""], found["FVAE-LoRA as published, sampled"]))
    assert sampled["accuracy"] == row["accuracy"]
    assert sampled["Brier score"] == "-0.10"
    assert row["Brier score"] == "+0.00"
    assert sampled["epochs"] == sampled["foreign AUROC"] == "-"
    other = compare(tmp_path, capsys, "--beside", "fvae_lora")
    assert other["LoRA"][-1] == "1, 1, 2"


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        ([1.0, 1.0], 0.95),
        ([0.5, 1.0], 1.9),
        # It falls again, after it was there.
        ([0.2, 0.9, 0.5], 1 + 0.275 / 0.7),
        ([0.0, 0.0], 0.0),
    ],
)
def test_epochs_until_most_of_the_accuracy_is_there(accuracies, expected):
    assert comparison.epochs_to_share(accuracies) == pytest.approx(expected)


def test_without_what_they_are_beside_it_says_so(tmp_path):
    write(tmp_path, "fvae_lora", 1, 0.5)
    with pytest.raises(SystemExit, match="No results of 'lora'"):
        comparison.main(["--output", str(tmp_path)])
