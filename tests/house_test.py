"""The house: five floors, and what must not be on each."""

import ast
import pathlib

import pytest

import keras_fvae

ROOT = pathlib.Path(keras_fvae.__file__).parent
# A floor imports from those below it, and from itself.
FLOORS = {
    "backend": 1,
    "layers": 2,
    "model": 3,
    "methods": 3,
    "callbacks": 4,
    "analysis": 4,
    "integrations": 4,
    "optimizers": 4,
    "fvae_lora": 4,
    "__init__": 5,
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
}


def room(module):
    return module.split(".")[0]


def imports(module):
    """The modules of this package that a module imports, at any place."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module.split(".")[0] == "keras_fvae":
            parent = node.module.removeprefix("keras_fvae").strip(".")
            for alias in node.names:
                full = f"{parent}.{alias.name}".strip(".")
                # A module, a room, or what a module has.
                found = (full, f"{full}.__init__", parent)
                yield next(name for name in found if name in MODULES)


IMPORTS = {module: {*imports(module)} for module in MODULES}


@pytest.mark.always_one_backend
@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    ours = FLOORS[room(module)]
    for other in IMPORTS[module]:
        if room(other) != room(module):
            assert FLOORS[room(other)] < ours or (
                # Two rooms beside each other.
                FLOORS[room(other)] == ours == 4
            ), f"{module} imports {other}"


@pytest.mark.always_one_backend
def test_imports_have_no_circle():
    """But the config of FVAE-LoRA, which names its adapter when asked."""
    known_lazily = {("methods.fvae.config", "methods.fvae.adapter")}
    open_modules, done = [], set()

    def visit(module):
        assert module not in open_modules, [*open_modules, module]
        if module in done:
            return
        open_modules.append(module)
        for other in IMPORTS[module]:
            if (module, other) not in known_lazily:
                visit(other)
        done.add(open_modules.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.always_one_backend
@pytest.mark.parametrize("lower", ["model", "layers", "backend"])
def test_methods_are_known_to_nothing_below(lower):
    for module in MODULES:
        if room(module) == lower:
            rooms = {room(other) for other in IMPORTS[module]}
            assert "methods" not in rooms, module


@pytest.mark.always_one_backend
def test_no_method_knows_models():
    for module in MODULES:
        if room(module) == "methods":
            assert "model" not in map(room, IMPORTS[module]), module


@pytest.mark.always_one_backend
@pytest.mark.parametrize(
    "private",
    [
        "config.backend()",
        "keras.src",
        "import torch",
        "import jax",
        "import tensorflow",
    ],
)
def test_only_the_backend_floor_asks_for_the_backend(private):
    for module, path in MODULES.items():
        if room(module) != "backend":
            assert private not in path.read_text(), module


@pytest.mark.always_one_backend
def test_dir_shows_the_public_names_alone():
    shown = {*dir(keras_fvae)}
    assert shown == {*keras_fvae.__all__, "__version__", "plots"}
    assert all(hasattr(keras_fvae, name) for name in shown)
    assert keras_fvae.__version__.count(".") == 2
