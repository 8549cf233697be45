"""Runs what a table needs and has no result yet, one run after the other."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import pathlib
import shutil
import time
import traceback
from collections.abc import Callable

import keras

from examples.paper import provenance
from examples.paper import results
from examples.paper import search
from examples.paper.methods import METHODS
from examples.paper.methods import METHODS_VERSION
from examples.paper.results import Run

OUTPUT = pathlib.Path("output", "paper")
# Those of the authors.
SEEDS = (1, 2, 42)
# Of all trials, which so differ in their settings alone.
TRIAL_SEED = 0


class MissingDataError(ValueError):
    """Data or weights are not there, so that no run on them can work."""


@contextlib.contextmanager
def required(what):
    """Says that something is missing, of any error inside the block.

    Args:
        what: String, what is read there.
    """
    try:
        yield
    except Exception as error:  # Of the network, the disk, a licence.
        raise MissingDataError(f"{what} cannot be had: {error}") from error


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the experiments of a table are.

    Args:
        num_trials: Integer, the trials of each method's search.
        seeds: Tuple of integers, of the runs of the table.
        settings: Dict, whatever else the table's `run` needs to know.
    """

    num_trials: int
    seeds: tuple
    settings: dict


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Args:
        name: String.
        version: Integer. It goes up whenever what is run changes, so that
            results before and after are not mixed.
        datasets: Dict of name to whatever `run` takes as a data set. A data
            set has a `version`, a string.
        default_datasets: Tuple of those of them that are run by default.
        authors_datasets: Tuple of those that only `--authors` can have,
            because a search on them would see test data.
        methods: Tuple of keys of `METHODS`.
        authors_settings: Function of the name of a method that returns what
            `search.authors_settings` does.
        run: Function of a data set, the name of a method, settings, a seed,
            and the settings of a `Size` with `is_trial`, a boolean, and
            `backup`, the path of a folder for what a killed run left. It
            returns a dict that JSON takes: `validation_score`, of which more
            is better, and what was measured.
        sizes: Dict of name to `Size`: "full", "small" and "tiny".
    """

    name: str
    version: int
    datasets: dict
    default_datasets: tuple
    methods: tuple
    authors_settings: Callable
    run: Callable
    sizes: dict
    authors_datasets: tuple = ()


def main(table, description, arguments=None):
    """The command of a table.

    Args:
        table: `Table`.
        description: String, what `--help` says.
        arguments: List of strings; `None` (default) for the command line's.
    """
    options = parse(table, description, arguments)
    try:
        Harness(table, options).run_all(options.dataset, options.method)
    except ValueError as error:
        # Of the data or of results; what fails in a run is in its result.
        raise SystemExit(str(error)) from error
    print(
        f"All results are in {options.output}. As tables:\n"
        f"    python -m examples.paper.tables --output {options.output}"
    )


def parse(table, description, arguments):
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        choices=table.datasets,
        default=list(table.default_datasets),
        metavar="DATASET",
        help=f"of these: {', '.join(table.datasets)}; default: "
        f"{', '.join(table.default_datasets)}",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=table.methods,
        default=list(table.methods),
        metavar="METHOD",
        help=f"of these: {', '.join(table.methods)}; default: all",
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        nargs="+",
        help="default: those of the size",
    )
    parser.add_argument(
        "--size",
        choices=table.sizes,
        default="full",
        help="full: the paper's; small: fewer data and steps, the same model; "
        "tiny: a toy, which shows that it runs (default: full)",
    )
    parser.add_argument(
        "--authors",
        action="store_true",
        help="the authors' own settings, instead of the best of some trials",
    )
    parser.add_argument(
        "--output",
        type=folder_path,
        default=OUTPUT,
        metavar="FOLDER",
        help=f"where the results go, and are looked for (default: {OUTPUT})",
    )
    return parser.parse_args(arguments)


def seed_number(text):
    """The seed that an argument of the command line is."""
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(
            f"a seed is at least 0 and below 2**32, not {seed}"
        )
    return seed


def folder_path(text):
    """The folder, which may not exist yet, that an argument names."""
    path = pathlib.Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is no folder")
    return path


class Harness:
    """Makes the runs of a table that have no result.

    Args:
        table: `Table`.
        options: What `parse` returned.
    """

    def __init__(self, table, options):
        self.table = table
        self.options = options
        self.size = table.sizes[options.size]
        self.seeds = options.seed or self.size.seeds
        self.settings = "authors" if options.authors else "searched"
        self.seconds = []

    def run_all(self, datasets, methods):
        """Makes all runs of data sets and methods, and says how far it is."""
        # What is asked for twice is made once.
        plan = dict.fromkeys(
            run
            for dataset in datasets
            for method in methods
            for run in self.plan(dataset, method)
        )
        # Before the first run: whether what is there can be used.
        self.check(datasets, plan)
        num_waiting = sum(self.read(run) is None for run in plan)
        print(
            f"{len(plan)} runs, of which {len(plan) - num_waiting} have a "
            "result."
        )
        missing = {}
        for number, run in enumerate(plan, 1):
            if self.read(run) is None and run.dataset not in missing:
                print(f"{number} of {len(plan)}: {run}", flush=True)
                try:
                    self.make(run)
                except MissingDataError as error:
                    missing[run.dataset] = str(error)
                    print(f"    {error}")
                    continue
                num_waiting -= 1
                print(f"    {self.outcome(run)}{self.time_left(num_waiting)}")
        found = [result for run in plan if (result := self.read(run))]
        num_failed = sum(result["status"] != "done" for result in found)
        if num_failed:
            print(f"{num_failed} runs failed: their results say why.")
        if missing:
            raise MissingDataError(
                "\n".join(f"{name}: {why}" for name, why in missing.items())
            )

    def check(self, datasets, plan):
        """Raises a `ValueError` if what is asked for makes no sense."""
        for dataset in self.table.authors_datasets:
            if dataset in datasets and not self.options.authors:
                raise ValueError(
                    f"The data set '{dataset}' chooses by a part of the test "
                    "split, as the authors' code does. A search on it would "
                    "see what it is tested on: add `--authors`."
                )
        finals = [run for run in plan if not run.is_trial]
        # Those of seeds that are not asked for stand in the same table.
        finals += [
            dataclasses.replace(run, seed=seed)
            for run in finals
            for seed in self.size.seeds
        ]
        for run in {*finals}:
            result = self.read(run)
            if (
                result is not None
                and result["status"] == "done"
                and all(self.read(trial) for trial in self.trials(run))
                and result["settings"] != self.settings_of(run)
            ):
                raise ValueError(
                    f"The result '{run.path(self.options.output)}' has other "
                    "settings than the trials that are there now would "
                    "choose. Delete it, and those of the other seeds."
                )

    def plan(self, dataset, method):
        """The runs of a method on a data set: its trials, and then the rest."""

        def run(seed, **options):
            return Run(
                self.table.name,
                self.options.size,
                dataset,
                method,
                seed,
                settings=self.settings,
                **options,
            )

        num_trials = 0 if self.options.authors else self.size.num_trials
        return [
            *(run(trial, is_trial=True) for trial in range(num_trials)),
            *(run(seed) for seed in self.seeds),
        ]

    def versions(self, run):
        """What two results must have in common to stand in one table."""
        return {
            "the methods": METHODS_VERSION,
            f"the table {self.table.name}": self.table.version,
            f"the data set {run.dataset}": self.table.datasets[
                run.dataset
            ].version,
        }

    def read(self, run):
        return results.read(run, self.options.output, self.versions(run))

    def make(self, run):
        """Makes a run, and writes its result, whether it worked or not."""
        began = time.perf_counter()
        backup = run.path(self.options.output).with_suffix(".backup")
        keras.utils.clear_session()
        try:
            settings = self.settings_of(run)
            self.check_backup(run, backup, settings)
            seed = TRIAL_SEED if run.is_trial else run.seed
            keras.utils.set_random_seed(seed)
            measured = self.table.run(
                self.table.datasets[run.dataset],
                run.method,
                settings,
                seed,
                self.size.settings
                | {"is_trial": run.is_trial, "backup": backup},
            )
            result = {"status": "done", "settings": settings, **measured}
        except MissingDataError:
            shutil.rmtree(backup)
            raise
        except Exception as error:
            # Some errors have a traceback of their own behind the first line.
            reason = str(error).strip().partition("\n")[0]
            result = {
                "status": f"failed: {type(error).__name__}: {reason}",
                "traceback": traceback.format_exc(),
            }
        self.seconds.append(time.perf_counter() - began)
        results.write(
            run,
            self.options.output,
            result,
            {**provenance.describe(), "versions": self.versions(run)},
        )
        # There still if the run failed.
        shutil.rmtree(backup, ignore_errors=True)

    def check_backup(self, run, backup, settings):
        """Deletes what a killed run of something else has left."""
        made_by = {"versions": self.versions(run), "settings": settings}
        text = json.dumps(made_by)
        path = backup / "run.json"
        if path.exists() and path.read_bytes() != text.encode():
            shutil.rmtree(backup)
        backup.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def trials(self, run):
        """The trials that the settings of a run come from."""
        plan = self.plan(run.dataset, run.method)
        return [other for other in plan if other.is_trial]

    def settings_of(self, run):
        """The settings of a run; of one of the table, those of the best trial.

        Raises:
            ValueError: If no trial worked.
        """
        method = METHODS[run.method]
        authors = self.table.authors_settings(run.method)
        if run.is_trial:
            return search.trial_settings(method, authors, run.seed)
        trials = [self.read(trial) for trial in self.trials(run)]
        if not trials:
            return authors
        worked = [
            trial
            for trial in trials
            if trial["status"] == "done"
            # Of a trial that diverged it can be NaN.
            and math.isfinite(trial["validation_score"])
        ]
        if not worked:
            raise ValueError("No trial of the search worked.")
        return max(worked, key=lambda t: t["validation_score"])["settings"]

    def outcome(self, run):
        """String, how a run went."""
        result = self.read(run)
        if result["status"] != "done":
            path = run.path(self.options.output)
            return f"{result['status']} ({path}; delete it to try again)"
        return f"validation {result['validation_score']:.4f}"

    def time_left(self, num_waiting):
        """String, how long the runs that wait will take."""
        seconds = num_waiting * sum(self.seconds) / len(self.seconds)
        left = datetime.timedelta(seconds=round(seconds))
        return f", about {left} left" if num_waiting else ""
