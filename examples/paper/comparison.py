"""Each method of the local table beside another one, seed by seed.

python -m examples.paper.comparison
python -m examples.paper.comparison --beside dora --size small

Differences of the same seed, which has the same data: their mean, and in
brackets its bootstrap interval of 95 % over the seeds. A method that draws is
there once more by the mean of its samples. It writes comparison.md.
"""

import numpy as np
import scipy.stats

from examples.paper import tables
from examples.paper.methods import METHODS

CONFIDENCE = 0.95
# Of the final accuracy, which a method is to reach soon.
SHARE = 0.95
# Accuracies that differ by less, in points, are a tie.
TIE = 0.1


def main(arguments=None):
    parser = tables.make_parser(__doc__)
    parser.add_argument(
        "--table", choices=["local", "ablation"], default="local"
    )
    parser.add_argument("--beside", choices=METHODS, default="lora")
    options = parser.parse_args(arguments)
    results = tables.read_or_exit(options, options.table)
    parts = tables.in_parts(results, tables.TABLES[options.table])
    pages = [
        page(title, part, options.beside)
        for title, part in parts.items()
        if by_seed(part, options.beside)
    ]
    if not pages:
        raise SystemExit(
            f"No results of '{options.beside}' of the size '{options.size}' "
            f"are in {options.output}."
        )
    text = "\n".join(pages)
    (options.output / "comparison.md").write_text(text)
    print(text)


def page(title, results, beside):
    """A table in Markdown.

    Args:
        title: String.
        results: List of results of one data set.
        beside: String, a key of `METHODS`, what the others are held against.
    """
    by_label = rows(results)
    reference = by_label[METHODS[beside].label]
    columns = [*next(iter(reference.values()))]
    lines = [
        f"## {title}, beside {METHODS[beside].label}",
        "",
        tables.line("", *columns, "wins, ties, losses"),
        tables.line("---", *["---:"] * (len(columns) + 1)),
    ]
    for label, found in by_label.items():
        seeds = sorted(found.keys() & reference.keys())
        if label == METHODS[beside].label or not seeds:
            continue
        differences = {
            column: np.array(
                [
                    found[seed][column] - reference[seed][column]
                    for seed in seeds
                ]
            )
            for column in found[seeds[0]]
        }
        cells = [
            interval(differences[column]) if column in differences else "-"
            for column in columns
        ]
        lines.append(tables.line(label, *cells, wins(differences["accuracy"])))
    return "\n".join([*lines, "", tables.provenance_line(results), ""])


def rows(results):
    """Dict of label to a dict of seed to figures, of each row of a table."""
    found = {}
    for method in tables.by_method(results):
        label = METHODS[method].label
        of_method = by_seed(results, method)
        found[label] = {
            seed: figures(result) for seed, result in of_method.items()
        }
        sampled = {
            seed: tables.of_predictions(result["sampled"])
            for seed, result in of_method.items()
            if "sampled" in result
        }
        if sampled:
            found[f"{label}, sampled"] = sampled
    return found


def by_seed(results, method):
    """Dict of seed to the result of a method that worked."""
    return {
        result["run"]["seed"]: result
        for result in tables.done(results)
        if result["run"]["method"] == method
    }


def figures(result):
    """Dict of column to figure: what is compared."""
    return {
        **tables.of_local_data(result),
        "train - test": 100
        * (result["train"]["accuracy"] - result["test"]["accuracy"]),
        "epochs": epochs_to_share(result["history"]["val_accuracy"]),
    }


def epochs_to_share(accuracies):
    """Float, the epochs until a share of the last accuracy is there.

    Args:
        accuracies: List of floats, those at the ends of the epochs. In between
            they are taken to rise in a line, from 0 on.
    """
    goal = SHARE * accuracies[-1]
    curve = np.maximum.accumulate([0.0, *accuracies])
    after = int(np.argmax(curve >= goal))
    if after == 0:
        return 0.0
    before = curve[after - 1]
    return after - 1 + float((goal - before) / (curve[after] - before))


def interval(differences):
    """String, the mean of differences and its bootstrap interval."""
    mean = f"{differences.mean():+.2f}"
    if len(differences) == 1 or np.ptp(differences) == 0:
        return mean
    low, high = scipy.stats.bootstrap(
        [differences],
        np.mean,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return f"{mean} [{low:+.2f}, {high:+.2f}]"


def wins(differences):
    """String, how often a method was better, as good, and worse."""
    num_wins = int((differences > TIE).sum())
    num_losses = int((differences < -TIE).sum())
    return (
        f"{num_wins}, {len(differences) - num_wins - num_losses}, {num_losses}"
    )


if __name__ == "__main__":
    main()
