"""The files of an adapter in PEFT's format: settings and tensors."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from keras_fvae.model.files import read_json
from keras_fvae.model.files import replaced_when_complete

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The dtypes of PyTorch in which adapters are saved, as safetensors has them.
FLOATS: dict[str, Any] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": ml_dtypes.bfloat16,
}


def read(
    directory: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings and tensors of an adapter.

    Args:
        directory: Path.

    Returns:
        Dict of settings, and dict of name to float32 NumPy array.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"There is no file '{directory / name}'.")
    try:
        settings = read_json((directory / CONFIG_FILE).read_bytes())
        entries = safetensors.deserialize(
            (directory / WEIGHTS_FILE).read_bytes()
        )
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"The adapter in '{directory}' cannot be read: it is damaged, cut "
            f"short, or of another kind ({error})."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{directory / CONFIG_FILE}' is no JSON object.")
    return settings, {name: _to_array(name, entry) for name, entry in entries}


def write(
    directory: pathlib.Path,
    settings: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Writes an adapter.

    Args:
        directory: Path, which is made if need be.
        settings: Dict that JSON can hold.
        tensors: Dict of name to NumPy array.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {n: np.ascontiguousarray(a) for n, a in tensors.items()}
    with replaced_when_complete(directory / WEIGHTS_FILE) as file:
        file.write(safetensors.numpy.save(tensors, {"format": "pt"}))
    with replaced_when_complete(directory / CONFIG_FILE) as file:
        file.write(json.dumps(settings, indent=2, sort_keys=True).encode())


def _to_array(name, entry):
    """A float32 array, of what safetensors has read."""
    if entry["dtype"] not in FLOATS:
        raise ValueError(
            f"'{name}' in `{WEIGHTS_FILE}` is of dtype {entry['dtype']}. It "
            f"must be one of {list(FLOATS)}."
        )
    array = np.frombuffer(entry["data"], FLOATS[entry["dtype"]])
    array = array.reshape(entry["shape"]).astype("float32")
    if not np.isfinite(array).all():
        raise ValueError(
            f"'{name}' in `{WEIGHTS_FILE}` has numbers that are not finite."
        )
    return array
