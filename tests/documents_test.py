"""Every command and example of the README, the guides and the docstrings."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import shlex
import subprocess
import tomllib

import jupytext
import keras
import nbclient
import nbformat
import numpy as np
import pytest
from helpers import BACKEND
from helpers import ROOT

import keras_fvae

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GUIDES = sorted((ROOT / "guides").glob("*.py"))
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(keras_fvae.__path__, "keras_fvae.")
)
PUBLIC = [
    getattr(namespace, name)
    for namespace in (keras_fvae, keras_fvae.optimizers)
    for name in namespace.__all__
    if name != "optimizers"
]


def blocks(language, document=README):
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


@pytest.mark.one_backend
@pytest.mark.parametrize("example", blocks("python"))
def test_python_of_the_readme(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.always_one_backend
def test_the_readme_has_examples():
    assert len(blocks("python")) == 7
    assert "model.backbone.enable_fvae_lora(rank=16)" in blocks("python")[0]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "command",
    [
        line.split("#")[0].strip()
        for document in (README, (ROOT / "CONTRIBUTING.md").read_text())
        for block in blocks("shell", document)
        for line in block.splitlines()
    ],
)
def test_commands(command):
    words = shlex.split(command)
    if words[0] == "make":
        # What they run is run by the tests; that they know it, is asked here.
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True)
        return
    assert words[:2] == ["pip", "install"]
    name, _, extras = words[-1].rstrip("]").partition("[")
    if extras:
        assert name == PROJECT["name"]
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    else:
        assert name in (ROOT / "constraints.txt").read_text()


def links(document):
    return re.findall(r"\]\(([^)\s]+)\)", document)


@pytest.mark.always_one_backend
def test_links_of_the_readme_lead_somewhere_on_the_index_too():
    """Where it is shown without the repository around it."""
    ours = []
    for target in links(README):
        assert target.startswith("https://"), target
        # A document by its page, a picture as it is.
        kind = "raw" if target.endswith((".svg", ".png")) else "blob"
        prefix = f"{PROJECT['urls']['Homepage']}/{kind}/main/"
        if target.startswith(PROJECT["urls"]["Homepage"]):
            assert (ROOT / target.removeprefix(prefix)).is_file(), target
            ours.append(target)
    assert ours


@pytest.mark.always_one_backend
@pytest.mark.parametrize(
    "name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
)
def test_other_documents_name_what_is_there(name):
    """Files by their links, and by the paths that they have in code."""
    document = (ROOT / name).read_text()
    for target in links(document):
        assert target.startswith("https://") or (ROOT / target).is_file()
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+)`", document):
        if "your_method" not in path:
            assert (ROOT / path).is_file(), path


def read_notebook(guide):
    return nbformat.read(guide.with_suffix(".ipynb"), as_version=4)


@pytest.mark.always_one_backend
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_notebooks_are_those_of_the_guides(guide):
    cells = read_notebook(guide).cells
    written = jupytext.read(guide)
    assert [(cell.cell_type, cell.source) for cell in cells] == [
        (cell.cell_type, cell.source) for cell in written.cells
    ], f"Make the notebook of {guide.name} anew: `make notebooks`."


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guides_run_as_notebooks(guide, tmp_path):
    if guide.stem == "distributed" and BACKEND != "jax":
        pytest.skip("It chooses its backends itself.")
    notebook = read_notebook(guide)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3"
    )
    client.execute(cwd=tmp_path)


@pytest.mark.always_one_backend
@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(
        module,
        extraglobs={"keras": keras, "keras_fvae": keras_fvae, "np": np},
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert results.failed == 0


@pytest.mark.always_one_backend
@pytest.mark.parametrize("public", PUBLIC, ids=lambda p: p.__name__)
def test_public_docstrings(public):
    sections = ["Example:"]
    if inspect.signature(public).parameters:
        sections.append("Args:")
    for section in sections:
        assert section in public.__doc__, section


@pytest.mark.always_one_backend
def test_the_project_speaks_of_itself_alone():
    files = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    foreign = re.compile(r"/work/|/root/|/tmp/|pypi\.org|pythonhosted")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".txt", ".toml", ".yml", ".ipynb"):
            assert path == pathlib.Path(__file__) or not foreign.search(
                path.read_text()
            ), name
