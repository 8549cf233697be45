"""What trains in a model, and what its trainer keeps from before."""

from __future__ import annotations

import collections
import gc
import hashlib
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.model.tree import LayerTree

# Models that hold adapted layers, or may come to. Others are looked for.
known_models: weakref.WeakSet[keras.Layer] = weakref.WeakSet()


def train_only(
    model: keras.Layer,
    layers: Sequence[keras.Layer],
    weights: Sequence[keras.Variable],
) -> None:
    """Makes layers and weights of a model train, and nothing else of it.

    What was chosen so is remembered, because flags may be flipped after.

    Args:
        model: `keras.Model` or layer.
        layers: List of layers inside it, which train with all that they hold.
        weights: List of weights inside it, which train besides.
    """
    for layer in layers:
        layer.trainable = True
        weights = [*weights, *layer.trainable_weights]
    layer_ids = {
        id(inner)
        for layer in layers
        for inner in keras_internals.flatten_layers(layer)
    }
    weight_ids = {id(weight) for weight in weights}
    inner_layers = keras_internals.flatten_layers(model)
    for layer in keras_internals.outermost_first(inner_layers):
        choose(layer, id(layer) in layer_ids)
        layer.trainable = is_chosen(layer) or any(
            id(weight) in weight_ids for weight in layer.weights
        )
    for weight in model.weights:
        weight.trainable = id(weight) in weight_ids
        choose(weight, weight.trainable)


def note_flags(tree: LayerTree) -> None:
    """Remembers what trains in a model that is about to be adapted.

    Args:
        tree: `LayerTree` of the model.
    """
    for layer_or_weight in [*tree.all_layers, *tree.model.weights]:
        # What other adapters have frozen is noted already.
        if trained_before(layer_or_weight) is None:
            note_flag(layer_or_weight, layer_or_weight.trainable)


def note_flag(layer_or_weight: Any, value: bool | None) -> None:
    """Remembers whether a layer or weight trained before it was adapted."""
    layer_or_weight.trained_before = value


def trained_before(
    layer_or_weight: Any,
) -> bool | None:
    """Whether it trained before the model was adapted; `None` if not noted."""
    return getattr(layer_or_weight, "trained_before", None)


def train_as_before(tree: LayerTree) -> None:
    """Makes what trained before a model was adapted train, and no more.

    Args:
        tree: `LayerTree` of a model that is adapted no longer.
    """
    for weight in trained_weights(tree).values():
        weight.was_trained = True  # type: ignore[attr-defined]
    layers = keras_internals.outermost_first(tree.all_layers)
    parts = [*layers, *tree.model.weights]
    # Before the first is set, since what holds a layer sets that, too.
    flags = [
        part.trainable if trained_before(part) is None else trained_before(part)
        for part in parts
    ]
    for part, trainable in zip(parts, flags):
        part.trainable = trainable
        choose(part, False)
        note_flag(part, None)


def choose(layer_or_weight: Any, value: bool = True) -> None:
    """Remembers whether a layer or weight was chosen to train."""
    layer_or_weight.is_chosen_to_train = value


def is_chosen(layer_or_weight: Any) -> bool:
    """Whether it was chosen to train, whatever its flag says now."""
    return getattr(layer_or_weight, "is_chosen_to_train", False)


def trained_weights(tree: LayerTree) -> dict[str, keras.Variable]:
    """Dict of path to weight, of what trains, or did before it was frozen.

    Args:
        tree: `LayerTree` of a model with adapted layers.
    """
    trained_ids = {
        id(weight)
        for weight in [
            *tree.model.trainable_weights,
            *keras_internals.optimized_variables(tree.model),
        ]
    }
    return {
        path: weight
        for path, weight in tree.weights.items()
        if id(weight) in trained_ids or is_chosen(weight)
    }


def once_trained_weights(tree: LayerTree) -> dict[str, keras.Variable]:
    """Dict of path to weight, of what was trained beside any adapters.

    Of those that are there, and of those that were removed.
    """
    return {
        **(trained_weights(tree) if tree.adapted else {}),
        **{
            path: weight
            for path, weight in tree.weights.items()
            if getattr(weight, "was_trained", False)
        },
    }


def changed_state(
    tree: LayerTree, if_noted: bool = False
) -> dict[str, keras.Variable]:
    """Dict of path to weight, of what layers changed without a gradient.

    Such as moving averages: where it is not what it was when the model was
    first adapted, or nobody knows.

    Args:
        tree: `LayerTree` of a model.
        if_noted: Boolean. Whether to leave out what nobody knows of.
    """
    state_ids = state_ids_of(tree)
    return {
        path: weight
        for path, weight in tree.weights.items()
        if id(weight) in state_ids
        and not (if_noted and _noted_digest(weight) is None)
        and _has_changed(weight)
    }


def note_state(tree: LayerTree) -> None:
    """Remembers the state of layers, so that a change of it will be seen.

    Args:
        tree: `LayerTree` of a model that is being adapted.
    """
    state_ids = state_ids_of(tree)
    for weight in tree.weights.values():
        is_new = id(weight) in state_ids and _noted_digest(weight) is None
        if is_new and keras_internals.has_value(weight):
            note_digest(weight, _digest(weight))


def note_digest(weight: Any, digest: str | None) -> None:
    """Remembers a weight by its digest, a string, or forgets it by `None`."""
    weight.noted_digest = digest


def noted_state(tree: LayerTree) -> dict[str, str]:
    """Dict of path to digest, of what `note_state` remembers."""
    return {
        path: _noted_digest(weight)
        for path, weight in tree.weights.items()
        if _noted_digest(weight) is not None
    }


def state_ids_of(tree: LayerTree) -> set[int]:
    """The ids of the weights that layers may change without a gradient."""
    ids: set[int] = set()
    for layer in tree.all_layers:
        # What quantization leaves is no state, and large.
        if getattr(layer, "quantization_mode", None) is None:
            state = keras_internals.state_of(layer)
            if state and isinstance(layer, keras.layers.Wrapper):
                # Such as spectral normalization, which changes a kernel.
                state = layer.weights
            ids.update(map(id, state))
    return ids


def _has_changed(weight):
    noted = _noted_digest(weight)
    return noted is None or noted != _digest(weight)


def _noted_digest(weight):
    return getattr(weight, "noted_digest", None)


def _digest(weight):
    array = replicas.to_numpy(ops.cast(weight, "float32"))
    return hashlib.sha256(array.tobytes()).hexdigest()


def share_losses(layers: Sequence[keras.Layer]) -> None:
    """Has the adapters of a model that add a loss share its weight.

    Those of one method that train; what does not train adds nothing.

    Args:
        layers: List of all adapted layers of the model.
    """
    adapters = [layer.adapter for layer in layers if layer.adapter.adds_loss]
    numbers = collections.Counter(
        type(adapter) for adapter in adapters if adapter.is_trainable
    )
    for adapter in adapters:
        adapter.share_loss(max(1, numbers[type(adapter)]))


def warn_of_missing_callbacks(
    model: keras.Model, layers: Sequence[keras.Layer]
) -> None:
    """Warns if the method of some adapted layers needs a callback in `fit`.

    Args:
        model: `keras.Model`, which is about to train.
        layers: List of all its adapted layers.
    """
    messages = {
        layer.adapter.without_callback
        for layer in layers
        if layer.adapter.callback is None and layer.adapter.is_trainable
    }
    for message in sorted(messages - {None}):
        warnings.warn(f"Model '{model.name}': {message}", stacklevel=4)


def dismiss_callbacks(layers: Sequence[keras.Layer]) -> None:
    """Ends what the callbacks of adapters do, if an error has ended `fit`.

    Args:
        layers: List of adapted layers.
    """
    for layer in layers:
        # It leaves all of its adapters.
        if layer.adapter.callback is not None:
            layer.adapter.callback.leave()


def remember_training(model: keras.Model) -> None:
    """Remembers what trains in a model, when it is about to train."""
    for weight in model.trainable_weights:
        choose(weight)


def known_models_with(layers: Sequence[keras.Layer]) -> list[keras.Model]:
    """List of the models with adapters that hold one of the layers."""
    layer_ids = {id(layer) for layer in layers}
    return [model for model in known_models if _holds(model, layer_ids)]


def _holds(model, layer_ids):
    """Whether one of the layers with these ids is in a model."""
    return any(
        id(layer) in layer_ids
        for layer in keras_internals.flatten_layers(model)
    )


def living_models_with(layers: Sequence[keras.Layer]) -> list[keras.Model]:
    """Every model that holds one of the layers, such as a backbone's task.

    Layers don't know what they are part of, so the models are looked for
    among all objects that there are; the garbage collector does not list
    those that it was told to freeze.
    """
    layer_ids = {id(layer) for layer in layers}
    classes = subclasses(keras.Model)
    found = [obj for obj in gc.get_objects() if type(obj) in classes]
    models = {id(model): model for model in [*found, *known_models]}
    for model in [*models.values()]:
        models.pop(id(keras_internals.model_within(model)), None)
    return [
        model
        for model in models.values()
        # Some may be half made, by a constructor that raised.
        if hasattr(model, "_layers") and _holds(model, layer_ids)
    ]


def subclasses(cls: type) -> set[type]:
    """Set of the class and all that derive from it."""
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def reset_training_state(
    layers: Sequence[keras.Layer], keep_optimizer: bool = True
) -> None:
    """Makes the models that hold the layers start anew, for other weights.

    Their steps are compiled again, and their optimizers have slots for the
    weights that train now.

    Args:
        layers: List of layers whose weights were added, removed or frozen.
        keep_optimizer: Boolean. Whether a model whose optimizer has run is
            left to its user to compile again, who is warned.
    """
    for model in living_models_with(layers):
        keras_internals.publish_weights(model)
        forget_compiled_functions(model)
        if getattr(model, "adapter_scales", None) is not None:
            model.adapter_scales = None
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or not optimizer.built:
            continue
        num_steps = int(ops.convert_to_numpy(optimizer.iterations))
        if num_steps == 0 or not keep_optimizer:
            config = optimizer.get_config()
            model.optimizer = type(optimizer).from_config(config)
        else:
            model.compiled = False
            warnings.warn(
                f"Model '{model.name}' was trained before its adapters changed "
                "which of its weights train. Call `compile()` again before "
                "`fit()`.",
                stacklevel=3,
            )


def forget_compiled_functions(
    model: keras.Layer,
    kinds: Sequence[str] = ("train", "test", "predict", "generate"),
) -> None:
    """Makes a model compile its steps anew, for its layers as they are now."""
    for kind in kinds:
        # Also where there is none now, but for other adapters or scales.
        if hasattr(model, f"{kind}_function"):
            setattr(model, f"{kind}_function", None)


def refuse_while_running(layers: Sequence[keras.Layer]) -> None:
    """Raises a `ValueError` if a model that holds one of the layers runs `fit`.

    Or something like it: what is compiled then, and on JAX where the weights
    are, cannot be changed before it ends.
    """
    layer_ids = {id(layer) for layer in layers}
    for name, model in keras_internals.running_trainers():
        if _holds(model, layer_ids):
            raise ValueError(
                f"Model '{model.name}' is in the middle of `{name}`: which of "
                "its layers are adapted, and how, cannot be changed before "
                "that ends. Do it before or after `fit`, not in a callback."
            )
