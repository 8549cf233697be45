"""Results as tables: means, gaps, the paper's figures, what is refused."""

import json

import numpy as np
import pytest

from examples.paper import results
from examples.paper import tables
from examples.paper.paper_figures import FIGURES

pytestmark = pytest.mark.always_one_backend


def write(folder, table, dataset, method, seed, **result):
    """Writes a result that has what the tables read."""
    versions = {"the methods": 1, f"the table {table}": 1}
    versions |= result.pop("versions", {})
    run = results.Run(table, "full", dataset, method, seed)
    provenance = {
        "versions": versions,
        "date": f"2026-01-0{seed}T00:00:00+00:00",
        "backend": "jax",
        "device": "cpu",
    }
    cost = {
        "trainable_parameters": 1234,
        "inference_parameters": 567,
        "step_seconds": 0.25,
    }
    content = {"status": "done", "cost": cost, **result}
    results.write(run, folder, content, provenance)


def accuracy(value):
    return {"test": {"accuracy": value}}


def rows(folder, capsys, *arguments):
    """The cells of each row of what is printed, by its first cell."""
    tables.main(["--output", str(folder), *arguments])
    printed = capsys.readouterr().out
    assert (folder / "tables.md").read_text() in printed
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if line.startswith("|")
    ]
    return {first: others for first, *others in cells}, printed


def test_means_deviations_and_the_papers_figures(tmp_path, capsys):
    table = "image_classification"
    for seed, value in ((1, 0.70), (2, 0.74)):
        write(tmp_path, table, "dtd", "lora", seed, **accuracy(value))
        write(tmp_path, table, "svhn", "lora", seed, **accuracy(0.9))
    write(tmp_path, table, "dtd", "fvae_lora", 1, **accuracy(0.8))
    found, printed = rows(tmp_path, capsys)
    assert found[""][:3] == ["dtd", "svhn", "mean"]
    # The deviation is that of the population.
    costs = ["1,234", "567", "0.250"]
    assert found["LoRA"] == ["72.00 ± 2.00", "90.00 ± 0.00", "81.00", *costs]
    assert found["LoRA, paper"][:3] == ["74.65", "94.22", "84.44"]
    # One seed of two, and no mean where a data set is missing.
    assert found["FVAE-LoRA as published"][:3] == ["80.00 ± 0.00 (1)", "", ""]
    assert "2 seeds" in printed
    assert "Made 2026-01-01 to 2026-01-02; jax on cpu." in printed
    picture = tmp_path / "image_classification_full_searched.png"
    assert picture.stat().st_size > 10_000


def test_failed_runs_are_counted(tmp_path, capsys):
    table = "image_classification"
    write(tmp_path, table, "dtd", "lora", 1, **accuracy(0.7))
    write(tmp_path, table, "dtd", "lora", 2, status="failed: of memory")
    write(tmp_path, table, "dtd", "hira", 1, status="failed: of memory")
    found, printed = rows(tmp_path, capsys)
    assert found["LoRA"][0] == "70.00 ± 0.00 (1)"
    assert {*found["HiRA"]} == {""}
    assert "2 runs failed" in printed


def test_the_halves_stand_beside_the_same_figures(tmp_path, capsys):
    table = "image_classification"
    write(tmp_path, table, "dtd_halves", "dora", 1, **accuracy(0.7))
    found, _ = rows(tmp_path, capsys)
    assert found["DoRA, paper"][0] == "75.74"


def test_groups_have_the_worst_and_the_gap(tmp_path, capsys):
    chosen = {
        "chosen_by_worst_group_accuracy": {
            "worst": 0.6,
            "mean_by_training_shares": 0.9,
        }
    }
    table = "spurious_correlations"
    write(tmp_path, table, "waterbirds", "lora", 1, test=chosen)
    found, _ = rows(tmp_path, capsys)
    assert found[""][:2] == ["waterbirds", "waterbirds, gap"]
    assert found["LoRA"][:2] == ["60.00 ± 0.00", "30.00 ± 0.00"]
    assert found["LoRA, paper"][0] == "75.49"


def test_local_data_have_a_table_each(tmp_path, capsys):
    test = {
        "accuracy": 0.9,
        "negative_log_likelihood": 0.31,
        "calibration_error": 0.04,
        "brier_score": 0.2,
        "foreign_auroc": 0.8,
    }
    calibrated = {"negative_log_likelihood": 0.29}
    for dataset, groups in (
        ("digits", {}),
        ("spurious_digits", {"worst": 0.5}),
    ):
        write(
            tmp_path,
            "local",
            dataset,
            "lora",
            1,
            test=test | groups,
            calibrated=calibrated,
        )
    _, printed = rows(tmp_path, capsys, "--table", "local")
    digits, spurious = printed.split("## local: ")[1:]
    figures = ("90.00", "0.31", "4.00", "0.20", "0.29", "80.00")
    cells = " | ".join(f"{figure} ± 0.00" for figure in figures)
    assert f"| LoRA | {cells} |" in digits
    assert "worst group" in spurious
    assert "worst group" not in digits


def test_trials_are_in_no_table(tmp_path, capsys):
    table = "image_classification"
    write(tmp_path, table, "dtd", "lora", 1, **accuracy(0.7))
    path = tmp_path / table / "full" / "dtd" / "lora_searched_1.json"
    trial = json.loads(path.read_text())
    trial["run"]["is_trial"] = True
    path.with_name("lora_trial_1.json").write_text(json.dumps(trial))
    found, _ = rows(tmp_path, capsys)
    assert found["LoRA"][0] == "70.00 ± 0.00"


RATE = {"test": {"phoneme_error_rate": 0.2}}


def test_a_run_that_goes_on_is_passed_over(tmp_path, capsys):
    write(tmp_path, "phoneme_recognition", "timit", "lora", 1, **RATE)
    folder = tmp_path / "phoneme_recognition" / "full" / "timit"
    backup = folder / "dora_searched_1.backup"
    backup.mkdir()
    (backup / "run.json").write_text("{}")
    (folder / "dora_searched_1.part").write_text("{")
    found, _ = rows(tmp_path, capsys)
    assert "LoRA" in found and "DoRA" not in found


def test_versions_are_not_mixed(tmp_path):
    table = "image_classification"
    write(tmp_path, table, "dtd", "lora", 1, **accuracy(0.7))
    other = {"the methods": 2}
    write(tmp_path, table, "dtd", "lora", 2, versions=other, **accuracy(0.7))
    with pytest.raises(SystemExit, match=r"the methods 1.*with 2"):
        tables.main(["--output", str(tmp_path)])


def test_without_results_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="No results of the size 'full'"):
        tables.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(
    "table, method, mean",
    [
        ("image_classification", "full_fine_tuning", 89.38),
        ("image_classification", "lora", 87.39),
        ("image_classification", "dora", 88.32),
        ("image_classification", "fvae_lora", 89.53),
        ("commonsense_reasoning", "lora", 77.82),
        ("commonsense_reasoning", "hira", 87.40),
        ("commonsense_reasoning", "fvae_lora", 87.82),
    ],
)
def test_the_papers_means_are_those_of_its_rows(table, method, mean):
    figures = FIGURES[table][method]
    assert np.mean([*figures.values()]) == pytest.approx(mean, abs=0.011)
