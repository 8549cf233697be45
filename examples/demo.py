"""FVAE-LoRA beside LoRA, where it matters which: in about three minutes.

    python -m examples.demo

A small vision transformer that has seen handwritten digits is adapted to
others, turned by a quarter, with all examples and with 20 of each class; and
it is adapted to tell 0 to 4 from 5 to 9, where in training a colour goes with
the label. Each method has the settings that did best of sixteen in the
comparison (examples/paper/README.md), and seeds that were not used there.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib.figure
import numpy as np

from examples.paper import local
from examples.paper.methods import METHODS
from keras_fvae import plots

RESULTS = pathlib.Path(__file__).parent / "paper" / "results" / "local" / "full"
COMPARED = ("lora", "fvae_lora_of_4_ranks")
SEEDS = (101, 102, 103)
# By data set, what it shows.
SITUATIONS = {
    "digits": "all 450 examples",
    "digits_20_a_class": "20 examples of each class",
    "spurious_digits": "a colour that goes with the label, worst group",
}
MEASURES = {
    "accuracy": "accuracy in %",
    "negative_log_likelihood": "loss",
    "calibration_error": "calibration error in %",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("output"),
        metavar="FOLDER",
        help="where the picture goes (default: output)",
    )
    compare(parser.parse_args().output)


def compare(folder, situations=tuple(SITUATIONS), seeds=SEEDS, size="full"):
    """Trains with each method, prints the table, and draws the picture."""
    results = {}
    for dataset in situations:
        print(f"{SITUATIONS[dataset]}:")
        for method in COMPARED:
            for seed in seeds:
                found = run(dataset, method, seed, size)
                results[dataset, method, seed] = found
                print(
                    f"    {METHODS[method].label}, seed {seed}: accuracy "
                    f"{found['accuracy']:.1f} %",
                    flush=True,
                )
    print(table(results, situations, seeds))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "demo.png"
    plot(results, situations, seeds).savefig(picture, dpi=150)
    print(f"\nThe picture is in {picture}")


def run(dataset, method, seed, size):
    """Fine-tunes once.

    Returns:
        Dict of the keys of `MEASURES` to a float.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    measured = local.run(
        local.TABLE.datasets[dataset],
        method,
        best_settings(dataset, method),
        seed,
        local.TABLE.sizes[size].settings | {"is_trial": False},
    )["test"]
    accuracy = measured.get("worst", measured["accuracy"])
    return {
        "accuracy": 100 * accuracy,
        "negative_log_likelihood": measured["negative_log_likelihood"],
        "calibration_error": 100 * measured["calibration_error"],
    }


def best_settings(dataset, method):
    """Dict of the settings with which the comparison made its runs."""
    path = RESULTS / dataset / f"{method}_searched_1.json"
    return json.loads(path.read_text())["settings"]


def table(results, situations, seeds):
    """String: the means over the seeds, and those of the differences."""
    labels = [METHODS[method].label for method in COMPARED]
    lines = [
        "",
        " " * 24 + "".join(f"{n:>14}" for n in [*labels, "difference"]),
    ]
    for dataset in situations:
        lines.append(SITUATIONS[dataset])
        for name, label in MEASURES.items():
            first, second = means(results, dataset, name, seeds)
            digits = 2 if label == "loss" else 1
            cells = "".join(f"{n:>14.{digits}f}" for n in (first, second))
            cells += f"{second - first:>+14.{digits}f}"
            lines.append(f"  {label:<22}{cells}")
    return "\n".join(lines)


def means(results, dataset, name, seeds):
    """List of the mean of a measure over the seeds, of each method."""
    return [
        np.mean([results[dataset, method, seed][name] for seed in seeds])
        for method in COMPARED
    ]


def plot(results, situations, seeds):
    """Each seed as a line from LoRA to FVAE-LoRA."""
    figure = matplotlib.figure.Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, len(situations), squeeze=False)
    labels = [METHODS[method].label for method in COMPARED]
    for column, dataset in zip(axes.T, situations):
        for axis, name in zip(column, ("accuracy", "negative_log_likelihood")):
            for seed in seeds:
                values = [results[dataset, m, seed][name] for m in COMPARED]
                axis.plot(labels, values, color="0.6", marker="o", linewidth=1)
            axis.plot(
                labels,
                means(results, dataset, name, seeds),
                color=plots.COLORS[0],
                marker="s",
                linewidth=2.5,
                label="mean",
            )
            axis.margins(x=0.2)
            axis.set_ylabel(MEASURES[name])
        title = SITUATIONS[dataset].replace(", ", ",\n")
        column[0].set_title(title, fontsize=10)
    axes[0, 0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
