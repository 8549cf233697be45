"""What a release says of itself, in one place as in the other."""

import ast
import re
import sys
import tomllib

import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import keras_fvae

pytestmark = pytest.mark.always_one_backend
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
# The extras that the package itself imports from, when it is asked to.
USED_EXTRAS = ("tensorflow", "jax", "torch", "hub", "analysis")
# What is imported under another name than it is installed by.
DISTRIBUTIONS = {"keras_hub": "keras-hub", "sklearn": "scikit-learn"}
# Where an error says how to install it.
ASKED_FOR = {"huggingface_hub"}


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text())


def pins(name):
    """Dict of distribution to version, of a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(
        line.split(";")[0].strip().split("==")
        for line in lines
        if not line.startswith("#")
    )


def requirements(*extras):
    found = [*PROJECT["dependencies"]]
    for extra in extras:
        found += PROJECT["optional-dependencies"][extra]
    return {one.name: one for one in map(Requirement, found)}


def test_the_version_is_the_same_everywhere():
    version = keras_fvae.__version__
    assert read_yaml("CITATION.cff")["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text()
    entry = rf"^## \[?{re.escape(version)}\]? - \d{{4}}-\d\d-\d\d$"
    assert re.search(entry, changelog, re.MULTILINE), entry


def test_what_is_imported_is_asked_for():
    imported = set()
    for path in (ROOT / "keras_fvae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    tops = {module.split(".")[0] for module in imported}
    tops -= {*sys.stdlib_module_names, "keras_fvae"} | ASKED_FOR
    asked = requirements(*USED_EXTRAS)
    assert {DISTRIBUTIONS.get(top, top) for top in tops} == {*asked}


def test_lower_bounds_are_those_that_are_tested():
    bounds = {}
    for name, requirement in requirements(*USED_EXTRAS).items():
        (lower,) = (s for s in requirement.specifier if s.operator == ">=")
        bounds[name] = Version(lower.version)
    tested = pins("constraints-lowest.txt")
    assert {name: Version(tested[name]) for name in tested} == bounds


def test_python_versions_are_those_that_are_tested():
    matrix = read_yaml(WORKFLOWS / "test.yml")["jobs"]["test"]["strategy"]
    tested = matrix["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    named = [
        classifier.removeprefix(prefix)
        for classifier in PROJECT["classifiers"]
        if re.fullmatch(rf"{prefix}3\.\d+", classifier)
    ]
    assert tested == named
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_commits_are_linted_as_make_lint_does():
    versions = pins("constraints.txt")
    hooks = read_yaml(".pre-commit-config.yaml")["repos"]
    assert [hook["rev"] for hook in hooks] == [
        f"v{versions['ruff']}",
        f"v{versions['codespell']}",
    ]
