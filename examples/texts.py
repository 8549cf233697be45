"""Texts to train on and to test on, each with a label.

The standard library alone, so that what is wrong with a file is said before
Keras is imported.
"""

import ast
import collections
import csv
import pathlib
import random
import sys
import sysconfig

NUM_CLASSES = 16
NUM_TRAINING_TEXTS = 960
NUM_TEST_TEXTS = 320


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
            packages[package].append([(text, package) for text in docstrings])
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


def _read_docstrings(path):
    """The docstrings of a Python file that have a few words at least."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]
    return [text for text in docstrings if text and len(text.split()) >= 4]


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
