"""The types that the package promises by its `py.typed`.

`make lint` has mypy and pyright read `typing_cases`: what users write, and
what they are to be told is wrong.
"""

import functools
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import typing

import pytest
from helpers import MODULES
from helpers import PUBLIC

import keras_fvae

pytestmark = pytest.mark.always_one_backend
PLOTS = [
    plot for name, plot in vars(keras_fvae.plots).items() if "plot_" in name
]


def function_of(member):
    """The function that a module or class has a member for, if it is one."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    elif isinstance(member, classmethod):
        member = member.__func__
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, types.FunctionType) else None


def functions_of(owner):
    """Dict of name to function, of what a module or class defines itself."""
    functions = {}
    for name, member in vars(owner).items():
        if name == "__init__" or not name.startswith("_"):
            function = function_of(member)
            # Such as what `dataclasses` and `NamedTuple` make is left out.
            if function is not None and "<" not in (
                f"{function.__qualname__}{function.__code__.co_filename}"
            ):
                functions[f"{owner.__name__}.{name}"] = function
            elif inspect.isclass(member) and inspect.ismodule(owner):
                functions |= functions_of(member)
    return {
        name: function
        for name, function in functions.items()
        if function.__module__ == getattr(owner, "__module__", owner.__name__)
    }


@pytest.mark.parametrize("name", MODULES)
def test_signatures_have_types_that_evaluate(name):
    for path, function in functions_of(importlib.import_module(name)).items():
        parameters = {*inspect.signature(function).parameters}
        hints = typing.get_type_hints(function)
        missing = {*parameters, "return"} - {*hints} - {"self", "cls"}
        assert not missing, f"{path}: {missing}"


@pytest.mark.parametrize("public", [*PUBLIC, *PLOTS], ids=lambda p: p.__name__)
def test_docstrings_name_the_parameters(public):
    section = re.search(
        r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(public), re.DOTALL | re.M
    )
    described = re.findall(
        r"^    \**(\w+): ", section[1] if section else "", re.M
    )
    assert described == [*inspect.signature(public).parameters]


def test_pyright_knows_all_types_but_keras_classes():
    """A class that derives from one of Keras's, which has no types."""
    folder = pathlib.Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        # It would look for a newer version of itself.
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
    }
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pyright", "--outputjson"),
            *("--verifytypes", "keras_fvae", "--ignoreexternal"),
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    found = json.loads(result.stdout)["typeCompleteness"]
    assert found["exportedSymbolCounts"]["withAmbiguousType"] == 0
    assert found["exportedSymbolCounts"]["withKnownType"] > 1000
    errors = {
        diagnostic["message"]: symbol["name"]
        for symbol in found["symbols"]
        for diagnostic in symbol["diagnostics"]
        if diagnostic["severity"] == "error"
    }
    for message, name in errors.items():
        assert re.match("Type of (base class|metaclass)", message) or (
            # A parameter or result that is an object of such a class.
            re.search(r'type is "\w*Adapter"', message)
        ), f"{name}: {message}"
