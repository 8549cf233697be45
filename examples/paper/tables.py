"""The results as the paper's tables, beside the paper's figures.

python -m examples.paper.tables
python -m examples.paper.tables --table local --size full

Means of the seeds, with the standard deviation as the authors take it (of the
population); in brackets how many seeds there are, where some are missing. It
writes tables.md, and a picture of quality against cost for each table.
"""

import argparse
import collections
import dataclasses
import pathlib
from collections.abc import Callable

import matplotlib.figure
import numpy as np

from examples.paper.harness import OUTPUT
from examples.paper.methods import METHODS
from examples.paper.paper_figures import FIGURES
from examples.paper.paper_figures import IMAGE_COLUMNS
from examples.paper.results import load
from keras_fvae import plots


def of_images(result):
    return {result["run"]["dataset"]: 100 * result["test"]["accuracy"]}


def of_questions(result):
    return {task: 100 * accuracy for task, accuracy in result["test"].items()}


def of_phonemes(result):
    error_rate = result["test"]["phoneme_error_rate"]
    return {result["run"]["dataset"]: 100 * error_rate}


def of_groups(result):
    chosen = result["test"]["chosen_by_worst_group_accuracy"]
    gap = chosen["mean_by_training_shares"] - chosen["worst"]
    return {
        result["run"]["dataset"]: 100 * chosen["worst"],
        f"{result['run']['dataset']}, gap": 100 * gap,
    }


def of_predictions(measured):
    return {
        "accuracy": 100 * measured["accuracy"],
        "loss": measured["negative_log_likelihood"],
        "calibration error": 100 * measured["calibration_error"],
        "Brier score": measured["brier_score"],
    }


def of_local_data(result):
    test = result["test"]
    columns = {
        **of_predictions(test),
        "calibrated loss": result["calibrated"]["negative_log_likelihood"],
        "foreign AUROC": 100 * test["foreign_auroc"],
    }
    if "worst" in test:
        columns["worst group"] = 100 * test["worst"]
    return columns


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the results of a table are shown.

    Args:
        quality: String, what the picture shows.
        columns: Function of a result that returns a dict of column to figure.
        has_mean: Boolean. Whether the mean of the columns says something: it
            is then what the picture shows, and else the first column.
        by_dataset: Boolean. Whether each data set has a table of its own.
    """

    quality: str
    columns: Callable
    has_mean: bool = True
    by_dataset: bool = False


TABLES = {
    "image_classification": Layout("accuracy", of_images),
    "commonsense_reasoning": Layout("accuracy", of_questions, by_dataset=True),
    "phoneme_recognition": Layout(
        "phoneme error rate", of_phonemes, has_mean=False
    ),
    "spurious_correlations": Layout(
        "accuracy of the worst group", of_groups, has_mean=False
    ),
    **dict.fromkeys(
        ("local", "ablation"),
        Layout("accuracy", of_local_data, has_mean=False, by_dataset=True),
    ),
}


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument(
        "--table", nargs="+", choices=TABLES, default=list(TABLES)
    )
    options = parser.parse_args(arguments)
    pages = []
    for table in options.table:
        results = read_or_exit(options, table)
        for title, part in in_parts(results, TABLES[table]).items():
            name = f"{table}_{title}".replace(", ", "_")
            plot(part, TABLES[table]).savefig(
                options.output / f"{name}.png", dpi=150
            )
            pages.append(page(f"{table}: {title}", part, TABLES[table]))
    if not pages:
        raise SystemExit(
            f"No results of the size '{options.size}' are in {options.output}."
        )
    text = "\n".join(pages)
    (options.output / "tables.md").write_text(text)
    print(text)


def make_parser(description):
    """A parser of what every reader of results is told."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--size", choices=["full", "small", "tiny"], default="full"
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    return parser


def read_or_exit(options, table, are_trials=False):
    """What `read_results` returns; what it raises ends the command."""
    try:
        return read_results(options.output, table, options.size, are_trials)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def read_results(folder, table, size, are_trials=False):
    """List of the results of a table, or of its trials.

    Raises:
        ValueError: If one is damaged, or they are of different versions.
    """
    found, versions = [], {}
    for path in sorted(pathlib.Path(folder, table, size).glob("*/*.json")):
        result = load(path)
        for name, version in result["provenance"]["versions"].items():
            first, where = versions.setdefault(name, (version, path))
            if version != first:
                raise ValueError(
                    f"'{where}' was made with {name} {first}, and '{path}' "
                    f"with {version}. Results of different versions are not "
                    "mixed: move one of them to another folder."
                )
        if result["run"]["is_trial"] == are_trials:
            found.append(result)
    return found


def in_parts(results, layout):
    """Dict of title to the results of one table, in the order of titles."""
    parts = collections.defaultdict(list)
    for result in results:
        run = result["run"]
        title = f"{run['size']}, {run['settings']}"
        if layout.by_dataset:
            title = f"{run['dataset']}, {title}"
        elif run["dataset"].endswith("_halves"):
            title += ", halves"
        parts[title].append(result)
    return dict(sorted(parts.items()))


def by_method(results):
    """Dict of the methods that there are to their results, in their order."""
    return {
        method: found
        for method in METHODS
        if (found := [r for r in results if r["run"]["method"] == method])
    }


def done(results):
    return [result for result in results if result["status"] == "done"]


def page(title, results, layout):
    """A table in Markdown.

    Args:
        title: String.
        results: List of results, failed ones too.
        layout: `Layout`.
    """
    seeds = {result["run"]["seed"] for result in results}
    columns = list(
        dict.fromkeys(
            column for r in done(results) for column in layout.columns(r)
        )
    )
    means = ["mean"] * layout.has_mean
    header = ["", *columns, *means, "trains", "inference", "s/step"]
    lines = [
        f"## {title.replace('_', ' ')}",
        "",
        f"In % ({layout.quality}), a loss in nats; {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}.",
        "",
        line(*header),
        line("---", *["---:"] * (len(header) - 1)),
    ]
    for method, found in by_method(results).items():
        figures = figures_of(found, layout)
        cells = [cell(figures[column], len(seeds)) for column in columns]
        if layout.has_mean:
            cells.append(mean([np.mean(figures[c] or np.nan) for c in columns]))
        label = METHODS[method].label
        lines.append(line(label, *cells, *costs(done(found))))
        lines += paper_line(results[0]["run"]["table"], method, columns, layout)
    num_failed = len(results) - len(done(results))
    if num_failed:
        lines += ["", f"{num_failed} runs failed; their files say why."]
    return "\n".join([*lines, "", provenance_line(results), ""])


def figures_of(results, layout):
    """Dict of column to the figures of all seeds."""
    figures = collections.defaultdict(list)
    for result in done(results):
        for column, figure in layout.columns(result).items():
            figures[column].append(figure)
    return figures


def paper_line(table, method, columns, layout):
    """List of the line with the paper's figures, empty if it has none."""
    paper = FIGURES.get(table, {}).get(method)
    if paper is None:
        return []
    figures = [
        paper.get(column.removesuffix("_halves"), np.nan) for column in columns
    ]
    cells = ["" if np.isnan(f) else f"{f:.2f}" for f in figures]
    if layout.has_mean:
        is_whole = len(columns) == len(IMAGE_COLUMNS)
        whole = [paper["mean"] if is_whole else np.nan]
        cells.append(mean(whole if "mean" in paper else figures))
    return [line(f"{METHODS[method].label}, paper", *cells, *[""] * 3)]


def mean(figures):
    """String, the mean of the columns, if none of them is missing."""
    return "" if np.isnan(figures).any() else f"{np.mean(figures):.2f}"


def line(*entries):
    return f"| {' | '.join(entries)} |"


def cell(values, num_seeds):
    """Mean and standard deviation; how many, if that is not all."""
    if not values:
        return ""
    text = f"{np.mean(values):.2f} ± {np.std(values):.2f}"
    return text if len(values) == num_seeds else f"{text} ({len(values)})"


def costs(results):
    """What a method trains, what inference needs more, the time of a step."""
    if not results:
        return [""] * 3
    found = [result["cost"] for result in results]
    return [
        f"{max(cost['trainable_parameters'] for cost in found):,}",
        f"{max(cost['inference_parameters'] for cost in found):,}",
        f"{np.median([cost['step_seconds'] for cost in found]):.3f}",
    ]


def provenance_line(results):
    """String: when the results were made, and on which devices."""
    made = [result["provenance"] for result in results]
    dates = [provenance["date"][:10] for provenance in made]
    devices = {f"{p['backend']} on {p['device']}" for p in made}
    period = " to ".join(sorted({min(dates), max(dates)}))
    return f"Made {period}; {', '.join(sorted(devices))}."


def plot(results, layout):
    """Quality against what it costs: parameters that train, and time."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    costs = {
        "trainable_parameters": "parameters that train",
        "step_seconds": "seconds of a training step",
    }
    for axis, (cost, label) in zip(axes, costs.items()):
        for index, (method, found) in enumerate(
            by_method(done(results)).items()
        ):
            axis.plot(
                np.median([result["cost"][cost] for result in found]),
                np.mean([quality(result, layout) for result in found]),
                linestyle="none",
                color=plots.COLORS[index % len(plots.COLORS)],
                marker=plots.MARKERS[index % len(plots.MARKERS)],
                label=METHODS[method].label,
            )
        axis.set_xlabel(label)
        axis.set_xscale("log")
    axes[0].set_ylabel(f"{layout.quality} in %")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
    )
    return figure


def quality(result, layout):
    """Float, what the picture shows of a result."""
    figures = [*layout.columns(result).values()]
    return np.mean(figures) if layout.has_mean else figures[0]


if __name__ == "__main__":
    main()
