"""Adapter files: what was trained, apart from the base model."""

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.layers.attach import adapter_shapes
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.attach import inference_arrays
from keras_fvae.layers.config import config_from_description
from keras_fvae.layers.config import describe_config
from keras_fvae.model import files
from keras_fvae.model import lookup
from keras_fvae.model import training
from keras_fvae.model.install import install
from keras_fvae.model.record import build_recorded_adapter
from keras_fvae.model.record import describe_adapter
from keras_fvae.model.record import paths_of
from keras_fvae.model.tree import LayerTree
from keras_fvae.model.tree import is_adaptable
from keras_fvae.model.tree import match_paths

# What may differ between a file and the model that it is loaded into.
FREE_SETTINGS = ("rematerialize", "seed")


def save_adapter(model, filepath, include="all"):
    """Saves a model's adapters, and what else of it was trained, to one file.

    The file holds the weights by layer path and the adapters' settings, so
    that it can be loaded onto the plain base model. With them are the other
    weights that were chosen to train, frozen since or not, and state that
    training changes without a gradient, such as moving averages. If a model is
    spread over several processes of JAX, all of them must call this; the first
    one writes.

    Args:
        model: `keras.Model` or layer with adapted layers.
        filepath: String or path that ends in `.safetensors`, on the local file
            system. A file of that name is replaced only once the new one is
            complete.
        include: `"all"` (default), or `"inference"` to store only what
            inference needs: a model that loads it is finalized.

    Raises:
        ValueError: If no layer is adapted, `filepath` ends differently, or
            `include` is not allowed.
        TypeError: If `model` is no Keras model, or `filepath` no path.
        OSError: If the file cannot be written. An old one is then as it was.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_adapter(model, "task.safetensors")
    """
    lookup.require_adapted_layers(model)
    filepath = files.check_filepath(filepath)
    if include not in ("all", "inference"):
        raise ValueError(
            "`include` must be 'all' or 'inference'. "
            f"Received: include={include!r}"
        )
    tree = LayerTree(model)
    arrays, adapted = {}, {}
    for path, layer in tree.layers.items():
        if layer in tree.adapted:
            adapted[path] = describe_adapter(layer)
            adapted[path]["finalized"] |= include == "inference"
            if adapted[path]["finalized"]:
                adapter_arrays = inference_arrays(layer)
            else:
                adapter_arrays = layer.adapter.get_arrays()
            for name, array in adapter_arrays.items():
                arrays[f"layers/{path}/{name}"] = array
    trained = training.trained_weights(tree)
    state = training.changed_state(tree)
    for path, weight in {**trained, **state}.items():
        arrays[f"weights/{path}"] = _to_numpy(weight)
    record = {
        **paths_of(tree),
        "adapted": adapted,
        "trained": [*trained],
        "trained_layers": [
            path
            for path, layer in tree.layers.items()
            if training.is_chosen(layer)
        ],
        "state": [path for path in state if path not in trained],
        "not_finite": [n for n, a in arrays.items() if not _is_finite(a)],
    }
    if not replicas.spans_processes(model.variables) or (
        replicas.is_first_process()
    ):
        files.write(filepath, record, arrays)


def load_adapter(model, filepath):
    """Loads what `save_adapter` saved, onto the same architecture.

    A plain model is adapted first, as the file says, and what was
    chosen to train then trains here. On an adapted one, the adapted layers and
    their settings must be the file's. If a model is spread over several
    processes of JAX, all of them must call this; the first one reads the file
    for all.

    The file is data alone: whatever it says is checked before the model is
    touched.

    Args:
        model: `keras.Model` or layer, built, like the one that was saved.
        filepath: String or path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no adapter file, is damaged or of a newer
            format, or does not fit the model; the message names the first
            difference. The model is then as it was.
        TypeError: If `model` is no Keras model, or `filepath` no path.

    Example:

    >>> def make_model():
    ...     layer = keras.layers.Dense(3, name="query")
    ...     return keras.Sequential([keras.Input((4,)), layer])
    >>> model = make_model()
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_adapter(model, "task.safetensors")
    >>> keras_fvae.load_adapter(make_model(), "task.safetensors")
    """
    lookup.check_built(model)
    filepath = files.check_filepath(filepath)
    if not lookup.adapted_layers(model):
        training.refuse_while_running(keras_internals.flatten_layers(model))
    record, arrays = files.parse(_content(model, filepath), filepath)
    try:
        _load(model, record, arrays)
    except ValueError as error:
        raise ValueError(
            f"The adapter file '{filepath}' does not fit the model: {error}"
        ) from error


def _load(model, record, arrays):
    _check_record(record)
    tree = LayerTree(model)
    layers = _find(tree, record, "layer", "adapted")
    trained = _find(tree, record, "weight", "trained")
    weights = {**trained, **_find(tree, record, "weight", "state")}
    trained_layers = _find(tree, record, "layer", "trained_layers")
    configs = {
        path: config_from_description(entry["config"])
        for path, entry in record["adapted"].items()
    }
    if tree.adapted:
        _check_same_adapters(tree, layers, configs, record)
    else:
        for layer in layers.values():
            check_adaptable(layer)
    _check_arrays(arrays, _expected_arrays(layers, weights, configs, record))
    _check_finite(arrays, record["not_finite"])
    # From here on nothing is refused.
    if not tree.adapted:
        adapters = [
            build_recorded_adapter(layer, record["adapted"][path])
            for path, layer in layers.items()
        ]
        install(
            tree,
            layers.values(),
            adapters,
            trained_layers.values(),
            trained.values(),
        )
    for path, layer in layers.items():
        names = layer.adapter.array_shapes
        layer.adapter.set_arrays(
            {name: arrays[f"layers/{path}/{name}"] for name in names}
        )
    for path, weight in weights.items():
        weight.assign(arrays[f"weights/{path}"])


def _find(tree, record, kind, entry):
    """Dict of recorded path to the layer or weight that a model has for it.

    Args:
        tree: `LayerTree` of the model.
        record: Dict, the record of the file.
        kind: `"layer"` or `"weight"`.
        entry: String, the entry of the record that has the paths.
    """
    objects = match_paths(
        record[f"{kind}_paths"],
        getattr(tree, f"{kind}s"),
        tree.model.name,
        record["name"],
    )
    for path in record[entry]:
        if path not in objects:
            has_been = "adapted" if entry == "adapted" else "trained"
            there = [
                path
                for path, found in objects.items()
                if kind == "weight" or is_adaptable(found)
            ]
            raise ValueError(
                f"the {kind} '{path}' was {has_been} when it was saved. The "
                f"model has no such {kind}, only these: {there}."
            )
    return {path: objects[path] for path in record[entry]}


def _check_same_adapters(tree, layers, configs, record):
    """Raises a `ValueError` if a model is not adapted as a file says."""
    for layer in tree.adapted:
        if not any(layer is recorded for recorded in layers.values()):
            raise ValueError(
                f"the layer '{layer.path}' is adapted only in the model."
            )
    for path, layer in layers.items():
        if layer not in tree.adapted:
            raise ValueError(f"the layer '{path}' is adapted only in the file.")
        saved = {
            **describe_config(configs[path]),
            "finalized": record["adapted"][path]["finalized"],
        }
        ours = {
            **describe_config(layer.config),
            "finalized": layer.adapter.finalized,
        }
        for name in saved:
            if name not in FREE_SETTINGS and saved[name] != ours[name]:
                raise ValueError(
                    f"for the layer '{path}' the file says "
                    f"{name}={saved[name]!r}, the model {name}={ours[name]!r}."
                )


def _expected_arrays(layers, weights, configs, record):
    """Dict of name to shape and dtypes, of what the file must have."""
    expected = {}
    for path, layer in layers.items():
        shapes = adapter_shapes(
            layer, configs[path], record["adapted"][path]["finalized"]
        )
        for name, shape in shapes.items():
            expected[f"layers/{path}/{name}"] = shape, ("float32",)
    for path, weight in weights.items():
        dtypes = (weight.dtype,)
        if keras.backend.is_float_dtype(weight.dtype):
            # It may be of another precision here than where it was saved.
            dtypes = "float32", "float64"
        expected[f"weights/{path}"] = tuple(weight.shape), dtypes
    return expected


def _check_arrays(arrays, expected):
    for name in [*expected, *arrays]:
        if name not in expected or name not in arrays:
            where = "file" if name in arrays else "model"
            raise ValueError(f"only the {where} has a weight '{name}'.")
        (shape, dtypes), array = expected[name], arrays[name]
        if array.shape != shape:
            raise ValueError(
                f"the weight '{name}' has shape {array.shape}, in the model it "
                f"has shape {shape}."
            )
        if array.dtype.name not in dtypes:
            raise ValueError(
                f"the weight '{name}' is of dtype {array.dtype.name}, and it "
                f"must be {' or '.join(dtypes)}."
            )


def _check_finite(arrays, not_finite):
    for name, array in arrays.items():
        if name not in not_finite and not _is_finite(array):
            raise ValueError(
                f"the weight '{name}' has numbers that are not finite, which "
                "it had not when it was saved."
            )


# The type of each entry of a record, and of what is in it.
RECORD_TYPES = {
    "name": str,
    "layer_paths": [str],
    "weight_paths": [str],
    "adapted": {"config": dict, "finalized": bool},
    "trained": [str],
    "trained_layers": [str],
    "state": [str],
    "not_finite": [str],
}


def _check_record(record):
    """Raises a `ValueError` that names an entry of a record that is wrong."""

    def check(is_right, where, wanted):
        if not is_right:
            raise ValueError(f"in its record, {where} must be {wanted}.")

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
        else:
            check(isinstance(value, wanted), f"'{name}'", "a string")


def _check_settings(path, settings):
    """Raises a `ValueError` if settings are none of a config."""
    try:
        config_from_description(settings)
    except ValueError as error:
        raise ValueError(
            f"in its record, the settings of '{path}' are wrong: {error}"
        ) from error


def _is_finite(array):
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _to_numpy(weight):
    """A weight as it is saved: narrow floats are widened."""
    if keras.backend.is_float_dtype(weight.dtype) and weight.dtype != "float64":
        weight = ops.cast(weight, "float32")
    return replicas.to_numpy(weight)


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
