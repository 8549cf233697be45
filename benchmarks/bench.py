"""What FVAE-LoRA costs beside LoRA: time, memory, compiling, arithmetic.

make bench                                # all backends
make bench BENCH="--backends jax"         # one
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from benchmarks.models import METHODS
from benchmarks.models import WIDTHS
from keras_fvae import plots

ROOT = pathlib.Path(__file__).parent.parent
# What is held against each other throughout.
PAIR = ("LoRA", "FVAE-LoRA")
RANK = 16
BACKENDS = ("jax", "tensorflow", "torch")
VIT, LONG_VIT, LLAMA, TINY = (
    "ViT-B/16, 4 blocks",
    "ViT-B/16, 12 blocks",
    "Llama block, width 2048",
    "tiny",
)
# What is measured, of which size, of which methods; what it is to reach.
GOALS = (
    ("training step", VIT, "train", "FVAE-LoRA", "LoRA", (1.05, 1.05, 1.15)),
    ("training step", LLAMA, "train", "FVAE-LoRA", "LoRA", (1.0, 1.0, 1.0)),
    (
        "training step", VIT, "train", "FVAE-LoRA", "LoRA on x",
        (1.12, 1.12, None),
    ),
    ("prediction", VIT, "predict", "FVAE-LoRA", "base", (1.05,) * 3),
    ("prediction", VIT, "predict", "finalized", "base", (1.03,) * 3),
    ("prediction", VIT, "predict", "merged", "base", (1.0,) * 3),
    ("peak memory", LONG_VIT, "peak", "FVAE-LoRA", "LoRA", (1.1,) * 3),
    ("first step", LONG_VIT, "first", "FVAE-LoRA", "LoRA", (1.5,) * 3),
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model in place of all"
    )
    parser.add_argument("--output", type=pathlib.Path, default="output")
    arguments = parser.parse_args()
    results = {
        backend: measure_all(backend, arguments)
        for backend in arguments.backends
    }
    print_steps(results)
    short = print_goals(results)
    print(f"\n{short} of these ratios fall short of what they are to reach.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "bench.json"
    path.write_text(json.dumps(results, indent=1))
    plot(results).savefig(path.with_suffix(".png"), dpi=150)
    print(f"All figures are in {path}, a picture beside it.")


def measure_all(backend, arguments):
    """The results of a backend: by size and method, by width, by rank."""

    def steps(size, rank=RANK, methods=PAIR, rounds=arguments.rounds):
        print(f"{backend}, {size}, rank {rank} ...", file=sys.stderr)
        return measure(
            backend, "steps", size, "--rank", rank, "--rounds", rounds,
            "--dtype", arguments.dtype, "--methods", *methods,
        )  # fmt: skip

    if arguments.quick:
        sizes, widths, ranks = [TINY], {64: TINY}, {RANK: TINY}
    else:
        sizes = [VIT, LLAMA, LONG_VIT]
        widths = {width: f"Llama block, width {width}" for width in WIDTHS}
        ranks = dict.fromkeys((4, RANK, 64), VIT)
    results = {}
    for size in sizes:
        # Of the long one only the first step counts.
        is_long = size == LONG_VIT
        results[size] = steps(
            size,
            methods=PAIR if is_long else METHODS,
            rounds=1 if is_long else arguments.rounds,
        )
        for method in PAIR:
            results[size][method] |= measure(
                backend, "memory", size, "--dtype", arguments.dtype,
                "--methods", method,
            )  # fmt: skip
    return {
        "sizes": results,
        "widths": {
            width: results.get(size) or steps(size)
            for width, size in widths.items()
        },
        "ranks": {
            rank: results[size] if rank == RANK else steps(size, rank)
            for rank, size in ranks.items()
        },
    }


def measure(backend, *arguments):
    """What `benchmarks.measure` prints in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def print_steps(results):
    print("Seconds of a step: the median, and the quartles about it.")
    for backend, result in results.items():
        for size, methods in result["sizes"].items():
            print(f"\n{backend}, {size}")
            lora = methods["LoRA"]
            for method, measured in methods.items():
                for what in ("train", "predict"):
                    if measured[what]:
                        times = quartiles(measured[what])
                        ratios = ""
                        if what == "train":
                            ratios = "   of LoRA's: {:.3f}, counted {:.3f}"
                            ratios = ratios.format(*ratio_to(lora, measured))
                        print(f"  {method:17}{what:9}{times}{ratios}")


def quartiles(seconds):
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return f"{median:8.3f} [{low:.3f}, {high:.3f}]"


def ratio_to(lora, result):
    """A training step by LoRA's: as measured, and as counted."""
    return (
        np.median(result["train"]) / np.median(lora["train"]),
        result["counted"] / lora["counted"],
    )


def print_goals(results):
    """Prints each ratio; returns how many fall short."""
    short = 0
    print("\nRatios, and what they are to reach:")
    for what, size, key, method, other, goals in GOALS:
        for backend, result in results.items():
            sizes = result["sizes"]
            goal = goals[BACKENDS.index(backend)]
            if goal is None:
                continue
            measured_size = size if size in sizes else TINY
            methods = sizes[measured_size]
            ratio = np.median(methods[method][key]) / np.median(
                methods[other][key]
            )
            is_short = ratio > goal
            short += is_short
            pair = f"{method} / {other}"
            verdict = "   FALLS SHORT" if is_short else ""
            print(
                f"  {what:14}{measured_size:25}{backend:12}{pair:22}"
                f"{ratio:7.3f}  to reach {goal:.2f}{verdict}"
            )
    return short


def plot(results):
    """Training steps by LoRA's, against width and against rank."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(
        axes,
        ("widths", "ranks"),
        (f"width of a Llama block, rank {RANK}", "rank in ViT-B/16"),
    ):
        for index, (backend, result) in enumerate(results.items()):
            points = result[key]
            measured, counted = zip(
                *[ratio_to(p["LoRA"], p["FVAE-LoRA"]) for p in points.values()]
            )
            axis.plot(
                list(points),
                measured,
                color=plots.COLORS[index],
                marker=plots.MARKERS[index],
                label=backend,
            )
        axis.plot(list(points), counted, "k:", label="counted")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.set_xticks(list(points))
        axis.set_xlabel(label)
    axes[0].set_ylabel("step of FVAE-LoRA by LoRA's")
    axes[1].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
