"""Which layers of a model to adapt: by name, expression, function, default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any
from typing import TypeAlias

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.attach import other_convolution
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import check_config
from keras_fvae.layers.config import is_integer
from keras_fvae.layers.frozen import BASES
from keras_fvae.layers.frozen import CONVOLUTIONS
from keras_fvae.model.lookup import adaptable_layers
from keras_fvae.model.tree import is_adaptable

# How layers are chosen: by a name, an expression that is searched for in their
# paths, or a function of a layer; or by several of these.
LayerChoice: TypeAlias = str | re.Pattern[str] | Callable[[keras.Layer], bool]
LayerChoices: TypeAlias = (
    LayerChoice | Sequence[LayerChoice] | AbstractSet[LayerChoice]
)
# What is said besides of the layers of one choice: the rank, fields of the
# config, or a config.
Changes: TypeAlias = int | dict[str, Any] | AdapterConfig
# The keys are choices, too, which a dict of names alone would not be, because
# a `Mapping` has keys of one type exactly.
Targets: TypeAlias = LayerChoices | Mapping[Any, Changes]

# What the query and value projections of attention are called. A layer without
# a name of its own is called what the attribute that holds it is; where that
# says too little, the class that has the attribute stands before it.
QUERY_AND_VALUE_NAMES = (
    # One layer for each.
    "query",
    "value",
    "query_dense",
    "value_dense",
    "query_proj",
    "value_proj",
    "query_projector",
    "value_projector",
    "q_proj",
    "v_proj",
    "q_dense_layer",
    "v_dense_layer",
    "q",
    "v",
    # One layer for query, key and value.
    "qkv",
    "attention_qkv",
    "attention_qkv2",
    "query_key_value",
    # Linear attention. What the receptance of RWKV is to the state, the query
    # is to keys and values.
    "in_proj_qkv",
    "receptance",
    # One layer for query, key, value and the first of the MLP beside them.
    "SingleStreamBlock.linear1",
)


# Every layer of a kind that can be adapted, but for the head.
ALL_LINEAR = "all-linear"
ALL_CONV = "all-conv"


def find_targets(
    model: keras.Layer,
    config: AdapterConfig,
    target_layer_names: Targets | None,
    exclude_layer_names: LayerChoices = (),
    trainable_layers: Sequence[keras.Layer] = (),
) -> list[tuple[keras.Layer, AdapterConfig]]:
    """The layers to adapt, and how.

    Args:
        model: `keras.Model` or layer.
        config: Config of the method.
        target_layer_names: As `keras_fvae.enable_adapter` takes it.
        exclude_layer_names: The same.
        trainable_layers: List of layers that train as they are.

    Returns:
        List of pairs of a layer and the config for it, in the order of the
        layers in the model.

    Raises:
        ValueError: If there are none; the message lists what there is.
        TypeError: If an argument is of the wrong type.
    """
    candidates = adaptable_layers(model)
    if not candidates:
        raise ValueError(
            f"Model '{model.name}' has no `Dense`, `EinsumDense` or "
            f"convolution layer to adapt.{_list_derived(model)}"
        )
    kinds = _kinds(candidates)
    without = "nothing to adapt"
    excluded = match_layers(
        model, exclude_layer_names, candidates, "exclude_layer_names"
    )
    if target_layer_names is None:
        layers = _default_targets(model, kinds[ALL_LINEAR])
        pairs = [(layer, config) for layer in layers]
        without = "no query or value projections by a name that is known"
    elif isinstance(target_layer_names, dict):
        pairs = _by_pattern(model, config, target_layer_names, candidates)
    else:
        if isinstance(target_layer_names, str) and target_layer_names in kinds:
            layers = _all_but_the_head(
                model,
                kinds[target_layer_names],
                [*excluded, *trainable_layers],
                target_layer_names,
            )
        else:
            layers = match_layers(
                model,
                target_layer_names,  # type: ignore[arg-type]
                candidates,
                "target_layer_names",
            )
        pairs = [(layer, config) for layer in layers]
    excluded_ids = {id(layer) for layer in excluded}
    targets = [pair for pair in pairs if id(pair[0]) not in excluded_ids]
    if not targets:
        misfits = [la for la in candidates if config.why_not(la)]
        fitting = [la for la in candidates if la not in misfits]
        advice = ""
        if misfits:
            advice = f"{config.method_name} does not fit '{misfits[0].name}': "
            advice += f"{config.why_not(misfits[0])}. "
        elif kinds[ALL_CONV] and target_layer_names != ALL_CONV:
            advice = f"Pass target_layer_names={ALL_CONV!r} to adapt its "
            advice += "convolutions. "
        raise ValueError(
            f"Model '{model.name}' has {without}. Received: "
            f"target_layer_names={target_layer_names!r}, exclude_layer_names="
            f"{exclude_layer_names!r}. {advice}{_list_names(model, fitting)}"
        )
    return targets


def _kinds(candidates):
    """Dict of a word for a kind of layers to those of the candidates."""
    kinds = {ALL_LINEAR: [], ALL_CONV: []}
    for layer in candidates:
        if not isinstance(layer, CONVOLUTIONS):
            kinds[ALL_LINEAR].append(layer)
        elif layer.groups == 1:
            kinds[ALL_CONV].append(layer)
    return kinds


def _by_pattern(model, config, patterns, candidates):
    """Pairs of a layer and its config, by what a dict says of each pattern."""
    chosen = {}
    for pattern, changes in patterns.items():
        layers = match_layers(
            model, [pattern], candidates, "target_layer_names"
        )
        changed = _changed_config(config, pattern, changes)
        for layer in layers:
            if id(layer) in chosen:
                other, _ = chosen[id(layer)]
                raise ValueError(
                    "In `target_layer_names` two patterns match the layer "
                    f"'{layer.path}': {other!r} and {pattern!r}. Make them "
                    "such that each layer has one."
                )
            chosen[id(layer)] = pattern, changed
    return [
        (layer, chosen[id(layer)][1])
        for layer in candidates
        if id(layer) in chosen
    ]


def _changed_config(config, pattern, changes):
    """The config for the layers of a pattern."""
    if isinstance(changes, AdapterConfig):
        check_config(changes)
        return changes
    if is_integer(changes):
        changes = {"rank": changes}
    fields = config.get_config()
    if not isinstance(changes, dict):
        raise TypeError(
            f"In `target_layer_names` the value of {pattern!r} must be a rank, "
            "a config, or a dict of fields of the config, such as "
            f"{{'rank': 4, 'alpha': 8}}. Received: {changes!r} (of type "
            f"{type(changes)})"
        )
    if not {*changes} <= {*fields}:
        raise TypeError(
            f"In `target_layer_names` the value of {pattern!r} may have these "
            f"fields of `{type(config).__name__}`: {sorted(fields)}. Received: "
            f"{changes!r}"
        )
    return dataclasses.replace(config, **changes)


def _all_but_the_head(model, candidates, others, kind):
    """The candidates that do not give the outputs of a task.

    A backbone has no head: what gives its outputs is adapted.

    Args:
        model: `keras.Model` or layer.
        candidates: List of layers.
        others: List of layers that are named to train or to be left out.
        kind: String, the word for the candidates.
    """
    if hasattr(model, "default_lora_layer_names"):
        return _in_use(candidates)
    heads = keras_internals.output_layers(model)
    if heads is None:
        if isinstance(model, keras.Model) and not others:
            raise ValueError(
                f"Model '{model.name}' is a subclass, which does not say which "
                "of its layers is its head. Name it in `trainable_layer_names` "
                "or `exclude_layer_names`, beside "
                f"target_layer_names={kind!r}."
            )
        heads = []
    other_ids = {
        id(inner)
        for layer in [*heads, *others]
        for inner in keras_internals.flatten_layers(layer)
    }
    return _in_use([la for la in candidates if id(la) not in other_ids])


def match_layers(
    model: keras.Layer,
    choices: LayerChoices,
    candidates: Sequence[keras.Layer],
    argument: str,
) -> list[keras.Layer]:
    """The candidates that names, expressions or functions choose.

    Args:
        model: `keras.Model` or layer.
        choices: As `keras_fvae.enable_fvae_lora` takes them.
        candidates: List of layers of the model.
        argument: String, how the argument is called that `choices` came by.

    Returns:
        List of layers, in the order of `candidates`.

    Raises:
        ValueError: If one of the choices matches no candidate.
        TypeError: If `choices` or one of them is of the wrong type.
    """
    if isinstance(choices, (str, re.Pattern)) or callable(choices):
        # A layer is callable, too, and refused below.
        choices = [choices]
    if not isinstance(choices, (list, tuple, set)):
        raise TypeError(
            f"`{argument}` must be a layer name, a compiled regular "
            "expression, a function of a layer, or a list of such. "
            f"Received: {argument}={choices!r}"
        )
    chosen_ids: set[int] = set()
    for choice in choices:
        chosen = _choose(model, choice, candidates, argument)
        if not chosen:
            _refuse_other_convolutions(model, choice, argument)
            raise ValueError(
                f"In `{argument}`, {choice!r} matches no layer. "
                f"{_list_names(model, candidates)}"
            )
        chosen_ids.update(id(layer) for layer in chosen)
    return [layer for layer in candidates if id(layer) in chosen_ids]


def _choose(model, choice, candidates, argument):
    if isinstance(choice, keras.Layer):
        raise TypeError(
            f"`{argument}` takes layer names, compiled regular expressions and "
            f"functions of a layer, and no layers. Received: {choice!r}. Pass "
            "its name."
        )
    if isinstance(choice, str):
        return _called(model, [choice], candidates)
    if isinstance(choice, re.Pattern):
        return [c for c in candidates if choice.search(c.path or c.name)]
    if callable(choice):
        return [c for c in candidates if choice(c)]
    raise TypeError(
        f"`{argument}` takes layer names, compiled regular expressions and "
        f"functions of a layer. Received: {choice!r} (of type {type(choice)})"
    )


def _refuse_other_convolutions(model, choice, argument):
    """Says why convolutions that a name chooses cannot be adapted."""
    if isinstance(choice, (str, re.Pattern)):
        others = [
            layer
            for layer in keras_internals.flatten_layers(model)
            if other_convolution(layer)
        ]
        for layer in _choose(model, choice, others, argument):
            check_adaptable(layer)


def _default_targets(model, candidates):
    own_names = [
        name
        for layer in keras_internals.flatten_layers(model)
        if hasattr(layer, "default_lora_layer_names")
        for name in layer.default_lora_layer_names()
    ]
    names = {*own_names, *QUERY_AND_VALUE_NAMES}
    return _in_use(_called(model, names, candidates))


def _in_use(layers):
    """The layers without those that nothing has called, if there are others.

    Some models hold layers that they do not call themselves, such as the mask
    decoder of SAM.
    """
    return [layer for layer in layers if layer.built] or layers


def _called(model, names, candidates):
    """The candidates that have one of the names."""
    held_ids = set()
    for holder in keras_internals.flatten_layers(model):
        for name in names:
            *class_name, attribute = name.split(".")
            if class_name in ([], [type(holder).__name__]):
                held_ids.add(id(getattr(holder, attribute, None)))
    return [
        layer
        for layer in candidates
        if layer.name in names or (id(layer) in held_ids and _is_unnamed(layer))
    ]


def _is_unnamed(layer):
    """Whether Keras made the layer's name up, such as `dense_12`."""
    return re.fullmatch(
        r"((einsum_)?dense|(depthwise_|separable_)?conv[123]d(_transpose)?)"
        r"(_\d+)?",
        layer.name,
    )


def _list_names(model, candidates):
    """The names by which layers can be chosen, also when a model is made anew.

    A layer without a name of its own is called what its attribute is.
    """
    attributes = {
        id(value): name
        for holder in keras_internals.flatten_layers(model)
        for name, value in keras_internals.attributes_of(holder).items()
        if isinstance(value, keras.Layer)
    }
    names = set()
    for layer in candidates:
        attribute = attributes.get(id(layer), layer.name)
        if _is_unnamed(layer):
            names.add(attribute)
        elif attribute in (layer.name, f"_{layer.name}"):
            names.add(layer.name)
        else:
            names.add(f"{layer.name} (held as `{attribute}`)")
    return (
        f"The layers that it can name are: {sorted(names)}."
        f"{_list_derived(model)}"
    )


def _list_derived(model):
    """A sentence on the layers that look as if they could be adapted."""
    derived = sorted(
        f"'{layer.name}' (`{type(layer).__name__}`)"
        for layer in keras_internals.flatten_layers(model)
        if isinstance(layer, BASES) and not is_adaptable(layer)
    )
    if not derived:
        return ""
    return (
        " Not adapted are layers of classes that derive from those and "
        f"compute something else: {', '.join(derived)}."
    )
