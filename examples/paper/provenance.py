"""Where a result comes from: versions, the device, and what a run takes."""

import datetime
import importlib.metadata
import os
import platform
import resource
import sys

import keras

PACKAGES = (
    "keras",
    "keras-fvae",
    "keras-hub",
    "numpy",
    "scikit-learn",
    "tensorflow-datasets",
)
BACKEND_PACKAGES = {
    "jax": ("jax", "jaxlib"),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "torch": ("torch",),
}


def describe():
    """Dict of what was there, whatever the run; JSON takes it."""
    backend = keras.config.backend()
    packages = (*PACKAGES, *BACKEND_PACKAGES[backend])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "command": command(sys.orig_argv[1:]),
        "backend": backend,
        "device": device(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {p: v for p in packages if (v := version(p))},
    }


def command(words):
    """String, what was called, but for the folder that the results go to.

    That is of the machine, and makes no difference to them.

    Args:
        words: List of strings, the command line.
    """
    kept = [word for word in words if not word.startswith("--output=")]
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return " ".join(kept)


def version(package):
    """String, the installed version of a package, or `None`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device():
    """String, the name of the GPU that Keras uses, else "CPU"."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        found = jax.devices()[0]
        return "CPU" if found.platform == "cpu" else found.device_kind
    if backend == "torch":
        import torch

        has_gpu = torch.cuda.is_available()
        return torch.cuda.get_device_name() if has_gpu else "CPU"
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = tf.config.experimental.get_device_details
    return details(gpus[0])["device_name"] if gpus else "CPU"


def reset_peak_memory():
    """Counts the peak anew, where the backend can."""
    backend = keras.config.backend()
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    elif backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            tf.config.experimental.reset_memory_stats("GPU:0")


def peak_memory():
    """MiB at the peak: of the device, or of the process if that is a CPU.

    JAX and processes never begin anew, so that theirs is the peak of all runs
    until now.
    """
    backend = keras.config.backend()
    peak = None
    if backend == "jax":
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if peak is None:
        # In KiB on Linux, in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20
