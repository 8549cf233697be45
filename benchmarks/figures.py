"""The figures of one row of `benchmarks.device`, measured in this process."""

import functools
import gc
import itertools
import time

import keras
import numpy as np
from keras import ops

from benchmarks.measure import seconds
from benchmarks.models import DEVICE_METHODS
from benchmarks.models import SIZES
from benchmarks.models import make_adapted
from examples.paper.provenance import device

if keras.config.backend() == "jax":
    import jax

    torch, has_cuda = None, False
else:
    import torch

    # What a row before has compiled must not shorten a first step.
    torch.compiler.config.force_disable_caches = True
    has_cuda = torch.cuda.is_available()

NUM_ROUNDS = 5


def environment():
    """Dict of the device, what the figures depend on, and the methods."""
    if torch is None:
        precision = jax.config.jax_default_matmul_precision or "default"
        # Of several lines.
        version = jax.devices()[0].client.platform_version
        built_for = " ".join(version.split())
    else:
        precision = torch.get_float32_matmul_precision()
        built_for = f"CUDA {torch.version.cuda}"
    # What a process loads for its first step is no matter of a method.
    list(measure("tiny", "base", 1, "float32", False, 0.0))
    return {
        "device": device(),
        "built_for": built_for,
        "float32_matmul_precision": precision,
        "methods": DEVICE_METHODS,
    }


def measure(size, method, rank, dtype, is_compiled, round_seconds):
    """Yields the figures of a method on a model, one after the other.

    Steps are timed in `fit` and `predict`, because those are what users call,
    on a batch that is on the device already.

    Args:
        size: String, a key of `SIZES`.
        method: String, a key of `METHODS`.
        rank: Integer.
        dtype: String, the name of a dtype policy.
        is_compiled: Boolean, whether PyTorch is to compile the model.
        round_seconds: Float, how long a round of steps is to take.

    Yields:
        Dicts: of `first`, the seconds of the first training step with all that
        is compiled for it; of `train`, those of a later step by rounds, and
        `peak`, the MiB that one holds at its peak, `None` where nobody counts
        them; of `predict`, the seconds of a prediction by rounds.
    """
    held = forget_last_row()
    if is_compiled:
        start_inductor()
    keras.config.set_dtype_policy(dtype)
    task, x, y = make_adapted(SIZES[size], method, rank, is_compiled or "auto")
    x, y = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
    train = functools.partial(train_steps, task, x, y)
    synchronize()
    yield {"first": seconds(train, 1)}
    yield {"train": rounds(train, round_seconds), "peak": peak_of_step(held)}
    predict = functools.partial(predict_steps, task, x)
    yield {"predict": rounds(predict, round_seconds)}


def forget_last_row():
    """Gives back what the last row held; returns the bytes that remain."""
    keras.utils.clear_session()
    gc.collect()
    if torch is not None:
        # Compiled code holds its model, and only so much is compiled anew.
        torch.compiler.reset()
    if not has_cuda:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@functools.cache
def start_inductor():
    """Compiles something, so that no row pays for Inductor's first time."""
    # Keras's layers nest deeper than Python 3.12 and 3.13 let C code call.
    torch._dynamo.set_recursion_limit(4000)
    torch.compile(torch.sin)(ops.ones(8))


def rounds(function, round_seconds):
    """List of what `function` of a number of steps returns, round by round."""
    # The second step compiles anew what the first one has changed.
    function(2)
    number = int(np.clip(round_seconds / function(2), 2, 20))
    if has_cuda:
        torch.cuda.reset_peak_memory_stats()
    return [function(number) for _ in range(NUM_ROUNDS)]


def train_steps(task, x, y, number):
    """Seconds of a training step, of `number` of them in a row."""
    timer = Timer()
    # Of `keras.Model`, since KerasHub's own slices the data once more.
    keras.Model.fit(
        task,
        ((x, y) for _ in itertools.count()),
        steps_per_epoch=number,
        callbacks=[timer],
        shuffle=False,
        verbose=0,
    )
    return timer.seconds / number


def predict_steps(task, x, number):
    """Seconds of a prediction, of `number` of them in a row."""
    timer = Timer()
    keras.Model.predict(
        task,
        ((x,) for _ in itertools.count()),
        steps=number,
        callbacks=[timer],
        verbose=0,
    )
    return timer.seconds / number


class Timer(keras.callbacks.Callback):
    """The `seconds` of an epoch of `fit`, or of a call of `predict`.

    It sees no single step, so that Keras waits for none.
    """

    def begin(self, *args):
        synchronize()
        self.began = time.perf_counter()

    def end(self, *args):
        synchronize()
        self.seconds = time.perf_counter() - self.began

    on_epoch_begin = on_predict_begin = begin
    on_epoch_end = on_predict_end = end


def synchronize():
    """Waits for all that was asked of the device."""
    if torch is None:
        jax.block_until_ready(jax.live_arrays())
    elif has_cuda:
        torch.cuda.synchronize()


def peak_of_step(held):
    """MiB at the peak of a training step, of this row alone.

    PyTorch counts what it gives out. JAX does so too, but never begins anew;
    so here it is what XLA has laid out for the compiled step.

    Args:
        held: Integer, the bytes that were held before the row.
    """
    if torch is None:
        stats = [
            executable.get_compiled_memory_stats()
            for executable in jax.devices()[0].client.live_executables()
        ]
        # Nothing else takes the optimizer's variables.
        step = max(stats, key=lambda stats: stats.argument_size_in_bytes)
        peak = laid_out(step)
    elif has_cuda:
        peak = torch.cuda.max_memory_allocated() - held
    else:
        return None
    return peak / 2**20


def laid_out(stats):
    """Bytes that a program of XLA holds at its peak, to which it keeps.

    Args:
        stats: What JAX says of the program's memory: what goes in, what comes
            out beside that, and the rest.
    """
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
