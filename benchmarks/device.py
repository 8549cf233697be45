"""What each method costs on one GPU, as far as a few minutes go.

python -m benchmarks.device           # on a GPU that `benchmarks.wheels` equips
python -m benchmarks.device --quick   # every line of it, at a toy size on CPUs

Writes device.json and device.md after each row. What most users would ask for
comes first; a row that fails, or that there is no time for, says so.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

from benchmarks.worker import Worker

# Keras's backend of each, and whether PyTorch is to compile.
ENGINES = {
    "PyTorch": ("torch", False),
    "PyTorch, compiled": ("torch", True),
    "JAX": ("jax", False),
}
MODELS = VIT, LLAMA, BERT = (
    "ViT-B/16, 12 blocks, batch 64",
    "Llama 3, 2 blocks, batch 8",
    "BERT-base, batch 64",
)
SHALLOW = ("ViT-B/16, 3 blocks, batch 64", "ViT-B/16, 6 blocks, batch 64")
# For PyTorch's compiler, which takes a minute or so for a block.
BLOCK = "Llama 3, 1 block, batch 8"
DTYPES = ("mixed_bfloat16", "bfloat16", "float32")
# In which most would fine-tune a model; the others in mixed precision.
USUAL_DTYPES = {LLAMA: "bfloat16", BLOCK: "bfloat16"}
# What takes their place on CPUs.
TINY = {
    VIT: "tiny",
    BERT: "tiny BERT",
    **dict.fromkeys(SHALLOW, "tiny, 2 blocks"),
    **dict.fromkeys((LLAMA, BLOCK), "tiny Llama"),
}
RANK = 16
# What is held against each other throughout.
FVAE_LORA = "FVAE-LoRA"
PAIR = ("LoRA", FVAE_LORA)
NOT_RUN = "not run: out of time"
# What hangs must leave time for others; PyTorch compiles for a minute or two.
SECONDS_OF_A_ROW = 200
SECONDS_TO_START = 120
PACKAGES = (
    "keras", "keras-hub", "keras-fvae", "torch", "triton", "jax", "jaxlib",
    "numpy",
)  # fmt: skip
NOTES = f"""\
Rank {RANK}, unless said. "base" is frozen but for its head. Steps are medians \
of rounds of several; the first step has in it all that is compiled for it. \
Peak memory is of a training step: of PyTorch what it had given out, of JAX \
what XLA has laid out. PyTorch compiles 8 layers of a kind, by default: of 12 \
blocks the last ones run as they are. In float32, products of matrices are as \
each has them by default:"""


@dataclasses.dataclass(frozen=True)
class Row:
    engine: str
    size: str
    dtype: str
    method: str
    rank: int


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--quick", action="store_true", help="tiny models in place of all"
    )
    parser.add_argument("--output", type=pathlib.Path, default="output")
    arguments = parser.parse_args()
    began = time.monotonic()
    deadline = began + 60 * arguments.minutes
    # Side by side, since imports take each of them some seconds.
    workers = {backend: Worker(backend) for backend, _ in ENGINES.values()}
    try:
        environments = {
            backend: worker.start(began + SECONDS_TO_START)
            for backend, worker in workers.items()
        }
        gpu = ask_driver()
        if gpu and not arguments.quick:
            refuse_cpus(environments)
        methods = methods_of(environments)
        rows = quick_plan(methods) if arguments.quick else plan(methods)
        report = {
            "provenance": provenance(arguments, gpu, environments),
            "rows": [dataclasses.asdict(r) | {"status": NOT_RUN} for r in rows],
        }
        save = functools.partial(write, report, arguments.output)
        save()
        round_seconds = 0.0 if arguments.quick else 0.3
        measure_all(report["rows"], deadline, round_seconds, workers, save)
    finally:
        for worker in workers.values():
            worker.end()
    print(as_markdown(report))
    print(f"All figures are in {arguments.output / 'device.json'}.")


def refuse_cpus(environments):
    """Has no row take minutes on the CPUs of a machine that has a GPU."""
    for environment in environments.values():
        if environment.get("device") == "CPU":
            environment["status"] = "failed: Keras finds no GPU"


def methods_of(environments):
    """The names of all methods, from a process that could import them."""
    for environment in environments.values():
        if "methods" in environment:
            return environment["methods"]
    raise SystemExit(f"No backend starts: {environments}")


def plan(methods):
    """All rows, those first that most users would ask for.

    Args:
        methods: Sequence of strings.

    Returns:
        List of `Row`.
    """
    eager, compiled, jax = ENGINES
    others = [method for method in methods if method not in PAIR]
    return in_order(
        combine((eager, jax), MODELS, PAIR),
        combine((eager,), (VIT,), others),
        growth((eager,)),
        combine((eager, compiled), (BLOCK,), PAIR),
        combine((eager,), MODELS, others),
        combine((eager,), MODELS, PAIR, DTYPES),
        combine((jax,), MODELS, others),
        growth((jax,)),
        combine((compiled,), MODELS, PAIR),
        combine((jax,), MODELS, PAIR, DTYPES),
        combine(ENGINES, MODELS, methods, DTYPES),
        growth(ENGINES),
    )


def quick_plan(methods):
    """As few rows as run every line, of tiny models."""
    eager, compiled, jax = ENGINES
    rows = in_order(
        combine((eager,), (VIT,), methods),
        combine((eager,), MODELS, PAIR),
        combine((eager,), (VIT,), (FVAE_LORA,), DTYPES),
        growth((eager,)),
        combine((jax,), MODELS, (FVAE_LORA,)),
        combine((compiled,), (BLOCK,), (FVAE_LORA,)),
    )
    rows = [dataclasses.replace(row, size=TINY[row.size]) for row in rows]
    return in_order(rows)


def in_order(*passes):
    """Each row where it comes first."""
    return list(dict.fromkeys(itertools.chain(*passes)))


def combine(engines, sizes, methods, dtypes=None, ranks=(RANK,)):
    """Rows of every combination, in the usual dtype unless others are said."""
    return [
        Row(engine, size, dtype, method, rank)
        for size in sizes
        for engine in engines
        for dtype in dtypes or (USUAL_DTYPES.get(size, DTYPES[0]),)
        for rank in ranks
        for method in methods
    ]


def growth(engines):
    """Rows to hold against those of `VIT`: of other ranks, and less deep."""
    return [
        *combine(engines, (VIT,), PAIR, ranks=(4, 64)),
        *combine(engines, SHALLOW, PAIR),
    ]


def measure_all(rows, deadline, round_seconds, workers, save):
    """Measures one row after the other.

    Args:
        rows: List of dicts, each of which gets its figures and its `status`.
        deadline: Float, when to stop, in the time of `time.monotonic`.
        round_seconds: Float, how long a round of steps is to take.
        workers: Dict of `Worker` by backend. What is missing is started, also
            in the place of one that has ended.
        save: Function without arguments, called after each row.
    """
    for row in rows:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        what = ", ".join(str(row[f.name]) for f in dataclasses.fields(Row))
        print(f"{left:.0f} s left: {what} ...", file=sys.stderr)
        measure(row, deadline, round_seconds, workers)
        save()


def measure(row, deadline, round_seconds, workers):
    backend, is_compiled = ENGINES[row["engine"]]
    if backend not in workers:
        workers[backend] = Worker(backend)
    worker = workers[backend]
    began = time.monotonic()
    for answer in worker.measure(
        min(deadline, began + SECONDS_OF_A_ROW),
        size=row["size"],
        method=row["method"],
        rank=row["rank"],
        dtype=row["dtype"],
        is_compiled=is_compiled,
        round_seconds=round_seconds,
    ):
        row.update(answer)
    row["seconds"] = time.monotonic() - began
    if row["status"] == "stopped":
        row["status"] += f" after {row['seconds']:.0f} s"
    # A backend that has not started once would not start the next time.
    if row["status"] != "done" and "status" not in worker.environment:
        worker.end()
        del workers[backend]


def provenance(arguments, gpu, environments):
    """Dict of when, where and with what the figures were measured."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        # But for the folder, which is of that machine alone.
        "options": {
            k: str(v) for k, v in vars(arguments).items() if k != "output"
        },
        "versions": {"python": platform.python_version(), **versions},
        "cores": os.cpu_count(),
        "gpu": gpu,
        "backends": environments,
    }


def ask_driver():
    """String, the GPU, its memory and the driver's version, if it has one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,memory.total,driver_version"
    result = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


def write(report, folder):
    """Writes the report; what is there is whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("device.json", json.dumps(report, indent=1)),
        ("device.md", as_markdown(report)),
    ):
        temporary = folder / f"{name}.part"
        temporary.write_text(text)
        os.replace(temporary, folder / name)


def as_markdown(report):
    """The table, and what is to be known of it."""
    lines = [
        line(
            "model", "dtype", "engine", "method", "training step, ms",
            "first step, s", "prediction, ms", "peak memory, GiB",
        ),
        "|---|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for group, rows in grouped(report["rows"]).items():
        if all(row["status"] == NOT_RUN for row in rows):
            lines.append(line(*group, f"all ({NOT_RUN})", "", "", "", ""))
        else:
            lines.extend(line(*group, *cells(row)) for row in rows)
    return "\n".join([*lines, "", *notes(report["provenance"])])


def grouped(rows):
    """Dict of the rows by model, dtype and engine, each as first met."""
    groups = {}
    for row in rows:
        key = row["size"], row["dtype"], row["engine"]
        groups.setdefault(key, []).append(row)
    met = [list(dict.fromkeys(values)) for values in zip(*groups)]

    def places(key):
        return [values.index(value) for values, value in zip(met, key)]

    return {key: groups[key] for key in sorted(groups, key=places)}


def cells(row):
    """What a row says: of what, and if it is not done, why; its figures."""
    method = row["method"]
    if row["rank"] != RANK:
        method += f", rank {row['rank']}"
    if row["status"] != "done":
        method += f" ({row['status']})"
    return (
        method,
        milliseconds(row, "train"),
        f"{row['first']:.2f}" if "first" in row else "",
        milliseconds(row, "predict"),
        f"{row['peak'] / 1024:.2f}" if row.get("peak") else "",
    )


def milliseconds(row, key):
    return f"{1000 * statistics.median(row[key]):.1f}" if key in row else ""


def line(*cells):
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def notes(provenance):
    """Lines of what the figures are, and of where they come from."""
    devices = "; ".join(
        f"{backend} on {environment['device']} ({environment['built_for']}), "
        f"'{environment['float32_matmul_precision']}'"
        for backend, environment in provenance["backends"].items()
        if "device" in environment
    )
    versions = ", ".join(map(" ".join, provenance["versions"].items()))
    gpu = provenance["gpu"] or f"{provenance['cores']} cores"
    return [f"{NOTES} {devices}.", f"{provenance['date']}; {gpu}; {versions}."]


if __name__ == "__main__":
    main()
