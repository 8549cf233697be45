"""Texts to train on and to test on, each with a label.

The standard library alone, so that what is wrong with a file is said before
Keras is imported.
"""

import ast
import collections
import csv
import importlib.metadata
import pathlib
import random
import sys
import sysconfig

NUM_CLASSES = 16
NUM_TRAINING_TEXTS = 960
NUM_TEST_TEXTS = 320
# By what it installs as, the folder of each package that is tested on.
OTHER_PACKAGES = {"numpy": "numpy", "scikit-learn": "sklearn"}
# What a docstring is of, by its node of the syntax tree.
KINDS = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}


def read_standard_library():
    """Docstrings labelled with their package, split by module.

    Returns:
        As `read_csv`.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    packages = collections.defaultdict(list)
    for path in sorted(library.glob("*/**/*.py")):
        package, *inside = path.relative_to(library).parts
        if {package, *inside} & {"site-packages", "test", "tests"}:
            continue
        if docstrings := _read_docstrings(path):
            packages[package].append(
                [(text, package) for _, text in docstrings]
            )
    # With fewer modules none would be left to test on.
    packages = [modules for modules in packages.values() if len(modules) >= 3]
    packages.sort(key=lambda modules: -sum(map(len, modules)))
    train, test = [], []
    for modules in packages[:NUM_CLASSES]:
        # A quarter of the package goes to the test, never the largest module.
        num_test = sum(map(len, modules)) / 4
        largest, *others = sorted(modules, key=len, reverse=True)
        train.extend(largest)
        for module in random.Random(0).sample(others, len(others)):
            (test if num_test > 0 else train).extend(module)
            num_test -= len(module)
    return _sample(train, NUM_TRAINING_TEXTS), _sample(test, NUM_TEST_TEXTS)


def read_kinds():
    """Docstrings labelled with what they are of: a module, class or function.

    Returns:
        As `read_csv`: the standard library's to train on, and those of other
        packages to test on, as many of each kind.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    own = [
        path
        for path in library.iterdir()
        if path.is_dir() and path.name not in ("site-packages", "test")
    ]
    others = [
        pathlib.Path(sysconfig.get_path("purelib"), name)
        for name in OTHER_PACKAGES.values()
    ]
    train = _read_kinds_of(own)
    # Some texts are in both, such as that of a vendored module.
    return (
        _sample_each_kind(train, NUM_TRAINING_TEXTS),
        _sample_each_kind(_read_kinds_of(others) - train, NUM_TEST_TEXTS),
    )


def version_of(package):
    """String, the name and version of an installed package."""
    return f"{package} {importlib.metadata.version(package)}"


def _read_kinds_of(folders):
    """Set of pairs of a docstring in folders and its kind."""
    return {
        (text, kind)
        for folder in folders
        for path in folder.glob("**/*.py")
        for kind, text in _read_docstrings(path)
    }


def _sample_each_kind(pairs, number):
    """Some pairs of a docstring and its kind, as many of each kind."""
    kinds = sorted({*KINDS.values()})
    return [
        pair
        for kind in kinds
        for pair in _sample(
            sorted(pair for pair in pairs if pair[1] == kind),
            number // len(kinds),
        )
    ]


def _read_docstrings(path):
    """The docstrings of a Python file that have a few words at least.

    Args:
        path: `pathlib.Path`.

    Returns:
        List of pairs of what it is of and the text.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    docstrings = [
        (KINDS[type(node)], ast.get_docstring(node))
        for node in ast.walk(tree)
        if type(node) in KINDS
    ]
    return [
        (kind, text)
        for kind, text in docstrings
        if text and len(text.split()) >= 4
    ]


def read_csv(path, text_column, label_column):
    """Texts and labels of a CSV file, split at random.

    Args:
        path: Path of the file.
        text_column: String, the name of a column.
        label_column: String, the name of another.

    Returns:
        Texts to train on and texts to test on, two lists of pairs of a text
        and its label.
    """
    columns = [text_column, label_column]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for column in columns:
                if column not in (reader.fieldnames or []):
                    sys.exit(
                        f"{path} has no column '{column}'. Its columns are: "
                        f"{', '.join(reader.fieldnames or [])}"
                    )
            rows = [(row[text_column], row[label_column]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"Cannot read {path}: {error}")
    by_label = collections.defaultdict(list)
    for row in rows:
        by_label[row[1]].append(row)
    if len(by_label) < 2 or min(map(len, by_label.values())) < 4:
        counts = {label: len(texts) for label, texts in by_label.items()}
        sys.exit(
            f"{path} must have two labels or more, and each at least four "
            f"texts. Found: {counts}"
        )
    train, test = [], []
    for texts in by_label.values():
        # A quarter of each label's.
        random.Random(0).shuffle(texts)
        test.extend(texts[: len(texts) // 4])
        train.extend(texts[len(texts) // 4 :])
    return train, test


def _sample(texts, number):
    return random.Random(0).sample(texts, min(number, len(texts)))
