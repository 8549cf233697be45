"""Adapters as values: taken from a model, put into one, on disk and back."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from typing import Any
from typing import Literal
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.backend.types import Filepath
from keras_fvae.layers import fingerprint
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.attach import adapter_shapes
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.attach import inference_arrays
from keras_fvae.layers.attach import refusals_after
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import check_boolean
from keras_fvae.layers.config import describe_config
from keras_fvae.model import containers
from keras_fvae.model import files
from keras_fvae.model import lookup
from keras_fvae.model import state as states
from keras_fvae.model import training
from keras_fvae.model.install import install
from keras_fvae.model.install import refuse_loops
from keras_fvae.model.places import find_place
from keras_fvae.model.record import describe_adapter
from keras_fvae.model.record import paths_of
from keras_fvae.model.state import AdapterState
from keras_fvae.model.summary import AdapterSummary
from keras_fvae.model.summary import frozen_but_new
from keras_fvae.model.summary import frozen_new_layers
from keras_fvae.model.summary import summarize
from keras_fvae.model.tree import LayerTree
from keras_fvae.model.tree import is_adaptable

INCLUDED = ("all", "inference")
PARTS = ("all", "adapter")


def get_adapter(
    model: keras.Layer, include: Literal["all", "inference"] = "all"
) -> AdapterState:
    """The adapters of a model, and what else of it was trained, as a value.

    It holds the weights by layer path and the adapters' settings, so that it
    can be put onto the plain base model. With them are the other weights that
    were chosen to train, frozen since or not, and state that training changes
    without a gradient, such as moving averages. What is done to the model
    later does not change it. If a model is spread over several processes of
    JAX, all of them must call this.

    Args:
        model: `keras.Model` or layer with adapted layers.
        include: `"all"` (default), or `"inference"` for only what inference
            needs: a model that it is put onto is finalized.

    Returns:
        An `AdapterState`.

    Raises:
        ValueError: If no layer is adapted, or `include` is not allowed.
        TypeError: If `model` is no Keras model.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    >>> tasks = {"first": keras_fvae.get_adapter(model)}
    >>> keras_fvae.set_adapter(model, tasks["first"])
    """
    lookup.require_adapted_layers(model)
    check_include(include)
    tree = LayerTree(model)
    if include == "inference":
        for layer in tree.adapted:
            with refusals_after(
                f"The adapter of layer '{layer.path}' cannot be saved for "
                "inference alone"
            ):
                layer.adapter.check_can_finalize()
    arrays, adapted = {}, {}
    for path, layer in tree.layers.items():
        if layer in tree.adapted:
            adapted[path] = {
                **describe_adapter(layer, include == "inference"),
                "precision": fingerprint.precision(layer),
                "fingerprint": fingerprint.fingerprint(layer),
            }
            if adapted[path]["finalized"]:
                adapter_arrays = inference_arrays(layer)
            else:
                adapter_arrays = layer.adapter.get_arrays()
            for name, array in adapter_arrays.items():
                arrays[f"layers/{path}/{name}"] = np.array(array)
    trained = training.trained_weights(tree)
    state = training.changed_state(tree)
    for path, weight in {**trained, **state}.items():
        arrays[f"weights/{path}"] = np.array(_to_numpy(weight))
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
        "not_finite": [n for n, a in arrays.items() if not states.is_finite(a)],
        "checkpoint": {},
    }
    return AdapterState(record, arrays)


def set_adapter(
    model: keras.Layer,
    state: AdapterState,
    *,
    replace: bool = False,
    only: Literal["all", "adapter"] = "all",
    strict: bool = False,
    **settings: Any,
) -> None:
    """Puts an adapter into a model, in place.

    A plain model is adapted first, as the state says, and what was chosen to
    train then trains here. On an adapted one the adapted layers and the
    settings that inference knows of must be the state's; then the weights are
    assigned, and nothing is compiled anew. A state that was put into a model
    once is put there again at once.

    A state of a task fits its bare backbone with `only="adapter"`, and that of
    a backbone fits every model with one such backbone inside: only that part
    is frozen then, so that a new head trains.

    Args:
        model: `keras.Model` or layer, built.
        state: `AdapterState`.
        replace: Boolean. Whether adapters that are there and differ, in rank,
            method or layers, give way to the state's. Steps are compiled once
            more then. Defaults to `False`, which raises an error that names
            the difference.
        only: `"all"` (default), or `"adapter"` to leave what was trained
            beside the adapters, such as a head, as it is here.
        strict: Boolean. Whether it is an error if the base model is not the
            one that the state was trained on, rather than a warning.
        **settings: Settings of training alone, such as `elbo_weight`,
            `dropout` or `seed`, that are to be others than the state's.

    Raises:
        ValueError: If the state does not fit the model, a setting is none of
            training alone or not allowed, or the base model is another one and
            `strict`. The model is then as it was.
        TypeError: If `model` is no Keras model, or `state` no `AdapterState`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> state = keras_fvae.get_adapter(model)
    >>> keras_fvae.remove_adapter(model)
    >>> keras_fvae.set_adapter(model, state, elbo_weight=1e-2)
    >>> model.layers[0].config.elbo_weight
    0.01
    """
    if not isinstance(state, AdapterState):
        raise TypeError(
            "`state` must be an `AdapterState`, as `get_adapter` and "
            f"`read_adapter` return it. Received: state={state!r} (of type "
            f"{type(state)})"
        )
    lookup.check_built(model)
    _set(model, state, "The adapter", replace, only, strict, settings)


def _set(model, state, name, replace, only, strict, settings):
    """As `set_adapter`; `name` is what errors call the state."""
    _check_choice("only", only, PARTS)
    check_boolean("replace", replace)
    check_boolean("strict", strict)
    if only == "all" and not settings and not strict:
        known = state.known_variables.get(model)
        if known is not None and known.is_current():
            known.assign()
            return
    try:
        plan = _plan(model, state, replace, only, settings)
        _compare_bases(plan, state, strict)
    except ValueError as error:
        raise ValueError(
            f"{name} does not fit the model '{model.name}': {error}"
        ) from error
    # From here on nothing is refused.
    _carry_out(plan, state)
    if only == "all":
        state.known_variables[model] = _KnownVariables(plan)


def save_adapter(
    model: keras.Layer,
    filepath: Filepath,
    include: Literal["all", "inference"] = "all",
) -> None:
    """Saves a model's adapters, and what else of it was trained, to one file.

    As `get_adapter(model, include).save(filepath)`. If a model is spread over
    several processes of JAX, all of them must call this; the first one writes.

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
    lookup.check_model(model)
    files.check_filepath(filepath)
    write(model, get_adapter(model, include), filepath)


def write(model: keras.Layer, state: AdapterState, filepath: Filepath) -> None:
    """Writes the state of a model, by the first of its processes.

    Args:
        model: `keras.Model` or layer.
        state: `AdapterState`.
        filepath: Path.
    """
    if not replicas.spans_processes(model.variables) or (
        replicas.is_first_process()
    ):
        state.save(filepath)


def load_adapter(
    model: keras.Layer,
    filepath: Filepath,
    *,
    replace: bool = False,
    only: Literal["all", "adapter"] = "all",
    strict: bool = False,
    **settings: Any,
) -> AdapterSummary:
    """Loads what `save_adapter` saved.

    As `set_adapter(model, read_adapter(filepath), ...)`. If a model is spread
    over several processes of JAX, all of them must call this; the first one
    reads the file for all.

    The file is data alone: whatever it says is checked before the model is
    touched.

    Args:
        model: `keras.Model` or layer, built, like the one that was saved, or
            the backbone of such a task, or a task with such a backbone.
        filepath: String or path of the file.
        replace: As in `set_adapter`.
        only: As in `set_adapter`.
        strict: As in `set_adapter`.
        **settings: As in `set_adapter`.

    Returns:
        An `AdapterSummary`, as `adapter_summary(model)` returns it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no adapter file, is damaged or of a newer
            format, or does not fit the model; the message names the first
            difference. The model is then as it was.
        TypeError: If `model` is no Keras model, or `filepath` no path.

    Example:

    >>> def make_model():
    ...     query = keras.layers.Dense(3, "relu", name="query")
    ...     query.build((None, 4))
    ...     query.kernel.assign(np.ones((4, 3)))
    ...     return keras.Sequential([keras.Input((4,)), query])
    >>> model = make_model()
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.save_adapter(model, "task.safetensors")
    >>> summary = keras_fvae.load_adapter(make_model(), "task.safetensors")
    """
    lookup.check_built(model)
    filepath = files.check_filepath(filepath)
    state = states.parse(_content(model, filepath), filepath)
    name = f"The adapter file '{filepath}'"
    _set(model, state, name, replace, only, strict, settings)
    return summarize(model)


class _Plan(NamedTuple):
    """How a state goes into a model.

    Attributes:
        tree: `LayerTree` of the model, or of the part that the state is of.
        layers: Dict of recorded path to the layer that is to be adapted.
        configs: Dict of recorded path to config.
        weights: Dict of recorded path to the weight that is to be set.
        trained_layers: List of the layers that are to train besides.
        trained_weights: List of the weights that are to train besides.
        adapters: List of the adapters to install; empty if the layers have
            such adapters already.
    """

    tree: LayerTree
    layers: dict[str, keras.Layer]
    configs: dict[str, AdapterConfig]
    weights: dict[str, keras.Variable]
    trained_layers: list[keras.Layer]
    trained_weights: list[keras.Variable]
    adapters: list[Adapter]


def _plan(model, state, replace, only, settings):
    """What is to be done; all that can be wrong raises a `ValueError`."""
    record = state.record
    place = find_place(model, record)
    layers = _require(place.layers, record["adapted"], "layer", "adapted")
    is_whole = only == "all"

    def others(kind, entry):
        objects = getattr(place, f"{kind}s")
        if is_whole:
            return _require(objects, record[entry], kind, "trained")
        return {p: objects[p] for p in record[entry] if p in objects}

    trained = others("weight", "trained")
    weights = {**trained, **others("weight", "state")} if is_whole else {}
    trained_layers = others("layer", "trained_layers")
    configs = _with_settings(state, settings)
    difference = _difference(place.tree, layers, configs, state, settings)
    if not difference and is_whole:
        difference = _difference_in_training(place.tree, weights)
    if difference and place.tree.adapted and not replace:
        raise ValueError(
            f"{difference} Pass `replace=True` to put the adapter in the place "
            "of what is there."
        )
    if difference:
        for layer in layers.values():
            if not isinstance(layer, AdaptedLayer):
                check_adaptable(layer)
        training.refuse_while_running(
            keras_internals.flatten_layers(place.tree.model)
        )
    _check_arrays(
        state.arrays,
        _expected_arrays(layers, weights, configs, state),
        is_whole,
    )
    _check_finite(state.arrays, record["not_finite"])
    adapters = []
    if difference:
        adapters = [
            build_adapter(
                layer,
                configs[path],
                state.is_finalized(path),
                starts_anew=False,
            )
            for path, layer in layers.items()
        ]
        refuse_loops(place.tree, [*layers.values()], adapters)
    return _Plan(
        place.tree,
        layers,
        configs,
        weights,
        [*trained_layers.values()],
        [*trained.values()],
        adapters,
    )


def _carry_out(plan, state):
    """Puts a state into a model that it fits."""
    tree = plan.tree
    if plan.adapters:
        _tell_what_stays(tree, plan.weights)
        if tree.adapted:
            containers.detach_adapters(tree.model, tree.adapted)
            training.train_as_before(LayerTree(tree.model))
            training.reset_training_state(tree.adapted, keep_optimizer=False)
            tree = LayerTree(tree.model)
        install(
            tree,
            plan.layers.values(),
            plan.adapters,
            plan.trained_layers,
            plan.trained_weights,
        )
    for path, layer in plan.layers.items():
        names = layer.adapter.array_shapes
        layer.adapter.set_arrays(
            {name: state.arrays[f"layers/{path}/{name}"] for name in names}
        )
        layer.adapter.health = None
    for path, weight in plan.weights.items():
        weight.assign(state.arrays[f"weights/{path}"])
    if plan.adapters and (fresh := frozen_new_layers(LayerTree(tree.model))):
        warnings.warn(frozen_but_new(fresh), stacklevel=4)


def _tell_what_stays(tree, weights):
    """Warns of weights that were trained beside other adapters.

    Args:
        tree: `LayerTree` of the model.
        weights: Dict of recorded path to the weight that will be set.
    """
    set_ids = {id(weight) for weight in weights.values()}
    trained = {
        **training.once_trained_weights(tree),
        **training.changed_state(tree, if_noted=True),
    }
    staying = [path for path, w in trained.items() if id(w) not in set_ids]
    if staying:
        warnings.warn(
            f"The weights {staying} were trained beside other adapters, and "
            "are not in this one: they stay as they are, and may not be what "
            "it was trained with. Load the base model's weights to be sure.",
            stacklevel=5,
        )


class _KnownVariables:
    """The variables of a model that a state was put into, and their values.

    Args:
        plan: `_Plan` that was carried out.
    """

    def __init__(self, plan):
        layers = [*plan.layers.values()]
        weight_ids = {id(weight) for weight in plan.weights.values()}
        owners = [
            (layer, weight)
            for _, layer, weight in plan.tree.owned_weights
            if id(weight) in weight_ids
        ]
        # The model may be one of the layers, and must not be kept alive.
        self.part = weakref.ref(plan.tree.model)
        self.layers = [weakref.ref(layer) for layer in layers]
        self.adapters = [weakref.ref(layer.adapter) for layer in layers]
        # `adapter_scale` changes them.
        self.configs = [layer.config for layer in layers]
        self.owners = [(weakref.ref(layer), w) for layer, w in owners]
        variables = [w for layer in layers for w in layer.adapter.weights]
        variables += [variable for _, variable in owners]
        # A copy, since on some backends that is the variable's own memory.
        self.values = [(v, np.array(replicas.to_numpy(v))) for v in variables]

    def is_current(self):
        """Whether the model still has these variables, and no adapters else."""
        part, layers = self.part(), [layer() for layer in self.layers]
        if part is None or None in layers:
            return False
        adapted_ids = {id(layer) for layer in lookup.adapted_layers(part)}
        return (
            adapted_ids == {id(layer) for layer in layers}
            and all(
                layer.adapter is adapter() and layer.config is config
                for layer, adapter, config in zip(
                    layers, self.adapters, self.configs
                )
            )
            and all(
                any(variable is weight for weight in layer().weights)
                for layer, variable in self.owners
            )
        )

    def assign(self):
        for variable, value in self.values:
            variable.assign(value)


def check_include(include: Any) -> None:
    """Raises a `ValueError` if it is none of what a state can include."""
    _check_choice("include", include, INCLUDED)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be {' or '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}"
        )


def _require(objects, paths, kind, has_been):
    """Dict of those of the paths to what a model has there.

    Args:
        objects: Dict of recorded path to layer or weight.
        paths: Iterable of recorded paths.
        kind: String, what they are.
        has_been: String, what they were when they were saved.
    """
    for path in paths:
        if path not in objects:
            there = [
                path
                for path, found in objects.items()
                if kind == "weight" or is_adaptable(found)
            ]
            advice = ""
            if has_been == "trained":
                advice = " Pass `only='adapter'` to leave what was trained "
                advice += "beside the adapters."
            raise ValueError(
                f"the {kind} '{path}' was {has_been} when it was saved. The "
                f"model has no such {kind}, only these: {there}.{advice}"
            )
    return {path: objects[path] for path in paths}


def _with_settings(state, settings):
    """Dict of path to config, with settings of training in their place."""
    configs = state.configs
    for path, config in configs.items():
        allowed = type(config).training_settings
        unknown = {*settings} - {*allowed}
        if unknown:
            raise ValueError(
                f"of {config.method_name} only settings of training can be "
                f"others than in the state: {sorted(allowed)}. Received: "
                f"{sorted(unknown)}."
            )
        if settings and state.is_finalized(path):
            raise ValueError(
                "it has only what inference needs, and no settings of "
                f"training. Received: {sorted(settings)}."
            )
    changed = {
        path: dataclasses.replace(config, **settings)
        for path, config in configs.items()
    }
    if "seed" not in settings:
        return changed
    return {
        path: config.for_layer(index)
        for index, (path, config) in enumerate(changed.items())
    }


def _difference(tree, layers, configs, state, settings):
    """A sentence on what is adapted in another way; `""` if nothing is.

    Args:
        tree: `LayerTree` of the model.
        layers: Dict of recorded path to layer.
        configs: Dict of recorded path to config.
        state: `AdapterState`.
        settings: The settings of training that must be the same, too.
    """
    for layer in tree.adapted:
        if not any(layer is recorded for recorded in layers.values()):
            return f"the layer '{layer.path}' is adapted only in the model."
    for path, layer in layers.items():
        if not isinstance(layer, AdaptedLayer):
            return f"the layer '{path}' is adapted only in the state."
        theirs = {
            **describe_config(configs[path]),
            "finalized": state.is_finalized(path),
        }
        ours = {
            **describe_config(layer.config),
            "finalized": layer.adapter.finalized,
        }
        free = {*type(configs[path]).training_settings} - {*settings}
        for name, value in theirs.items():
            if name not in free and value != ours.get(name):
                return (
                    f"for the layer '{path}' the state has {name}={value!r}, "
                    f"the model {name}={ours.get(name)!r}."
                )
    return ""


def _difference_in_training(tree, weights):
    """A sentence on what is trained in one and not in the other; or `""`.

    Args:
        tree: `LayerTree` of the model.
        weights: Dict of recorded path to the weight that the state has for it.
    """
    ours = {
        **training.trained_weights(tree),
        **training.changed_state(tree, if_noted=True),
    }
    our_ids = {id(weight) for weight in ours.values()}
    our_ids |= training.state_ids_of(tree)
    for path, weight in weights.items():
        if id(weight) not in our_ids:
            return f"the weight '{path}' was trained only in the state."
    their_ids = {id(weight) for weight in weights.values()}
    for path, weight in ours.items():
        if id(weight) not in their_ids:
            return f"the weight '{path}' was trained only in the model."
    return ""


def _expected_arrays(layers, weights, configs, state):
    """Dict of name to shape and dtypes, of what a state must have."""
    expected = {}
    for path, layer in layers.items():
        shapes = adapter_shapes(layer, configs[path], state.is_finalized(path))
        for name, shape in shapes.items():
            expected[f"layers/{path}/{name}"] = shape, ("float32",)
    for path, weight in weights.items():
        dtypes = (weight.dtype,)
        if keras.backend.is_float_dtype(weight.dtype):
            # It may be of another precision here than where it was saved.
            dtypes = "float32", "float64"
        expected[f"weights/{path}"] = tuple(weight.shape), dtypes
    return expected


def _check_arrays(arrays, expected, is_whole):
    names = [
        name for name in arrays if is_whole or not name.startswith("weights/")
    ]
    for name in [*expected, *names]:
        if name not in expected or name not in arrays:
            where = "state" if name in arrays else "model"
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
        if name not in not_finite and not states.is_finite(array):
            raise ValueError(
                f"the weight '{name}' has numbers that are not finite, which "
                "it had not when it was saved."
            )


def _compare_bases(plan, state, strict):
    """Says if the frozen kernels are others than those that were adapted."""
    others = [
        path
        for path, layer in plan.layers.items()
        if not fingerprint.are_alike(
            fingerprint.fingerprint(layer),
            state.record["adapted"][path]["fingerprint"],
            fingerprint.precision(layer),
            state.record["adapted"][path]["precision"],
        )
    ]
    if not others:
        return
    message = (
        f"it was trained on another base model: {len(others)} of "
        f"{len(plan.layers)} adapted layers have other kernels here, such as "
        f"'{others[0]}'. What it predicts here is not what it was trained for."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(
        f"The adapter fits the model '{plan.tree.model.name}' in shape, but "
        f"{message} Load the base model's weights before the adapter.",
        stacklevel=4,
    )


def _to_numpy(weight):
    """A weight as it is saved: narrow floats are widened."""
    if keras.backend.is_float_dtype(weight.dtype) and weight.dtype != "float64":
        weight = ops.cast(weight, "float32")
    return replicas.to_numpy(weight)


def _content(model, filepath):
    """The bytes of an adapter file."""

    def read():
        return states.content(filepath)

    if replicas.spans_processes(model.variables):
        # The others may not see its files, or not yet.
        return replicas.from_first_process(read)
    return read()
