"""The benchmark beside PEFT's and the authors' own steps."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks import peers

pytestmark = pytest.mark.always_one_backend
# By whose it is and the method, seconds of two rounds. In the second one the
# machine was half as fast, which no ratio shows.
SECONDS = {
    **{f"ours: {method}": [2.0, 4.0] for method in peers.OURS},
    **{f"PEFT: {method}": [2.5, 5.0] for method in peers.PEFTS},
    "ours: none": [1.0, 2.0],
    "PEFT: none": [1.0, 2.0],
    "ours: FVAE-LoRA": [3.0, 6.0],
    "authors: FVAE-LoRA as published": [5.0, 10.0],
}


def test_ratios_are_those_of_each_round():
    ratios = peers.ratios(SECONDS)
    assert ratios["none, by PEFT's"] == (1.0, 1.0)
    assert ratios["DoRA, by PEFT's"] == (0.8, 1.0)
    assert ratios["FVAE-LoRA, by PEFT's LoRA"] == (1.2, 1.0)
    assert ratios["FVAE-LoRA, by the authors'"] == (0.6, 1.0)
    of_the_method = "FVAE-LoRA less the frozen model, by the authors'"
    assert ratios[of_the_method] == (0.5, 0.5)
    alone = {n: s for n, s in SECONDS.items() if not n.startswith("authors")}
    assert not [name for name in peers.ratios(alone) if "authors'" in name]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_folder_without_the_authors_code_is_refused(tmp_path):
    result = run("--authors", tmp_path)
    assert result.returncode == 2
    assert "a folder peft/src/peft" in result.stderr


@pytest.mark.slow
def test_it_runs(tmp_path):
    result = run(
        *("--batch-sizes", 1, "--rounds", 1, "--output", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert "HiRA, by PEFT's" in result.stdout
    (seconds,) = json.loads((tmp_path / "peers.json").read_text()).values()
    assert len(seconds) == len(peers.OURS) + len(peers.PEFTS)
    assert all(taken[0] > 0 for taken in seconds.values())
