"""The benchmark of one GPU runs at a toy size, and says what does not."""

import itertools
import json
import time
import zipfile

import pytest
from helpers import BACKEND
from helpers import run_python
from packaging.requirements import Requirement

from benchmarks import device
from benchmarks import wheels
from benchmarks.models import CONFIGS
from benchmarks.models import DEVICE_METHODS
from benchmarks.models import METHODS
from benchmarks.models import SIZES

pytestmark = pytest.mark.always_one_backend
starts_backends = pytest.mark.skipif(
    BACKEND != "torch", reason="it starts all backends itself"
)


def make_rows(*rows):
    """Rows of which nothing is known yet, on PyTorch."""
    return [
        {
            "engine": "PyTorch",
            "size": size,
            "dtype": "float32",
            "method": method,
            "rank": 4,
            "status": device.NOT_RUN,
        }
        for size, method in rows
    ]


def make_report(rows):
    environment = {
        "device": "a GPU",
        "built_for": "CUDA",
        "float32_matmul_precision": "highest",
    }
    provenance = {
        "date": "today",
        "gpu": None,
        "cores": 2,
        "versions": {"keras": "3"},
        "backends": {"torch": environment, "jax": {"status": "failed"}},
    }
    return {"provenance": provenance, "rows": rows}


def test_all_combinations_are_planned_and_the_methods_first():
    rows = device.plan(DEVICE_METHODS)
    assert len(set(rows)) == len(rows)
    for size in device.MODELS:
        for engine in device.ENGINES:
            for dtype in device.DTYPES:
                for method in DEVICE_METHODS:
                    row = device.Row(engine, size, dtype, method, device.RANK)
                    assert row in rows
    assert {row.size for row in rows} <= set(SIZES)
    assert {row.method for row in rows} == set(DEVICE_METHODS)
    # With growth, and each method on one model at least.
    first = rows[: 22 + len(DEVICE_METHODS)]
    assert {row.engine for row in first} == set(device.ENGINES)
    assert {row.method for row in first} == set(DEVICE_METHODS)
    assert {row.size for row in first} >= set(device.MODELS)


def test_what_is_measured_is_all_that_trains_and_the_head():
    assert set(METHODS) - set(DEVICE_METHODS) == {"finalized", "merged"}
    assert {"base", "LoRA", "FVAE-LoRA", *CONFIGS} < set(DEVICE_METHODS)


def test_without_time_each_row_says_that_it_was_not_run():
    rows = make_rows(("tiny", "base"), ("tiny", "LoRA"))
    workers = {}
    device.measure_all(rows, time.monotonic(), 0.0, workers, save=None)
    assert not workers
    table = device.as_markdown(make_report(rows))
    assert "| tiny | float32 | PyTorch | all (not run: out of time) |" in table


def test_the_table_has_the_medians_and_the_words():
    rows = make_rows(("tiny", "base"), ("tiny", "LoRA"), ("tiny", "FVAE-LoRA"))
    rows[0] |= {
        "status": "done",
        "first": 1.234,
        "train": [0.001, 0.002, 0.009],
        "predict": [0.001],
        "peak": 512.0,
    }
    rows[1] |= {"status": "failed: a | b", "first": 1.0}
    table = device.as_markdown(make_report(rows)).splitlines()
    assert table[2].endswith("| base, rank 4 | 2.0 | 1.23 | 1.0 | 0.50 |")
    assert table[3].endswith("| LoRA, rank 4 (failed: a / b) |  | 1.00 |  |  |")
    assert table[4].endswith(
        "| FVAE-LoRA, rank 4 (not run: out of time) |  |  |  |  |"
    )


def test_a_file_is_whole_and_replaced(tmp_path):
    for status in ("not run: out of time", "done"):
        report = make_report(make_rows(("tiny", "base")))
        report["rows"][0]["status"] = status
        device.write(report, tmp_path / "new")
        written = (tmp_path / "new" / "device.json").read_text()
        assert json.loads(written) == report
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.slow
@starts_backends
def test_what_fails_says_so_and_the_rest_goes_on():
    rows = make_rows(
        ("no such model", "base"),
        ("tiny", "LoRA"),
        # Its process is killed before it is asked.
        ("tiny", "base"),
        ("tiny", "FVAE-LoRA"),
    )
    workers = {}

    def save():
        if rows[1]["status"] == "done" and "seconds" not in rows[2]:
            workers["torch"].process.kill()

    try:
        device.measure_all(rows, time.monotonic() + 600, 0.0, workers, save)
        assert rows[0]["status"] == "failed: KeyError: 'no such model'"
        # The first line of an error is seldom the one that says why.
        assert "figures.py" in rows[0]["traceback"]
        assert rows[2]["status"] == "failed: the process ended with code -9"
        for row in (rows[1], rows[3]):
            assert row["status"] == "done"
            assert row.keys() >= {"first", "train", "predict", "peak"}
        # One that takes longer than there is time for is given up.
        (late,) = make_rows(("tiny", "FVAE-LoRA"))
        device.measure(late, time.monotonic() + 0.01, 0.0, workers)
        assert late["status"] == "stopped after 0 s"
        assert not workers
    finally:
        for worker in workers.values():
            worker.end()


@pytest.mark.slow
@starts_backends
def test_every_line_runs_at_a_toy_size(tmp_path):
    run_python("-m", "benchmarks.device", "--quick", "--output", tmp_path)
    report = json.loads((tmp_path / "device.json").read_text())
    rows = report["rows"]
    for row in rows:
        assert row["status"] == "done", row
        assert row["first"] > 0
        assert min(row["train"] + row["predict"]) > 0
        assert (row["peak"] is not None) == (row["engine"] == "JAX")
    sizes = {"tiny", "tiny BERT", "tiny Llama"}
    wanted = {
        *itertools.product(["PyTorch"], ["tiny"], DEVICE_METHODS),
        *itertools.product(["PyTorch"], sizes, ["LoRA", "FVAE-LoRA"]),
        *itertools.product(["JAX"], sizes, ["FVAE-LoRA"]),
        ("PyTorch, compiled", "tiny Llama", "FVAE-LoRA"),
    }
    assert wanted <= {(r["engine"], r["size"], r["method"]) for r in rows}
    assert {row["dtype"] for row in rows} == set(device.DTYPES)
    assert {row["rank"] for row in rows} == {4, 16, 64}
    assert report["provenance"]["backends"].keys() == {"jax", "torch"}
    assert report["provenance"]["versions"].keys() >= {"keras", "torch", "jax"}
    table = (tmp_path / "device.md").read_text()
    assert table.count("\n| tiny") == len(rows)


def test_needs_are_those_of_the_other_machine(tmp_path):
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            "some_package-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n"
            "Requires-Dist: always>=2\n"
            "Requires-Dist: old; python_version < '3.12'\n"
            "Requires-Dist: asked; extra == 'hub'\n"
            "Requires-Dist: unasked; extra == 'test'\n",
        )
    found = wheels.wheels(tmp_path)
    for requirement, version, names in (
        ("some-package", "3.11", ["always", "old"]),
        ("some-package[hub]", "3.12", ["always", "asked"]),
    ):
        needs = wheels.needs(Requirement(requirement), found, version)
        assert [need.name for need in needs] == names


@pytest.mark.parametrize("version", ["x.y", "3", "2.7", "3.12.1"])
def test_what_is_no_version_of_python_is_refused(version, tmp_path, capsys):
    arguments = [str(tmp_path / "wheels"), "--python-version", version]
    with pytest.raises(SystemExit):
        wheels.main(arguments)
    assert f"not '{version}'" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
