"""Every command and example of the README, the site, and the docstrings."""

import doctest
import importlib
import inspect
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jupytext
import keras
import nbclient
import nbformat
import numpy as np
import pytest
import yaml
from family import CONFIGS
from helpers import BACKEND
from helpers import MODULES
from helpers import PUBLIC
from helpers import ROOT

import keras_fvae
from keras_fvae.model import files
from keras_fvae.model import record
from keras_fvae.model import state

README = (ROOT / "README.md").read_text()
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOMEPAGE = PROJECT["urls"]["Homepage"]
SITE = PROJECT["urls"]["Documentation"]
GUIDES = sorted((ROOT / "guides").glob("*.py"))


def blocks(language, document):
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name", [name for name, text in DOCUMENTS.items() if "```python" in text]
)
def test_python_of_the_documents(name, tmp_path, monkeypatch, capsys):
    """The examples of a page go on from each other, and print what it says."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for example in blocks("python", DOCUMENTS[name]):
        exec(compile(example, name, "exec"), namespace)
    printed = capsys.readouterr().out
    for output in blocks("text", DOCUMENTS[name]):
        assert output in printed


@pytest.mark.always_one_backend
def test_the_readme_is_short_and_has_an_example():
    assert len(README.splitlines()) <= 150
    [example] = blocks("python", README)
    assert "model.backbone.enable_fvae_lora(rank=16)" in example


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "command",
    sorted(
        {
            line.split("#")[0].strip()
            for document in DOCUMENTS.values()
            for block in blocks("shell", document)
            for line in block.replace("\\\n", "").splitlines()
        }
        - {""}
    ),
)
def test_commands(command):
    words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", command))
    if words[0] == "make":
        # What they run is run by the tests; that they know it, is asked here.
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True)
        return
    if words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
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


def pages_of(nav):
    """The addresses of the site's pages, as links have them."""
    for entry in nav:
        [inner] = entry.values() if isinstance(entry, dict) else [entry]
        if isinstance(inner, list):
            yield from pages_of(inner)
        else:
            yield f"{inner.removesuffix('.md')}/".removeprefix("index/")


@pytest.mark.always_one_backend
def test_links_of_the_readme_lead_somewhere_on_the_index_too():
    """Where it is shown without the repository around it."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["site_url"] == SITE
    assert site["extra"]["repository"] == HOMEPAGE
    pages = {*pages_of(site["nav"])}
    num_pages = 0
    for target in links(README):
        assert target.startswith("https://"), target
        # A document by its page, a picture as it is.
        kind = "raw" if target.endswith((".svg", ".png")) else "blob"
        if target.startswith(HOMEPAGE):
            prefix = f"{HOMEPAGE}/{kind}/main/"
            assert (ROOT / target.removeprefix(prefix)).is_file(), target
        if target.startswith(SITE):
            page, _, _ = target.removeprefix(SITE).partition("#")
            assert page in pages, target
            num_pages += 1
    assert num_pages > 10


@pytest.mark.always_one_backend
@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md", "SECURITY.md"])
def test_documents_name_what_is_there(name):
    """Files of the repository by their links, and by their paths in code."""
    document = (ROOT / name).read_text()
    prefixes = [f"{HOMEPAGE}/{kind}/main/" for kind in ("blob", "tree", "raw")]
    for target in links(document):
        for prefix in prefixes:
            if target.startswith(prefix):
                path = target.removeprefix(prefix)
                assert (ROOT / path).exists(), target
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+)`", document):
        if "your_method" not in path:
            assert (ROOT / path).is_file(), path


@pytest.mark.always_one_backend
def test_the_reference_has_every_public_name():
    shown = [
        name
        for path, document in DOCUMENTS.items()
        if path.startswith("docs/reference/")
        for name in re.findall(r"^::: (\S+)$", document, re.MULTILINE)
    ]
    plots = keras_fvae.plots
    public = [
        *(f"keras_fvae.{n}" for n in keras_fvae.__all__ if n != "optimizers"),
        *(f"keras_fvae.optimizers.{n}" for n in keras_fvae.optimizers.__all__),
        *(
            f"{plots.__name__}.{name}"
            for name, function in inspect.getmembers(plots, inspect.isfunction)
            if function.__module__ == plots.__name__ and name[0] != "_"
        ),
    ]
    assert {*public} <= {*shown}
    assert len({*shown}) == len(shown)


@pytest.mark.always_one_backend
def test_the_file_format_is_written_down_whole(tmp_path):
    document = DOCUMENTS["docs/file_format.md"]
    names = {*state.RECORD_TYPES, *state.RECORD_TYPES["adapted"]}
    for label, config in CONFIGS.items():
        if label == "Shift":
            continue
        for include in ("all", "inference"):
            model = keras.Sequential(
                [keras.Input((4,)), keras.layers.Dense(3, name="query")]
            )
            keras_fvae.enable_adapter(model, config)
            arrays = keras_fvae.get_adapter(model, include).arrays
            names |= {name.removeprefix("layers/query/") for name in arrays}
    for name in names:
        assert f"`{name}`" in document, name
    assert f"| `format` | `{files.FORMAT}` |" in document
    assert f"| `version` | `{files.VERSION}`;" in document
    assert f"Its `version` is {record.VERSION}." in document


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    result = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    page = tmp_path / "site" / "reference" / "configs" / "index.html"
    assert "keras_fvae.FVAELoRAConfig" in page.read_text()


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


SUFFIXES = (".py", ".md", ".txt", ".toml", ".yml", ".ipynb", ".json")


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
        if path.suffix in SUFFIXES:
            assert path == pathlib.Path(__file__) or not foreign.search(
                path.read_text()
            ), name
