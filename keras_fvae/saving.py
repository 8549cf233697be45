"""Adapter files: what was trained, apart from the base model."""

import contextlib
import io
import json
import os
import pathlib

import h5py
from keras import ops

from keras_fvae import containers
from keras_fvae import lookup
from keras_fvae import replicas
from keras_fvae import training
from keras_fvae.config import FVAELoRAConfig

SUFFIX = ".fvae_lora.h5"
FORMAT = "keras_fvae.adapter"
HEADER = "header"
# What may differ between a file and the model that it is loaded into.
FREE_SETTINGS = ("rematerialize", "seed")


def save_fvae_lora_weights(model, filepath, include="all"):
    """Saves a model's adapters, and what else of it trains, to one file.

    The file holds the weights by layer path and the adapters' settings, so
    that it can be loaded onto the plain base model. If a model is spread over
    several processes of JAX, all of them must call this; the first one writes.

    Args:
        model: `keras.Model` or layer with layers adapted by FVAE-LoRA.
        filepath: String or path that ends in `.fvae_lora.h5`. A file of that
            name is replaced only once the new one is complete.
        include: `"all"` (default), or `"inference"` to store only what
            inference needs: a model that loads it is finalized.

    Raises:
        ValueError: If no layer is adapted, `filepath` ends differently, or
            `include` is not allowed.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_fvae_lora_weights(model, "task.fvae_lora.h5")
    """
    lookup.check_model(model)
    filepath = _check_filepath(filepath)
    if include not in ("all", "inference"):
        raise ValueError(
            "`include` must be 'all' or 'inference'. "
            f"Received: include={include!r}"
        )
    record = containers.describe_adapters(model)
    if not record["adapted"]:
        raise ValueError(
            f"Model '{model.name}' has no layer adapted by FVAE-LoRA, so there "
            "is nothing to save. Call `enable_fvae_lora` first."
        )
    layers = containers.find_recorded_layers(model, record)
    arrays = {}
    for path, layer in layers.items():
        finalized = layer.adapter.finalized or include == "inference"
        record["adapted"][path]["finalized"] = finalized
        for name, array in layer.adapter.get_arrays(finalized).items():
            arrays[f"layers/{path}/{name}"] = array
    for path, weight in containers.find_recorded_weights(model, record).items():
        value = replicas.to_numpy(ops.cast(weight, "float32"))
        arrays[f"trainable/{path}"] = value
    if not replicas.spans_processes(model.variables) or (
        replicas.is_first_process()
    ):
        _write(filepath, {"format": FORMAT, "record": record}, arrays)


def load_fvae_lora_weights(model, filepath):
    """Loads what `save_fvae_lora_weights` saved, onto the same architecture.

    On a plain model FVAE-LoRA is enabled first, as the file says. On an
    adapted one, the adapted layers and their settings must be the file's. If a
    model is spread over several processes of JAX, all of them must call this;
    the first one reads the file for all.

    Args:
        model: `keras.Model` or layer, built, like the one that was saved.
        filepath: String or path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no adapter file, is damaged or of a newer
            format, or does not fit the model; the message names the first
            difference. The model is then as it was.

    Example:

    >>> def make_model():
    ...     layer = keras.layers.Dense(3, name="query")
    ...     return keras.Sequential([keras.Input((4,)), layer])
    >>> model = make_model()
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_fvae_lora_weights(model, "task.fvae_lora.h5")
    >>> keras_fvae.load_fvae_lora_weights(make_model(), "task.fvae_lora.h5")
    """
    lookup.check_model(model)
    filepath = _check_filepath(filepath)
    record, arrays = _parse(filepath, _content(model, filepath))
    try:
        _load(model, record, arrays)
    except ValueError as error:
        raise ValueError(
            f"The adapter file '{filepath}' does not fit the model: {error}"
        ) from error


def _load(model, record, arrays):
    layers = containers.find_recorded_layers(model, record)
    if lookup.adapted_layers(model):
        _check_same_adapters(model, layers, record)
        adapters = {path: layer.adapter for path, layer in layers.items()}
    else:
        adapters = containers.build_recorded_adapters(layers, record)
    others = containers.find_recorded_weights(model, record)
    _check_shapes(
        arrays,
        {
            f"layers/{path}/{name}": shape
            for path, adapter in adapters.items()
            for name, shape in adapter.array_shapes.items()
        }
        | {
            f"trainable/{path}": tuple(weight.shape)
            for path, weight in others.items()
        },
    )
    # From here on nothing is refused.
    if not lookup.adapted_layers(model):
        containers.attach_recorded_adapters(model, layers, adapters, record)
        training.forget_training(layers.values())
    for path, adapter in adapters.items():
        adapter.set_arrays(
            {
                name: arrays[f"layers/{path}/{name}"]
                for name in adapter.array_shapes
            }
        )
    for path, weight in others.items():
        weight.assign(arrays[f"trainable/{path}"])


def _check_same_adapters(model, layers, record):
    for layer in lookup.adapted_layers(model):
        if not any(layer is recorded for recorded in layers.values()):
            raise ValueError(
                f"the layer '{layer.path}' is adapted only in the model."
            )
    for path, layer in layers.items():
        if not hasattr(layer, "adapter"):
            raise ValueError(f"the layer '{path}' is adapted only in the file.")
        saved = record["adapted"][path]
        pairs = {
            name: (value, getattr(layer.config, name))
            for name, value in FVAELoRAConfig(**saved["config"])
            .get_config()
            .items()
        }
        pairs["finalized"] = saved["finalized"], layer.adapter.finalized
        for name, (value, ours) in pairs.items():
            if name not in FREE_SETTINGS and value != ours:
                raise ValueError(
                    f"for the layer '{path}' the file says {name}={value!r}, "
                    f"the model {name}={ours!r}."
                )


def _check_shapes(arrays, shapes):
    for name in [*shapes, *arrays]:
        if name not in shapes or name not in arrays:
            where = "file" if name in arrays else "model"
            raise ValueError(f"only the {where} has a weight '{name}'.")
        if arrays[name].shape != shapes[name]:
            raise ValueError(
                f"the weight '{name}' has shape {arrays[name].shape}, in the "
                f"model it has shape {shapes[name]}."
            )


def _check_filepath(filepath):
    if not str(filepath).endswith(SUFFIX):
        raise ValueError(
            f"The name of an adapter file must end in '{SUFFIX}'. "
            f"Received: filepath={str(filepath)!r}"
        )
    return pathlib.Path(filepath)


@contextlib.contextmanager
def replaced_when_complete(filepath):
    """A name to write a file to, which takes the place of `filepath` after.

    Whatever happens inside the block, an old file of that name stays whole.
    """
    unfinished = filepath.with_name(f".{filepath.name}.{os.getpid()}.part")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, filepath)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(filepath, header, arrays):
    with (
        replaced_when_complete(filepath) as unfinished,
        h5py.File(unfinished, "w") as file,
    ):
        # Not as an attribute: those have room for 64 KB alone.
        file.create_dataset(HEADER, data=json.dumps(header))
        for name, array in arrays.items():
            # With a checksum, so that damage does not go unseen.
            options = {"fletcher32": True} if array.ndim else {}
            file.create_dataset(name, data=array, **options)


def _content(model, filepath):
    """The bytes of an adapter file."""

    def read():
        if not filepath.exists():
            raise FileNotFoundError(f"There is no adapter file '{filepath}'.")
        return filepath.read_bytes()

    if replicas.spans_processes(model.variables):
        # The others may not see its files, or not yet.
        return replicas.from_first_process(read)
    return read()


def _parse(filepath, content):
    """The record, and the arrays by name."""
    arrays, header = {}, {}

    def keep(name, item):
        if isinstance(item, h5py.Dataset) and name != HEADER:
            arrays[name] = item[()]

    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            if HEADER in file:
                header = json.loads(file[HEADER][()])
            if header.get("format") == FORMAT:
                file.visititems(keep)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"'{filepath}' cannot be read as an adapter file: it is damaged, "
            f"cut short, or of another kind ({error})."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"'{filepath}' is an HDF5 file, but none that "
            "`save_fvae_lora_weights` wrote."
        )
    return header["record"], arrays
