"""One setting of a method for all data sets, beside the best one of each.

python -m examples.paper.one_setting

The trials of a method have the same settings on every data set. So of each
setting it is known what it loses, in points of the validation score, to the
best one of that data set. The table shows the setting that loses least on
average: on average, at most, and what a data set loses on average to its best
setting by the one that is chosen by the others. It is of the data sets on
which all of the methods were searched.
"""

import collections
import math

import numpy as np

from examples.paper import tables
from examples.paper.methods import METHODS

SEARCHED = ("lora", "lora_of_3_ranks", "fvae_lora", "fvae_lora_of_4_ranks")


def main(arguments=None):
    parser = tables.make_parser(__doc__)
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=list(SEARCHED)
    )
    options = parser.parse_args(arguments)
    trials = tables.read_or_exit(options, "local", are_trials=True)
    datasets, found = compare(trials, options.method)
    if len(datasets) < 2:
        raise SystemExit(
            f"Fewer than two data sets in {options.output} have trials of "
            f"the size '{options.size}' of all of: {options.method}."
        )
    print(f"{len(datasets)} data sets: {', '.join(datasets)}.\n")
    columns = "learning rate", "mean", "most", "chosen by the others"
    print(tables.line("", *columns))
    print(tables.line("---", *["---:"] * len(columns)))
    for method, (learning_rate, *lost) in found.items():
        cells = f"{learning_rate:.1e}", *(f"{cell:.1f}" for cell in lost)
        print(tables.line(METHODS[method].label, *cells))


def compare(trials, methods):
    """What one setting loses, of the data sets that all methods have.

    Args:
        trials: List of results.
        methods: List of strings, keys of `METHODS`.

    Returns:
        List of the names of the data sets, and a dict of method to the
        learning rate of the setting that loses least on average, what it loses
        on average and at most, and what is lost by the choice of the others,
        in points; empty where there are fewer than two data sets.
    """
    scores = {method: by_dataset(trials, method) for method in methods}
    datasets = sorted(set.intersection(*map(set, scores.values())))
    found = {}
    if len(datasets) > 1:
        for method, of_method in scores.items():
            lost = losses([of_method[dataset] for dataset in datasets])
            best = int(lost.mean(axis=0).argmin())
            found[method] = (
                learning_rates(trials, method)[best],
                lost[:, best].mean(),
                lost[:, best].max(),
                by_others(lost),
            )
    return datasets, found


def by_dataset(trials, method):
    """Dict of data set to a dict of the number of a trial to its score.

    A data set whose search has not ended is left out: it has fewer trials. The
    score of a trial that failed or diverged is minus infinity.
    """
    found = collections.defaultdict(dict)
    for trial in trials:
        run = trial["run"]
        if run["method"] == method:
            score = trial.get("validation_score", math.nan)
            found[run["dataset"]][run["seed"]] = (
                score if math.isfinite(score) else -math.inf
            )
    num_trials = max(map(len, found.values()), default=0)
    return {
        dataset: scores
        for dataset, scores in found.items()
        if len(scores) == num_trials
    }


def learning_rates(trials, method):
    """Dict of the number of a trial to its learning rate."""
    return {
        trial["run"]["seed"]: trial["settings"]["learning_rate"]
        for trial in tables.done(trials)
        if trial["run"]["method"] == method
    }


def losses(scores):
    """What each setting loses to the best one of a data set.

    Args:
        scores: List of dicts of the number of a trial to its score, one for
            each data set.

    Returns:
        NumPy array of shape `(data sets, trials)`, in points; infinite for a
        trial that failed.
    """
    rows = [[score for _, score in sorted(each.items())] for each in scores]
    points = 100 * np.array(rows)
    return points.max(axis=1, keepdims=True) - points


def by_others(lost):
    """What a data set loses on average by the setting of all the others."""
    chosen = [
        np.delete(lost, index, axis=0).mean(axis=0).argmin()
        for index in range(len(lost))
    ]
    return lost[range(len(lost)), chosen].mean()


if __name__ == "__main__":
    main()
