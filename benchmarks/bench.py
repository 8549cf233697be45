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

from benchmarks import beside_peft
from benchmarks.models import CONFIGS
from benchmarks.models import DEPTHS
from benchmarks.models import METHODS
from benchmarks.models import WIDTHS
from keras_fvae.analysis import plots

ROOT = pathlib.Path(__file__).parent.parent
# What is held against each other throughout.
PAIR = ("LoRA", "FVAE-LoRA")
RANK = 16
# Of a ResNet's convolutions, the narrowest of which have 64 filters.
RESNET_RANK = 8
BACKENDS = ("jax", "tensorflow", "torch")
VIT, LONG_VIT, LLAMA, COMPILED, TINY = (
    "ViT-B/16, 4 blocks",
    "ViT-B/16, 12 blocks",
    "Llama block, width 2048",
    "ViT-B/16, 4 blocks, torch.compile",
    "tiny",
)
# Of which all convolutions are adapted, or those of size 1; by what.
RESNETS = {
    "ResNet": ("LoRA", "LoRA on x"),
    "ResNet, size 1": ("LoRA", "LoRA on x", "FVAE-LoRA"),
}
TINY_RESNET = "tiny ResNet"
# What is measured, of which size, of which methods; what it is to reach.
GOALS = (
    ("training step", VIT, "train", "FVAE-LoRA", "LoRA", (1.05, 1.05, 1.15)),
    ("training step", COMPILED, "train", "FVAE-LoRA", "LoRA", (0, 0, 1.05)),
    ("training step", LLAMA, "train", "FVAE-LoRA", "LoRA", (1.0, 1.0, 1.0)),
    ("training step", VIT, "train", "FVAE-LoRA", "LoRA on x", (1.12, 1.12, 0)),
    *(
        ("training step", VIT, "train", method, "LoRA", (1.0, 1.0, 1.0))
        for method in CONFIGS
    ),
    *(
        ("training step", size, "train", "LoRA on x", "LoRA", (1.0, 1.0, 1.0))
        for size in RESNETS
    ),
    ("prediction", VIT, "predict", "FVAE-LoRA", "base", (1.05,) * 3),
    ("prediction", VIT, "predict", "finalized", "base", (1.03,) * 3),
    ("prediction", VIT, "predict", "merged", "base", (1.0,) * 3),
    ("peak memory", LONG_VIT, "peak", "FVAE-LoRA", "LoRA", (1.1,) * 3),
    ("peak memory", LONG_VIT, "peak", "rematerialized", "LoRA", (1.02,) * 3),
    ("of arrays", LONG_VIT, "arrays", "FVAE-LoRA", "LoRA", (1.1,) * 3),
    ("of arrays", LONG_VIT, "arrays", "rematerialized", "LoRA", (1.02,) * 3),
    ("first step", LONG_VIT, "first", "FVAE-LoRA", "LoRA", (1.5,) * 3),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model in place of all"
    )
    parser.add_argument("--output", type=pathlib.Path, default="output")
    arguments = parser.parse_args()
    results = {}
    for backend in arguments.backends:
        device = measure(backend, "device")
        for dtype in ("float32", "mixed_bfloat16"):
            # On CPUs bfloat16 saves nothing.
            if dtype == "float32" or device != "CPU":
                run = f"{backend}, {dtype} on {device}"
                results[run] = measure_all(run, backend, dtype, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "bench.json"
    path.write_text(json.dumps(results, indent=1))
    print_steps(results)
    short = print_goals(results) + print_growth(results)
    if "torch" in arguments.backends and not arguments.quick:
        short += print_beside_peft(arguments)
    print(f"\n{short} of these fall short of what they are to reach.")
    plot(results).savefig(path.with_suffix(".png"), dpi=150)
    print(f"All figures are in {path}, a picture beside it.")


def measure_all(run, backend, dtype, arguments):
    """The results of a backend: by size and method, width, rank and depth."""

    def steps(size, *options, rank=RANK, methods=PAIR, rounds=None):
        print(f"{run}: {size}, rank {rank} ...", file=sys.stderr)
        return measure(
            backend, "steps", size, "--rank", rank, "--dtype", dtype,
            "--rounds", rounds or arguments.rounds, "--methods", *methods,
            *options,
        )  # fmt: skip

    if arguments.quick:
        sizes, longest = {TINY: steps(TINY, methods=METHODS)}, TINY
        widths, ranks, depths = {64: TINY}, {RANK: TINY}, {1: TINY}
    else:
        sizes, longest = {}, LONG_VIT
        for size in (VIT, LLAMA):
            sizes[size] = steps(size, methods=METHODS)
        # Of the longest, the first step counts, and the memory.
        methods = (*PAIR, "rematerialized")
        sizes[longest] = steps(longest, methods=methods, rounds=1)
        if backend == "torch":
            sizes[COMPILED] = steps(VIT, "--jit-compile")
        widths = {width: f"Llama block, width {width}" for width in WIDTHS}
        ranks = dict.fromkeys((4, RANK, 64), VIT)
        depths = {2 * depth: f"narrow ViT, {depth} blocks" for depth in DEPTHS}
    for size, methods in RESNETS.items():
        size = TINY_RESNET if arguments.quick else size
        sizes[size] = steps(size, rank=RESNET_RANK, methods=methods)
    for method in (*PAIR, "rematerialized"):
        sizes[longest][method] |= measure(
            backend, "memory", longest, "--dtype", dtype, "--methods", method
        )
    return {
        "sizes": sizes,
        "widths": {w: sizes.get(s) or steps(s) for w, s in widths.items()},
        "ranks": {
            rank: sizes[size] if rank == RANK else steps(size, rank=rank)
            for rank, size in ranks.items()
        },
        "depths": {d: sizes.get(s) or steps(s) for d, s in depths.items()},
    }


def measure(backend, *arguments):
    """What `benchmarks.measure` prints in a process of its own."""
    memory = arguments[0] == "memory"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", *map(str, arguments)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            # What is freed goes back at once: the peak is of what is held.
            **({"MALLOC_MMAP_THRESHOLD_": "65536"} if memory else {}),
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def print_steps(results):
    print("Seconds of a step: the median, and the quartiles about it.")
    for run, result in results.items():
        for size, methods in result["sizes"].items():
            print(f"\n{run}: {size}")
            for method, measured in methods.items():
                for what in ("train", "predict"):
                    if measured[what]:
                        times = quartiles(measured[what])
                        line = f"  {method:17}{what:9}{times}"
                        if what == "train":
                            lora = methods["LoRA"]
                            line += (
                                "   of LoRA's: "
                                f"{ratio(measured, lora, what):.3f}, counted "
                                f"{counted_ratio(measured, lora):.3f}"
                            )
                        print(line)


def quartiles(seconds):
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return f"{median:8.3f} [{low:.3f}, {high:.3f}]"


def ratio(result, other, what):
    """The median of the ratios of the rounds, in which both took turns."""
    return np.median(np.divide(result[what], other[what]))


def counted_ratio(result, other):
    return result["counted"] / other["counted"]


def print_goals(results):
    """Prints each ratio; returns how many fall short."""
    short = 0
    print("\nRatios, and what they are to reach:")
    for what, size, key, method, other, goals in GOALS:
        for run, result in results.items():
            goal = goals[BACKENDS.index(run.split(",")[0])]
            if not goal:
                continue
            measured_size = size
            if size not in result["sizes"]:
                measured_size = TINY_RESNET if size in RESNETS else TINY
            methods = result["sizes"][measured_size]
            if key not in methods[method]:
                # The memory of a GPU is of arrays alone.
                continue
            value = ratio(methods[method], methods[other], key)
            short += print_goal(
                f"{what}, {measured_size}: {method} / {other}", run, value, goal
            )
    return short


def print_growth(results):
    """Prints how a step grows with rank and depth; returns as `print_goals`."""
    short = 0
    print("\nGrowth of a step of FVAE-LoRA, to reach that of its arithmetic:")
    for run, result in results.items():
        points = result["depths"]
        first, last = min(points), max(points)
        least, most = (points[p]["FVAE-LoRA"] for p in (first, last))
        grown = np.median(most["train"]) / np.median(least["train"])
        short += print_goal(
            f"adapted layers {first} to {last}",
            run,
            grown,
            counted_ratio(most, least),
        )
    # A few percent here, less than the machine's pace changes from run to
    # run: so it is held against LoRA's in the same run.
    for run, result in results.items():
        points = result["ranks"]
        first, last = min(points), max(points)
        least, most = (
            [points[p][method] for method in ("FVAE-LoRA", "LoRA")]
            for p in (first, last)
        )
        short += print_goal(
            f"rank {first} to {last}, by LoRA's",
            run,
            ratio(*most, "train") / ratio(*least, "train"),
            counted_ratio(*most) / counted_ratio(*least),
        )
    return short


def print_beside_peft(arguments):
    """Prints each method beside PEFT's own; returns as `print_goals`."""
    print("\nTraining step beside PEFT's, of the same method:")
    run = "torch, float32 on CPU"
    seconds = beside_peft.measure(arguments.rounds)
    beside_peft.save(seconds, arguments.output)
    return sum(
        print_goal(
            method, run, beside_peft.ratio_quartiles(sides)[1], beside_peft.GOAL
        )
        for method, sides in seconds.items()
        if method != beside_peft.NO_METHOD
    )


def print_goal(what, run, value, goal):
    # As exact as the goals are.
    is_short = round(value, 2) > round(goal, 2)
    verdict = "   FALLS SHORT" if is_short else ""
    print(f"  {what:66}{run:28}{value:7.3f}  to reach {goal:.2f}{verdict}")
    return is_short


def plot(results):
    """Training steps by LoRA's, against width and against rank."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(
        axes,
        ("widths", "ranks"),
        (f"width of a Llama block, rank {RANK}", "rank in ViT-B/16"),
    ):
        for index, (run, result) in enumerate(results.items()):
            points = [(p["FVAE-LoRA"], p["LoRA"]) for p in result[key].values()]
            axis.plot(
                list(result[key]),
                [ratio(*point, "train") for point in points],
                color=plots.COLORS[index],
                marker=plots.MARKERS[index],
                label=run,
            )
        counted = [counted_ratio(*point) for point in points]
        axis.plot(list(result[key]), counted, "k:", label="counted")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.set_xticks(list(result[key]))
        axis.set_xlabel(label)
    axes[0].set_ylabel("step of FVAE-LoRA by LoRA's")
    axes[1].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
