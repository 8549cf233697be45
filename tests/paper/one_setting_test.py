"""What one setting of a method loses on several data sets."""

import re

import pytest

from examples.paper import one_setting
from examples.paper import results

pytestmark = pytest.mark.always_one_backend
# The validation score of each trial; no one of them is the best everywhere.
SCORES = {
    "digits": [0.50, 0.80, 0.78],
    "docstrings": [0.60, 0.50, 0.59],
    "kinds": [0.40, 0.41, 0.40],
}


def write(folder, dataset, method, trial, content):
    provenance = {"versions": {"the methods": 1}}
    run = results.Run("local", "full", dataset, method, trial, is_trial=True)
    settings = {"learning_rate": 0.001 * (1 + trial)}
    results.write(run, folder, {"settings": settings, **content}, provenance)


def write_all(folder, scores, method="lora"):
    for dataset, of_trials in scores.items():
        for trial, score in enumerate(of_trials):
            content = {"status": "failed"}
            if score is not None:
                content = {"status": "done", "validation_score": score}
            write(folder, dataset, method, trial, content)


def printed_rows(folder, capsys, *arguments):
    one_setting.main(["--output", str(folder), *arguments])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\w[^|]*) \| (.*) \|$", printed, re.MULTILINE)
    return printed, {name: cells.split(" | ") for name, cells in rows}


def test_the_setting_that_loses_least(tmp_path, capsys):
    write_all(tmp_path, SCORES)
    # Not of both methods.
    write_all(tmp_path, {"emoji": [0.1, 0.9]})
    write_all(tmp_path, SCORES, "dora")
    printed, rows = printed_rows(tmp_path, capsys, "--method", "lora", "dora")
    assert printed.startswith("3 data sets: digits, docstrings, kinds.")
    # The last one loses 2, 1 and 1 points. The others would choose the first,
    # the second and the last one, which lose 30, 10 and 1.
    assert rows["LoRA"] == ["3.0e-03", "1.3", "2.0", "13.7"] == rows["DoRA"]


def test_what_is_chosen_by_the_others(tmp_path, capsys):
    # Each of the two would take what is the best for the other.
    write_all(tmp_path, {"digits": [0.5, 0.6], "kinds": [0.7, 0.4]})
    _, rows = printed_rows(tmp_path, capsys, "--method", "lora")
    assert rows["LoRA"] == ["1.0e-03", "5.0", "10.0", "20.0"]


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_setting_that_failed_is_not_chosen(score, tmp_path, capsys):
    write_all(tmp_path, {"digits": [0.9, 0.5], "kinds": [score, 0.4]})
    _, rows = printed_rows(tmp_path, capsys, "--method", "lora")
    assert rows["LoRA"][:3] == ["2.0e-03", "20.0", "40.0"]


def test_too_few_data_sets(tmp_path):
    write_all(tmp_path, {"digits": [0.5]})
    with pytest.raises(SystemExit, match="Fewer than two data sets"):
        one_setting.main(["--output", str(tmp_path), "--method", "lora"])


def test_a_search_that_has_not_ended_is_left_out(tmp_path, capsys):
    write_all(tmp_path, SCORES | {"emoji": [0.1]})
    printed, _ = printed_rows(tmp_path, capsys, "--method", "lora")
    assert printed.startswith("3 data sets: digits, docstrings, kinds.")
