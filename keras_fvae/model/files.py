"""Adapter files: a record and named arrays, in the format of safetensors.

The metadata of the file say which format and version it is, and hold the
record as JSON and a checksum of everything. What such a file says is taken for
true only where it was checked: it may be damaged, or made to do harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import stat
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from keras_fvae.backend.types import Filepath

SUFFIX = ".safetensors"
FORMAT = "keras_fvae.adapter"
VERSION = 1
# How safetensors calls what a file may hold. Narrow floats are widened.
DTYPES: tuple[str, ...] = (
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U32",
    "U64",
)
DTYPES += ("BOOL",)


def check_filepath(filepath: Any) -> pathlib.Path:
    """The path of an adapter file, if it can be one.

    Raises:
        ValueError: If it ends in something else than `.safetensors`, or is no
            path of the local file system.
        TypeError: If it is no path.
    """
    path = check_local(filepath, "filepath")
    if not path.name.endswith(SUFFIX):
        name = os.fspath(filepath)
        stem = name.removesuffix(".h5").removesuffix(".fvae_lora")
        raise ValueError(
            f"The name of an adapter file must end in '{SUFFIX}'. Received: "
            f"filepath={name!r}. Call it {stem + SUFFIX!r}."
        )
    return path


def check_local(path: Filepath, argument: str) -> pathlib.Path:
    """A path of the local file system, if it is one.

    Args:
        path: String or path.
        argument: String, how the argument is called that it came by.

    Raises:
        ValueError: If it is the address of something elsewhere.
        TypeError: If it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"`{argument}` must be a string or path. Received: "
            f"{argument}={path!r} (of type {type(path)})"
        )
    if "://" in os.fspath(path):
        raise ValueError(
            "Adapters are written to and read from the local file system. "
            f"Received: {argument}={os.fspath(path)!r}. Copy them there or "
            "from there."
        )
    return pathlib.Path(path)


def write(
    filepath: pathlib.Path,
    record: dict[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes an adapter file.

    Args:
        filepath: Path. A file of that name is replaced only once the new one
            is complete.
        record: Dict that JSON can hold.
        arrays: Dict of name to NumPy array.
    """
    # The library saves what lies in memory.
    arrays = {n: np.require(a, requirements="C") for n, a in arrays.items()}
    text = json.dumps(record)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "record": text,
        "sha256": _checksum(text, arrays),
    }
    content = safetensors.numpy.save(arrays, metadata)
    with replaced_when_complete(filepath) as file:
        file.write(content)


def parse(
    content: bytes, filepath: pathlib.Path
) -> tuple[Any, dict[str, np.ndarray]]:
    """The record and the arrays of an adapter file.

    Args:
        content: Bytes of the file.
        filepath: Path of the file, for messages.

    Returns:
        The record, as JSON was read, and a dict of name to NumPy array.

    Raises:
        ValueError: If the file is none of ours, of a newer version, or damaged.
    """
    try:
        metadata = _read_metadata(content)
        arrays = safetensors.numpy.load(content)
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"'{filepath}' cannot be read as an adapter file: it is damaged, "
            f"cut short, or of another kind ({error})."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"'{filepath}' is a file of safetensors, but none that "
            "`save_adapter` wrote. (`load_peft_adapter` reads those "
            "of PEFT.)"
        )
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"'{filepath}' was saved in format {metadata.get('version')!r}, "
            f"and this version of keras_fvae reads format '{VERSION}'. Install "
            "a newer keras_fvae."
        )
    record = metadata.get("record", "")
    if metadata.get("sha256") != _checksum(record, arrays):
        raise ValueError(
            f"'{filepath}' is damaged: its content is not what was saved (the "
            "checksum differs)."
        )
    try:
        return read_json(record.encode()), arrays
    except (ValueError, RecursionError) as error:
        raise ValueError(f"In '{filepath}' the record is no JSON.") from error


@contextlib.contextmanager
def replaced_when_complete(filepath: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `filepath` after the block.

    Whatever happens, and whoever else writes there, a file of that name is
    whole at every moment. It gets the permissions that it had, or that any new
    file gets; a symbolic link stays one.

    Args:
        filepath: Path.

    Yields:
        Binary file.

    Raises:
        OSError: If there can be no such file; the message names the path.
    """
    target = pathlib.Path(os.path.realpath(filepath))
    # Not made of the name, which may be as long as names can be.
    unfinished = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        mode = _mode_to_keep(target)
        with open(unfinished, "xb") as file:
            if mode is not None:
                os.chmod(unfinished, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        if error.filename in (None, str(unfinished), str(target)):
            # The path that was asked for says more.
            raise type(error)(
                error.errno, error.strerror or str(error), str(filepath)
            ) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(content: bytes) -> Any:
    """What JSON in bytes says, if it has nothing that JSON should not have.

    Raises:
        ValueError: If it is none, or has an entry twice, or NaN or infinity.
        RecursionError: If it is nested deeper than Python can read.
    """

    def refuse_constant(name):
        raise ValueError(f"{name} is no number of JSON")

    def refuse_duplicates(pairs):
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("an entry is there twice")
        return entries

    return json.loads(
        content.decode(),
        parse_constant=refuse_constant,
        object_pairs_hook=refuse_duplicates,
    )


def _mode_to_keep(target):
    """The permissions of a file that is there, or `None`."""
    if not target.exists():
        return None
    if target.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(target))
    if not target.is_file():
        raise OSError(22, "Not a regular file", str(target))
    if not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied", str(target))
    return stat.S_IMODE(target.stat().st_mode)


def _read_metadata(content):
    """The metadata of a file of safetensors, of which those are checked
    that its own reader lets pass."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("it ends within its header")
    header = read_json(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
            raise ValueError(f"the array '{name}' is of no dtype that is saved")
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no JSON object")
    return metadata


def _checksum(record, arrays):
    """Hexadecimal SHA-256 of the record and of all that arrays are."""
    names = sorted(arrays)
    layout = [
        [name, arrays[name].dtype.str, list(arrays[name].shape)]
        for name in names
    ]
    checksum = hashlib.sha256(json.dumps([record, layout]).encode())
    for name in names:
        checksum.update(np.ascontiguousarray(arrays[name]).data)
    return checksum.hexdigest()
