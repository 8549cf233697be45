"""Training steps on PyTorch beside PEFT's own, of the same method and shapes.

python -m benchmarks.beside_peft

PEFT runs in an environment of its own, which is made at the first time.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parent.parent
METHODS = ("LoRA", "rsLoRA", "PiSSA", "OLoRA", "DoRA", "HiRA")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default="output")
    parser.add_argument(
        "--environment", type=pathlib.Path, default=ROOT / ".venv-peft"
    )
    arguments = parser.parse_args()
    python = make_environment(arguments.environment)
    rounds, turns = str(arguments.rounds), []
    for _ in range(arguments.turns):
        theirs = run(python, "benchmarks/peft_steps.py", rounds, *METHODS)
        ours = run(
            sys.executable, "-m", "benchmarks.keras_steps", rounds, *METHODS
        )
        turns.append(
            {
                name: [statistics.median(s[name]) for s in (ours, theirs)]
                for name in METHODS
            }
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "peft.json"
    path.write_text(json.dumps(turns, indent=2) + "\n")
    print("Training steps on four blocks of ViT-B/16's size, PyTorch:")
    print(f"{'':<8}{'ours, s':>10}{'PEFT, s':>10}{'ratio':>8}")
    for name in METHODS:
        ours, theirs = (
            statistics.median(turn[name][i] for turn in turns) for i in (0, 1)
        )
        print(f"{name:<8}{ours:>10.3f}{theirs:>10.3f}{ours / theirs:>8.2f}")


def make_environment(folder):
    """The Python of an environment with PEFT and this one's PyTorch."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        version = torch.__version__.split("+")[0]
        install = [python, "-m", "pip", "install", "--quiet"]
        packages = [f"torch=={version}", "peft", "transformers"]
        subprocess.run([*install, *packages], check=True)
    return python


def run(*command):
    """What a process prints as JSON on its last line."""
    result = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "torch"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
