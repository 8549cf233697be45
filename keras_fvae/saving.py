"""Adapter files: what was trained, apart from the base model."""

import json
import os
import pathlib

import h5py
from keras import ops

from keras_fvae import adapt
from keras_fvae import keras_internals
from keras_fvae.config import FVAELoRAConfig

SUFFIX = ".fvae_lora.h5"
FORMAT = "keras_fvae.adapter"
VERSION = 1


def save_fvae_lora_weights(model, filepath):
    """Saves a model's adapters, and what else of it trains, to one file.

    The file holds the weights by layer path and the adapters' settings, so
    that it can be loaded onto the plain base model.

    Args:
        model: `keras.Model` or layer with layers adapted by FVAE-LoRA.
        filepath: String or path that ends in `.fvae_lora.h5`. A file of that
            name is replaced only once the new one is complete.

    Raises:
        ValueError: If no layer is adapted, or `filepath` ends differently.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_fvae_lora_weights(model, "task.fvae_lora.h5")
    """
    filepath = _check_filepath(filepath)
    adapted, _ = _layers_by_path(model)
    if not adapted:
        raise ValueError(
            f"Model '{model.name}' has no layer adapted by FVAE-LoRA, so there "
            "is nothing to save. Call `enable_fvae_lora` first."
        )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "layers": {
            path: layer.config.get_config() for path, layer in adapted.items()
        },
    }
    weights = {
        f"layers/{path}/{name}": weight
        for path, layer in adapted.items()
        for name, weight in layer.adapter.named_weights.items()
    }
    for path, weight in _by_path(_other_trainable_weights(model)).items():
        weights[f"trainable/{path}"] = weight
    _write(filepath, header, weights)


def load_fvae_lora_weights(model, filepath):
    """Loads what `save_fvae_lora_weights` saved, onto the same architecture.

    On a plain model FVAE-LoRA is enabled first, as the file says. On an
    adapted one, the adapted layers and their settings must be the file's.

    Args:
        model: `keras.Model` or layer, built, like the one that was saved.
        filepath: String or path of the file.

    Raises:
        ValueError: If the file is no adapter file, is damaged or of a newer
            format, or does not fit the model; the message names the first
            difference. The model is then as it was.

    Example:

    >>> def make_model():
    ...     layer = keras.layers.Dense(3, name="query")
    ...     return keras.Sequential([keras.Input((4,)), layer], name="model")
    >>> model = make_model()
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_fvae_lora_weights(model, "task.fvae_lora.h5")
    >>> keras_fvae.load_fvae_lora_weights(make_model(), "task.fvae_lora.h5")
    """
    filepath = _check_filepath(filepath)
    configs, adapter_values, other_values = _read(filepath)
    adapted, adaptable = _layers_by_path(model)
    if adapted:
        _check_same_adapters(filepath, configs, adapted)
        adapters = {path: layer.adapter for path, layer in adapted.items()}
    else:
        for path in configs:
            if path not in adaptable:
                raise _mismatch(
                    filepath,
                    f"it adapts the layer '{path}', and the model has only "
                    f"these: {list(adaptable)}",
                )
        layers = [adaptable[path] for path in configs]
        built = adapt.build_adapters(layers, configs.values())
        adapters = dict(zip(configs, built))
    others = _by_path(model.weights)
    assignments = [
        *_match_values(filepath, adapter_values, _named_weights(adapters)),
        *_match_values(
            filepath,
            other_values,
            {path: others[path] for path in other_values if path in others},
        ),
    ]
    if not adapted:
        adapt.attach_adapters(model, layers, built)
    for weight, value in assignments:
        weight.assign(value)
    for path in other_values:
        others[path].trainable = True


def _named_weights(adapters):
    return {
        f"{path}/{name}": weight
        for path, adapter in adapters.items()
        for name, weight in adapter.named_weights.items()
    }


def _other_trainable_weights(model):
    adapter_ids = {
        id(weight)
        for layer in adapt.adapted_layers(model)
        for weight in layer.adapter.weights
    }
    return [w for w in model.trainable_weights if id(w) not in adapter_ids]


def _layers_by_path(model):
    """Two dicts of layers by path: the adapted ones, the adaptable ones."""
    adapted = set(adapt.adapted_layers(model))
    adaptable = set(adapt.adaptable_layers(model))
    layers = _by_path(
        layer
        for layer in keras_internals.flatten_layers(model)
        if layer in adapted or layer in adaptable
    )
    return (
        {path: layer for path, layer in layers.items() if layer in adapted},
        {path: layer for path, layer in layers.items() if layer in adaptable},
    )


def _by_path(objects):
    """The objects by path; one whose path is taken gets a number behind it."""
    by_path = {}
    for obj in objects:
        path, number = obj.path, 2
        while path in by_path:
            path, number = f"{obj.path}:{number}", number + 1
        by_path[path] = obj
    return by_path


def _check_filepath(filepath):
    if not str(filepath).endswith(SUFFIX):
        raise ValueError(
            f"The name of an adapter file must end in '{SUFFIX}'. "
            f"Received: filepath={str(filepath)!r}"
        )
    return pathlib.Path(filepath)


def _check_same_adapters(filepath, configs, present):
    for path in [*configs, *present]:
        if path not in present or path not in configs:
            where = "file" if path in configs else "model"
            raise _mismatch(
                filepath, f"the layer '{path}' is adapted only in the {where}"
            )
        for name, value in configs[path].get_config().items():
            ours = getattr(present[path].config, name)
            if name != "seed" and value != ours:
                raise _mismatch(
                    filepath,
                    f"for the layer '{path}' it says {name}={value!r}, the "
                    f"model {name}={ours!r}",
                )


def _match_values(filepath, values, weights):
    """Pairs of a weight and its new value."""
    for path in [*weights, *values]:
        if path not in weights or path not in values:
            where = "file" if path in values else "model"
            raise _mismatch(filepath, f"only the {where} has a weight '{path}'")
        shape, expected = values[path].shape, tuple(weights[path].shape)
        if shape != expected:
            raise _mismatch(
                filepath,
                f"the weight '{path}' has shape {shape}, in the model it has "
                f"shape {expected}",
            )
    return [(weights[path], value) for path, value in values.items()]


def _mismatch(filepath, difference):
    return ValueError(
        f"The adapter file '{filepath}' does not fit the model: {difference}."
    )


def _write(filepath, header, weights):
    """Writes a new file, and puts it in the old one's place when complete."""
    unfinished = filepath.with_name(f".{filepath.name}.{os.getpid()}.part")
    try:
        with h5py.File(unfinished, "w") as file:
            file.attrs["header"] = json.dumps(header)
            for name, weight in weights.items():
                value = ops.convert_to_numpy(ops.cast(weight, "float32"))
                # With a checksum, so that damage does not go unseen.
                file.create_dataset(name, data=value, fletcher32=True)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, filepath)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(filepath):
    """The configs by layer path, the adapters' values, the other values."""
    if not filepath.exists():
        raise FileNotFoundError(f"There is no adapter file '{filepath}'.")
    values = {}

    def keep(name, item):
        if isinstance(item, h5py.Dataset):
            values[name] = item[()]

    try:
        with h5py.File(filepath, "r") as file:
            header = json.loads(file.attrs.get("header", "{}"))
            file.visititems(keep)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{filepath}' cannot be read as an adapter file: it is damaged, "
            f"cut short, or of another kind ({error})."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"'{filepath}' is an HDF5 file, but none that "
            "`save_fvae_lora_weights` wrote."
        )
    if header["version"] > VERSION:
        raise ValueError(
            f"The adapter file '{filepath}' is of format version "
            f"{header['version']}, and this keras_fvae reads versions up to "
            f"{VERSION}. Install a newer keras_fvae."
        )
    configs = {
        path: FVAELoRAConfig(**config)
        for path, config in header["layers"].items()
    }
    return configs, *(
        {
            name.removeprefix(prefix): value
            for name, value in values.items()
            if name.startswith(prefix)
        }
        for prefix in ("layers/", "trainable/")
    )
