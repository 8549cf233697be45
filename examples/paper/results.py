"""The results of runs: one JSON file each, which is never changed after."""

import dataclasses
import json
import pathlib


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a table.

    Args:
        table: String, the table that it is for.
        size: String, how large the experiment is: "full", "small" or "tiny".
        dataset: String.
        method: String.
        seed: Integer. Of a trial, its number.
        is_trial: Boolean. Whether it is of the search for settings, and not of
            the table itself.
        settings: String, "searched" or "authors".
    """

    table: str
    size: str
    dataset: str
    method: str
    seed: int
    is_trial: bool = False
    settings: str = "searched"

    def __str__(self):
        kind = "trial" if self.is_trial else "seed"
        return f"{self.dataset}, {self.method}, {kind} {self.seed}"

    def path(self, folder):
        """Path of its file, in the folder of all results."""
        kind = "trial" if self.is_trial else self.settings
        return pathlib.Path(
            folder,
            self.table,
            self.size,
            self.dataset,
            f"{self.method}_{kind}_{self.seed}.json",
        )


def write(run, folder, result, provenance):
    """Writes the file of a run, whole or not at all.

    Args:
        run: `Run`.
        folder: Path of the folder of all results.
        result: Dict, with a `status` and what was measured.
        provenance: Dict, with the `versions` that the result depends on.

    Raises:
        FileExistsError: If the run has a file already.
    """
    path = run.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "run": dataclasses.asdict(run),
        **result,
        "provenance": provenance,
    }
    if path.exists():
        raise FileExistsError(f"The result '{path}' is there already.")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


def read(run, folder, versions):
    """The result of a run, or `None` if there is none yet.

    Args:
        run: `Run`.
        folder: Path of the folder of all results.
        versions: Dict of name to version: what it must have been made with.

    Raises:
        ValueError: If the file is damaged, of another run, or of other
            versions.
    """
    path = run.path(folder)
    if not path.exists():
        return None
    result = load(path)
    if result["run"] != dataclasses.asdict(run):
        raise ValueError(
            f"The result '{path}' is of another run, {result['run']}. Delete "
            "it, or give it back its name."
        )
    made_with = result["provenance"]["versions"]
    for name, version in versions.items():
        if made_with.get(name) != version:
            raise ValueError(
                f"The result '{path}' was made with {name} "
                f"{made_with.get(name)}; here is {name} {version}. Results of "
                "different versions are not mixed: choose another folder by "
                "`--output`, or delete that one."
            )
    return result


def load(path):
    """What a file of a run holds.

    Args:
        path: Path of the file.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        result = json.loads(path.read_text())
        if not (
            isinstance(result["run"], dict)
            and isinstance(result["status"], str)
            and isinstance(result["provenance"]["versions"], dict)
        ):
            raise TypeError("an entry is of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The result '{path}' is damaged ({error}). Delete it, and the run "
            "is made anew."
        ) from error
    return result
