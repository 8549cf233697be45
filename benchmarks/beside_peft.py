"""Training steps on PyTorch beside PEFT's own, of the same method and shapes.

python -m benchmarks.beside_peft

It runs in an environment of its own, which is made at the first time.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
# The frozen blocks alone: what is of Keras's layers, and not of an adapter.
NO_METHOD = "none"
# Both are on the CPU.
ENVIRONMENT = {"KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": ""}
GOAL = 1.0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default="output")
    parser.add_argument(
        "--environment", type=pathlib.Path, default=ROOT / ".venv-peft"
    )
    arguments = parser.parse_args()
    seconds = measure(arguments.rounds, arguments.environment)
    save(seconds, arguments.output)
    print(f"Training steps on PyTorch, and what to reach: {GOAL:.2f}")
    print(f"{'':<8}{'ours, s':>9}{'PEFT, s':>9}{'ratio':>7}   quartiles")
    for method, sides in seconds.items():
        low, median, high = ratio_quartiles(sides)
        ours, theirs = (np.median(sides[side]) for side in ("ours", "PEFT"))
        print(
            f"{method:<8}{ours:>9.3f}{theirs:>9.3f}{median:>7.3f}"
            f"   [{low:.3f}, {high:.3f}]"
        )


def ratio_quartiles(sides):
    """Quartiles of the ratios of the rounds, in which both took turns."""
    ratios = np.divide(sides["ours"], sides["PEFT"])
    return np.percentile(ratios, [25, 50, 75])


def measure(rounds, environment=ROOT / ".venv-peft"):
    """The seconds of each step, by method and whose it is."""
    result = subprocess.run(
        [
            make_environment(environment),
            "-m",
            "benchmarks.peft_steps",
            str(rounds),
        ],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def save(seconds, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peft.json").write_text(json.dumps(seconds, indent=1))


def make_environment(folder):
    """The Python of an environment with PEFT, and this one's libraries."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        pinned = [
            f"{name}=={importlib.metadata.version(name).split('+')[0]}"
            for name in ("torch", "keras")
        ]
        packages = [*pinned, "peft", "transformers", "-e", ROOT]
        subprocess.run([*install, *packages], check=True)
    return python


if __name__ == "__main__":
    main()
