"""Measures one backend, in a process of its own, and prints JSON.

    python -m benchmarks.measure steps "ViT-B/16, 4 blocks" --rounds 10
    python -m benchmarks.measure memory "ViT-B/16, 4 blocks" --methods LoRA

`benchmarks.bench` runs it.
"""

import argparse
import ctypes
import gc
import itertools
import json
import pathlib
import re
import tempfile
import time

import keras

from benchmarks import arithmetic
from benchmarks.models import CALLBACKS
from benchmarks.models import METHODS
from benchmarks.models import SIZES
from benchmarks.models import TRAINING_METHODS
from benchmarks.models import make_adapted
from examples.paper import provenance
from keras_fvae.analysis.memory import bytes_per_device

PREDICTING_METHODS = ("base", "FVAE-LoRA", "finalized", "merged")


def steps(size, rank, rounds, methods, jit_compile="auto"):
    """Seconds of each step, the methods in turns, and the counted work."""
    models, results = {}, {}
    for method in methods:
        task, x, y = make_adapted(size, method, rank, jit_compile)
        models[method] = task
        results[method] = {"train": [], "predict": []}
        if method in TRAINING_METHODS:
            task.train_on_batch = with_callback(task, method, rounds)
            results[method]["first"] = seconds(task.train_on_batch, x, y)
            results[method]["counted"] = arithmetic.step(
                method, task, size, rank
            )
    for what, timed_methods in (
        ("train", TRAINING_METHODS),
        # By itself: what has just trained would predict more slowly.
        ("predict", PREDICTING_METHODS),
    ):
        timed = [method for method in methods if method in timed_methods]
        calls = {m: getattr(models[m], f"{what}_on_batch") for m in timed}
        arguments = (x, y) if what == "train" else (x,)
        for method in timed:
            calls[method](*arguments)
        for number in range(rounds):
            # Each is first as often as it is last.
            for method in timed[:: 1 if number % 2 else -1]:
                taken = seconds(calls[method], *arguments)
                results[method][what].append(taken)
    return results


def with_callback(task, method, rounds):
    """`task.train_on_batch` with what `fit` does for a method's callback.

    Args:
        task: Compiled task.
        method: String, a key of `TRAINING_METHODS`.
        rounds: Integer, how many steps are timed.
    """
    if method not in CALLBACKS:
        return task.train_on_batch
    callbacks = keras.callbacks.CallbackList(
        # The first step compiles, the second one is not timed.
        [CALLBACKS[method]()],
        model=task,
        epochs=1,
        steps=rounds + 2,
    )
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    train_on_batch, batches = task.train_on_batch, itertools.count()

    def step(x, y):
        batch = next(batches)
        callbacks.on_train_batch_begin(batch)
        logs = train_on_batch(x, y, return_dict=True)
        callbacks.on_train_batch_end(batch, logs)

    return step


def memory(size, rank, method):
    """MiB that are held at the peak of a training step.

    Returns:
        Dict with `peak`: on a GPU of its memory, else of the process's, once
        what it took to compile the step is given back. What compiling leaves
        is in the process's, such as the compiled code, but not in a GPU's. So
        on CPUs there is `arrays` too: on PyTorch its tensors alone, elsewhere
        what the process held at rest beside the arrays is left out.
    """
    task, x, y = make_adapted(size, method, rank)
    task.train_on_batch(x, y)
    if provenance.device() != "CPU":
        task.train_on_batch(x, y)
        return {"peak": provenance.peak_memory()}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    at_rest = resident("VmRSS")
    # Linux begins to count the peak anew.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        task.train_on_batch(x, y)
    peak = resident("VmHWM")
    # At rest, no other arrays are left.
    arrays_at_rest = sum(
        bytes_per_device(variable)
        for variable in [*task.variables, *task.optimizer.variables]
    )
    added = peak - at_rest
    if keras.config.backend() == "torch":
        added = added_tensors(task, x, y)
    return {"peak": peak, "arrays": added + arrays_at_rest / 2**20}


def added_tensors(task, x, y):
    """MiB of the tensors that PyTorch adds at the peak of a training step.

    Of what the process adds little more than half are tensors. The rest was
    given back, is kept for what comes next, and differs from run to run.
    """
    import torch

    # Nothing may be left to be given back, which would not be counted.
    task.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profiler:
        task.train_on_batch(x, y)
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = (
        event["args"]["Total Allocated"]
        for event in events
        if event["name"] == "[memory]"
    )
    return max(held) / 2**20


def resident(what):
    """MiB of this process's memory, as Linux counts it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) / 1024


def seconds(function, *arguments):
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["steps", "memory", "device"])
    parser.add_argument("size", choices=SIZES, nargs="?")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS)
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jit-compile", action="store_true")
    arguments = parser.parse_args()
    keras.config.set_dtype_policy(arguments.dtype)
    size = SIZES.get(arguments.size)
    if arguments.what == "device":
        result = provenance.device()
    elif arguments.what == "steps":
        result = steps(
            size,
            arguments.rank,
            arguments.rounds,
            arguments.methods,
            jit_compile=arguments.jit_compile or "auto",
        )
    else:
        result = memory(size, arguments.rank, *arguments.methods)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
