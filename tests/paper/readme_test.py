"""The tables of results in the documents, against the results."""

import re

import numpy as np
import pytest
from helpers import ROOT

from examples.paper import comparison
from examples.paper import one_setting
from examples.paper import tables
from examples.paper.methods import METHODS

pytestmark = pytest.mark.always_one_backend
RESULTS = ROOT / "examples" / "paper" / "results"
BESIDE = METHODS["lora"].label


def read_table(document, start):
    """Pair of the columns' names and a dict of row to cells."""
    lines = (ROOT / document).read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(start))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    header, _, *rows = rows
    return header[1:], {row: cells for row, *cells in rows}


COLUMNS, ROWS = read_table("README.md", "| | L")
EMOJI_COLUMNS, EMOJI_ROWS = read_table("docs/results.md", "| emoji |")


def numbers(text):
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]


def rounding(name):
    """The last digit that is shown of a figure."""
    return 0.0051 if name == "loss" else 0.051


def check_difference(cell, name, figures, reference):
    """Whether a cell is what a method's figures differ by, seed by seed."""
    seeds = sorted(reference)
    differences = np.array(
        [figures[seed][name] - reference[seed][name] for seed in seeds]
    )
    expected = numbers(comparison.interval(differences))
    _, low, high = expected
    assert cell.startswith("**") == (low * high > 0), "bold or not"
    # What it prints is rounded, too.
    tolerance = rounding(name) + 0.005
    assert numbers(cell) == pytest.approx(expected, abs=tolerance)


@pytest.fixture(scope="module")
def results():
    """Dict of data set to what `comparison.rows` says of it."""
    found = tables.read_results(RESULTS, "local", "full")
    parts = tables.in_parts(found, tables.TABLES["local"])
    return {
        title.split(",")[0]: comparison.rows(part)
        for title, part in parts.items()
        if title.endswith(", searched")
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", COLUMNS)
def test_figures_are_those_of_the_results(row, column, results):
    """A column is a method, by its accuracy or its loss; a row a data set."""
    cell = ROWS[row][COLUMNS.index(column)]
    dataset = re.sub(r"[ ,]+", "_", row.replace("%", "percent"))
    label, _, loss = column.partition(", ")
    assert label in {method.label for method in METHODS.values()}
    assert loss in ("", "loss")
    by_label = results[dataset]
    reference, figures = by_label[BESIDE], by_label.get(label, {})
    name = loss or "accuracy"
    if not loss and "worst group" in next(iter(reference.values())):
        name = "worst group"
    if figures.keys() != reference.keys():
        assert cell == "", "not all of its seeds have run"
        return
    if label == BESIDE:
        expected = np.mean([found[name] for found in reference.values()])
        assert numbers(cell) == pytest.approx([expected], abs=rounding(name))
    else:
        check_difference(cell, name, figures, reference)


@pytest.mark.parametrize("label", EMOJI_ROWS)
@pytest.mark.parametrize("column", EMOJI_COLUMNS)
def test_figures_of_emoji_are_those_of_the_results(label, column, results):
    """A row is a method; a column what differs from LoRA, by its unit."""
    cell = EMOJI_ROWS[label][EMOJI_COLUMNS.index(column)]
    by_label = results["emoji"]
    check_difference(cell, column, by_label[label], by_label[BESIDE])


def test_all_methods_are_on_emoji(results):
    assert {*EMOJI_ROWS} == {
        label
        for label in results["emoji"]
        if not label.endswith("sampled") and label != BESIDE
    }
    assert len(EMOJI_ROWS) >= 18


def test_one_setting_for_all():
    trials = tables.read_results(RESULTS, "local", "full", are_trials=True)
    _, found = one_setting.compare(trials, one_setting.SEARCHED)
    text = (ROOT / "docs" / "results.md").read_text()
    line = next(
        line for line in text.splitlines() if line.startswith("| one setting")
    )
    points = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    expected = [
        rate
        for method in ("fvae_lora_of_4_ranks", "lora", "lora_of_3_ranks")
        for rate in found[method][1:3]
    ]
    assert points == pytest.approx(expected, abs=0.051)
