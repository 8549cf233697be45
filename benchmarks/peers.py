"""Whole training steps beside PEFT's, and beside the authors' FVAE-LoRA.

    make bench-peers
    make bench-peers PEERS="--authors FOLDER"

ViT-B/16 with 4 blocks on PyTorch, which is not compiled: KerasHub's with the
methods of this package, transformers' with those of PEFT, and with FVAE-LoRA of
the authors' fork of PEFT, if FOLDER is a clone of its repository
(https://github.com/idiap/FVAE-LoRA). Each is a process of its own, and they
take turns.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from benchmarks.beside_peft import ENVIRONMENT
from benchmarks.beside_peft import NO_METHOD
from benchmarks.beside_peft import ROOT
from benchmarks.beside_peft import make_environment

OURS = (
    NO_METHOD,
    "KerasHub's LoRA",
    "LoRA",
    "DoRA",
    "HiRA",
    "FVAE-LoRA",
    "FVAE-LoRA as published",
)
PEFTS = (NO_METHOD, "LoRA", "DoRA", "HiRA")
AUTHORS = ("FVAE-LoRA as published",)


class Peer:
    """A process that takes a step whenever it is asked to."""

    def __init__(self, python, whose, method, batch_size, authors):
        environment = os.environ | ENVIRONMENT
        if whose == "authors":
            environment["PYTHONPATH"] = str(authors / "peft" / "src")
        self.process = subprocess.Popen(
            [
                *(python, "-m", "benchmarks.peer_steps"),
                *(whose, method, str(batch_size)),
            ],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self):
        """Waits until it is ready."""
        for line in self.process.stdout:
            if line.strip() == "ready":
                return
        raise RuntimeError(
            f"`{' '.join(map(str, self.process.args))}` ended before its first "
            "step; what it wrote above says why."
        )

    def step(self):
        """Float, the seconds of a step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self):
        self.process.kill()
        self.process.wait()


def measure(batch_size, rounds, environment, authors):
    """The seconds of each step, by whose it is and the method.

    Args:
        batch_size: Positive integer.
        rounds: Positive integer, how many steps of each.
        environment: Path of the environment with PEFT.
        authors: Optional path of the authors' repository.

    Returns:
        Dict of `"ours: LoRA"` and the like to a list of floats.
    """
    theirs = make_environment(environment)
    sides = [("ours", method, sys.executable) for method in OURS]
    sides += [("PEFT", method, theirs) for method in PEFTS]
    if authors:
        sides += [("authors", method, theirs) for method in AUTHORS]
    peers = {}
    try:
        for whose, method, python in sides:
            peer = Peer(python, whose, method, batch_size, authors)
            peers[f"{whose}: {method}"] = peer
            # One after the other, because each takes all cores to start.
            peer.wait()
        seconds = {name: [] for name in peers}
        for number in range(rounds):
            # Each is first as often as it is last.
            for name in [*peers][:: 1 if number % 2 else -1]:
                seconds[name].append(peers[name].step())
        return seconds
    finally:
        for peer in peers.values():
            peer.end()


def ratios(seconds):
    """What is compared, and what it is to reach.

    Args:
        seconds: Dict, as `measure` returns it.

    Returns:
        Dict of a description to a pair of the median of the rounds' ratios and
        the goal.
    """
    steps = {name: np.array(taken) for name, taken in seconds.items()}
    compared = {
        f"{method}, by PEFT's": (
            steps[f"ours: {method}"] / steps[f"PEFT: {method}"],
            1.0,
        )
        for method in PEFTS
    }
    ours_alone, theirs_alone = steps["ours: none"], steps["PEFT: none"]
    for method in ("FVAE-LoRA", *AUTHORS):
        ours = steps[f"ours: {method}"]
        compared[f"{method}, by PEFT's LoRA"] = ours / steps["PEFT: LoRA"], 1.0
        if f"authors: {AUTHORS[0]}" in steps:
            authors = steps[f"authors: {AUTHORS[0]}"]
            compared[f"{method}, by the authors'"] = ours / authors, 1.0
            compared[f"{method} less the frozen model, by the authors'"] = (
                (ours - ours_alone) / (authors - theirs_alone),
                0.5,
            )
    return {
        name: (float(np.median(values)), goal)
        for name, (values, goal) in compared.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--authors", type=pathlib.Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=pathlib.Path, default="output")
    parser.add_argument(
        "--environment", type=pathlib.Path, default=ROOT / ".venv-peft"
    )
    arguments = parser.parse_args()
    authors = arguments.authors
    if authors and not (authors / "peft" / "src" / "peft").is_dir():
        parser.error(
            f"--authors must be a clone of the authors' repository, with a "
            f"folder peft/src/peft in it. Received: {authors}"
        )
    results = {}
    for batch_size in arguments.batch_sizes:
        seconds = measure(
            batch_size,
            arguments.rounds,
            arguments.environment,
            authors and authors.resolve(),
        )
        results[batch_size] = seconds
        print(f"\nBatch size {batch_size}: seconds of a training step, median")
        for name, taken in seconds.items():
            print(f"{name:<34}{np.median(taken):>7.3f}")
        print("Ratios, the medians of the rounds' own, and what to reach")
        for name, (ratio, goal) in ratios(seconds).items():
            print(f"{name:<66}{ratio:>7.3f}{goal:>6.2f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "peers.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"\nAll of it is in {path}.")


if __name__ == "__main__":
    main()
