"""An adapter as a value: what was trained, apart from the base model."""

from __future__ import annotations

import pathlib
import types
import weakref
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_fvae.backend.types import Filepath
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import config_from_description
from keras_fvae.layers.fingerprint import is_fingerprint
from keras_fvae.model import files


class AdapterState:
    """The adapters of a model, and what else of it was trained, as a value.

    `get_adapter` and `read_adapter` make it, `set_adapter` puts it into a
    model; it never changes. `print` it to see what it is.

    Args:
        record: Dict, as `get_adapter` writes it: what is adapted and how, what
            else trains.
        arrays: Dict of name to NumPy array.

    Raises:
        ValueError: If the record is none.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    >>> state = keras_fvae.get_adapter(model)
    >>> print(state)
    LoRA of rank 2 on 1 layer, 14 numbers
    >>> state.save("task.safetensors")
    """

    def __init__(
        self, record: dict[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> None:
        check_record(record)
        for array in arrays.values():
            array.flags.writeable = False
        self.record = record
        self.arrays: Mapping[str, np.ndarray] = types.MappingProxyType(
            {**arrays}
        )
        # By model, the variables that it was set into and their values.
        self.known_variables: weakref.WeakKeyDictionary[keras.Layer, Any] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterState, (self.record, {**self.arrays})

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """Dict of layer path to the config of the adapter."""
        return {
            path: config_from_description(entry["config"])
            for path, entry in self.record["adapted"].items()
        }

    def is_finalized(self, path: str) -> bool:
        """Whether an adapter is there as inference needs it alone.

        Args:
            path: String, the path of a layer.
        """
        return self.record["adapted"][path]["finalized"]

    def save(self, filepath: Filepath) -> None:
        """Writes the state to one file, which `read_adapter` reads.

        Args:
            filepath: String or path that ends in `.safetensors`, on the local
                file system. A file of that name is replaced only once the new
                one is complete.

        Raises:
            ValueError: If `filepath` ends differently.
            TypeError: If it is no path.
            OSError: If the file cannot be written. An old one is then as it
                was.
        """
        files.write(files.check_filepath(filepath), self.record, self.arrays)

    def __str__(self) -> str:
        configs = [*self.configs.values()]
        methods = sorted({config.method_name for config in configs})
        ranks = [config.rank for config in configs]
        rank = f"{min(ranks)}"
        if max(ranks) > min(ranks):
            rank += f" to {max(ranks)}"
        size = sum(array.size for array in self.arrays.values())
        parts = [
            f"{', '.join(methods)} of rank {rank} on {len(ranks)} "
            f"layer{'s' * (len(ranks) > 1)}",
            f"{size:,} numbers",
        ]
        if all(map(self.is_finalized, self.record["adapted"])):
            parts.append("for inference alone")
        others = len(self.record["trained"]) + len(self.record["state"])
        if others:
            parts.append(f"with {others} other weights")
        if self.record["checkpoint"]:
            parts.append(
                "{monitor}={value} after epoch {epoch}".format_map(
                    self.record["checkpoint"]
                )
            )
        return ", ".join(parts)

    __repr__ = __str__


def read_adapter(filepath: Filepath) -> AdapterState:
    """Reads what `save_adapter` or `AdapterState.save` wrote.

    Args:
        filepath: String or path of the file.

    Returns:
        An `AdapterState`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no adapter file, is damaged or of a newer
            format.
        TypeError: If `filepath` is no path.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    >>> keras_fvae.save_adapter(model, "task.safetensors")
    >>> keras_fvae.read_adapter("task.safetensors")
    LoRA of rank 2 on 1 layer, 14 numbers
    """
    filepath = files.check_filepath(filepath)
    return parse(content(filepath), filepath)


def parse(content: bytes, filepath: pathlib.Path) -> AdapterState:
    """An `AdapterState` of the bytes of a file, as `read_adapter`."""
    record, arrays = files.parse(content, filepath)
    try:
        return AdapterState(record, arrays)
    except ValueError as error:
        raise ValueError(
            f"In the adapter file '{filepath}', {error}"
        ) from error


def content(filepath: pathlib.Path) -> bytes:
    """The bytes of a file, or a `FileNotFoundError` that names it."""
    if not filepath.exists():
        raise FileNotFoundError(f"There is no adapter file '{filepath}'.")
    return filepath.read_bytes()


def is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


# The type of each entry of a record, and of what is in it.
RECORD_TYPES: dict[str, Any] = {
    "name": str,
    "layer_paths": [str],
    "weight_paths": [str],
    "adapted": {
        "config": dict,
        "finalized": bool,
        "precision": str,
        "fingerprint": str,
    },
    "trained": [str],
    "trained_layers": [str],
    "state": [str],
    "not_finite": [str],
    # What `AdapterCheckpoint` knew: `monitor`, `value` and `epoch`; or nothing.
    "checkpoint": dict,
}


def check_record(record: Any) -> None:
    """Raises a `ValueError` that names an entry of a record that is wrong."""

    def check(is_right, where, wanted):
        if not is_right:
            raise ValueError(f"its record is wrong: {where} must be {wanted}.")

    check(isinstance(record, dict), "all", "one object")
    check(
        {*record} == {*RECORD_TYPES}, "the entries", f"these: {[*RECORD_TYPES]}"
    )
    for name, wanted in RECORD_TYPES.items():
        value = record[name]
        if isinstance(wanted, list):
            is_right = isinstance(value, list) and all(
                isinstance(path, str) for path in value
            )
            check(is_right, f"'{name}'", "a list of strings")
            check(len({*value}) == len(value), f"'{name}'", "without repeats")
        elif isinstance(wanted, dict):
            check(isinstance(value, dict), f"'{name}'", "an object")
            for path, entry in value.items():
                is_right = (
                    isinstance(entry, dict)
                    and {*entry} == {*wanted}
                    and all(
                        isinstance(entry[key], type_)
                        for key, type_ in wanted.items()
                    )
                )
                check(is_right, f"'{name}/{path}'", f"an object of {wanted}")
                _check_settings(path, entry["config"])
                check(
                    is_fingerprint(entry["fingerprint"]),
                    f"'{name}/{path}/fingerprint'",
                    "one that `get_adapter` makes",
                )
        else:
            kind = "a string" if wanted is str else "an object"
            check(isinstance(value, wanted), f"'{name}'", kind)
    _check_checkpoint(record["checkpoint"], check)
    check(record["adapted"], "'adapted'", "an object of one layer at least")


def _check_checkpoint(checkpoint, check):
    wanted = {"monitor": str, "value": (int, float), "epoch": int}
    is_right = not checkpoint or (
        {*checkpoint} == {*wanted}
        and all(isinstance(checkpoint[k], t) for k, t in wanted.items())
    )
    check(
        is_right, "'checkpoint'", "empty, or have `monitor`, `value`, `epoch`"
    )


def _check_settings(path, settings):
    """Raises a `ValueError` if settings are none of a config."""
    try:
        config_from_description(settings)
    except ValueError as error:
        raise ValueError(
            f"its record is wrong: in the settings of '{path}', {error}"
        ) from error
