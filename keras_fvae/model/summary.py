"""What is adapted in a model, how, and what of it trains, in words."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import keras

from keras_fvae.backend import replicas
from keras_fvae.layers import switching
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapted import seen_as
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import BASES
from keras_fvae.model import lookup
from keras_fvae.model.tree import LayerTree


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """How one layer is adapted.

    Args:
        path: String, the path of the layer.
        config: Config of its adapter.
        state: `"as made"`, when the update is 0 as it is at the start,
            `"trained"` or `"finalized"`.
        is_on: Boolean. `False` inside an `adapter_disabled` block.
        num_ranks: Integer, how many ranks the update has: those of the config,
            or what AdaLoRA has left of them.
        health: String, the word of `FVAELoRAMonitor` for the latent z1 after
            the last epoch; `None` if it has not looked.
    """

    path: str
    config: AdapterConfig
    state: str
    is_on: bool
    num_ranks: int
    health: str | None

    @property
    def method(self) -> str:
        """String, the method, the rank, and the scale if it is not 1."""
        method = f"{self.config.method_name} of rank {self.config.rank}"
        if self.config.scale != 1:
            method += f", scale {self.config.scale:g}"
        return method


@dataclasses.dataclass(frozen=True)
class AdapterSummary:
    """What is adapted in a model, and what of it trains; `print` it to read it.

    Args:
        layers: Tuple of a `LayerSummary` for each adapted layer.
        others: Tuple of strings, the paths of the weights that train besides.
        fresh: Tuple of strings, the paths of layers that do not train and look
            as if nobody had trained them, such as a new head.
        base_parameters: Integer, the model's parameters without the adapters.
        total_parameters: Integer, with the adapters.
        trainable_parameters: Integer, the parameters that train.
        inference_parameters: Integer, those of the adapters that inference
            needs.
    """

    layers: tuple[LayerSummary, ...]
    others: tuple[str, ...]
    fresh: tuple[str, ...]
    base_parameters: int
    total_parameters: int
    trainable_parameters: int
    inference_parameters: int

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Tuple of strings, the paths of the adapted layers."""
        return tuple(layer.path for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(
            [
                *self._lines_of_layers(),
                *self._lines_of_others(),
                "Parameters:",
                f"  base model          {self.base_parameters:>15,}",
                f"  with the adapters   {self.total_parameters:>15,}",
                f"  trainable           {self._count('trainable_parameters')}",
                f"  kept for inference  {self._count('inference_parameters')}",
            ]
        )

    __repr__ = __str__

    def _lines_of_layers(self):
        methods = {layer.method for layer in self.layers}
        states = {layer.state for layer in self.layers}
        heading = methods.pop() if len(methods) == 1 else "Adapters"
        # What all have in common is said once.
        heading += f" on {len(self.layers)} layers"
        if len(states) == 1:
            heading += f", {states.pop()}"
        lines = [f"{heading}:"]
        for layer in self.layers:
            words = [layer.method] if methods else []
            words += [layer.state] if states else []
            words += [] if layer.is_on else ["off"]
            if layer.num_ranks != layer.config.rank:
                words.append(f"{layer.num_ranks} ranks left")
            words += [layer.health] if layer.health else []
            lines.append(
                f"  {layer.path}" + (f"  ({', '.join(words)})" if words else "")
            )
        return lines

    def _lines_of_others(self):
        lines = []
        if self.others:
            lines.append("Train besides:")
            lines += [f"  {path}" for path in self.others]
        if self.fresh:
            lines.append(f"Warning: {frozen_but_new(self.fresh)}")
        return lines

    def _count(self, name):
        parameters = getattr(self, name)
        percent = 100 * parameters / self.base_parameters
        return f"{parameters:>15,}  ({percent:.2f} % of the base model)"


def frozen_but_new(paths: tuple[str, ...]) -> str:
    """A sentence that warns of layers that look new and do not train.

    Args:
        paths: Tuple of strings, at least one.
    """
    one = len(paths) == 1
    return (
        f"{'The layer' if one else 'The layers'} "
        f"{', '.join(map(repr, paths))} {'looks' if one else 'look'} new and "
        f"{'does' if one else 'do'} not train. If it is the head of your task, "
        "name it in `trainable_layer_names`, or adapt the backbone alone."
    )


def adapter_summary(model: keras.Layer) -> AdapterSummary:
    """Says what is adapted in a model, how, and what of it trains.

    Args:
        model: `keras.Model` or layer with adapted layers.

    Returns:
        An `AdapterSummary`.

    Raises:
        ValueError: If no layer is adapted.
        TypeError: If `model` is no Keras model or layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    >>> keras_fvae.adapter_summary(model)
    LoRA of rank 2 on 1 layers, as made:
      sequential/query
    Parameters:
      base model                       15
      with the adapters                29
      trainable                        14  (93.33 % of the base model)
      kept for inference               14  (93.33 % of the base model)
    """
    lookup.require_adapted_layers(model)
    return summarize(model)


def summarize(model: keras.Layer) -> AdapterSummary:
    """The `AdapterSummary` of a model with adapted layers."""
    tree = LayerTree(model)
    adapter_ids = {
        id(weight) for layer in tree.adapted for weight in layer.adapter.weights
    }
    return AdapterSummary(
        layers=tuple(_summarize_layer(layer) for layer in tree.adapted),
        others=tuple(p for p, w in tree.weights.items() if w.trainable),
        fresh=frozen_new_layers(tree),
        base_parameters=_count(
            w for w in model.weights if id(w) not in adapter_ids
        ),
        total_parameters=_count(model.weights),
        trainable_parameters=_count(model.trainable_weights),
        inference_parameters=sum(
            layer.adapter.num_inference_parameters for layer in tree.adapted
        ),
    )


@contextlib.contextmanager
def shown_with_methods(model: keras.Model) -> Iterator[None]:
    """Names the method beside the class of each layer, inside the block.

    For `keras.Model.summary`, which shows a layer as what its class is called.
    That is the plain layer's name at all other times, because Keras finds the
    weights in a file by it.

    Args:
        model: `keras.Model` with adapted layers.
    """
    layers = {id(la): la for la in LayerTree(model).all_layers}
    del layers[id(model)]
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            adapted = lookup.adapted_layers(layer)
            methods = sorted({one.config.method_name for one in adapted})
            if methods:
                name = ", ".join([type(layer).__name__, *methods])
                name += "" if layer in adapted else " inside"
                shown = _class_called(name, type(layer))  # type: ignore[arg-type]
                stack.enter_context(seen_as(layer, shown))
        yield


@functools.cache
def _class_called(name, base):
    return type(name, (base,), {"__module__": base.__module__})


def frozen_new_layers(tree: LayerTree) -> tuple[str, ...]:
    """Tuple of paths of frozen layers that look as if nobody had trained them.

    A bias that is 0 throughout is how a layer starts. In a model whose other
    biases are 0, too, that says nothing; nor does it in a backbone, which has
    no head and may have been left so by its pretraining.

    Args:
        tree: `LayerTree`.
    """
    if hasattr(tree.model, "default_lora_layer_names"):
        return ()
    is_zero = {
        path: not replicas.to_numpy(layer.bias).any()
        for path, layer in tree.layers.items()
        if isinstance(layer, BASES) and layer.built and layer.bias is not None
    }
    if all(is_zero.values()):
        return ()
    return tuple(
        path
        for path, zero in is_zero.items()
        if zero
        and "/" not in path
        and not isinstance(tree.layers[path], AdaptedLayer)
        and not tree.layers[path].trainable_weights
    )


def _summarize_layer(layer):
    adapter = layer.adapter
    state = "as made" if adapter.is_zero else "trained"
    return LayerSummary(
        layer.path,
        layer.config,
        "finalized" if adapter.finalized else state,
        not switching.is_off(layer),
        adapter.num_ranks,
        adapter.health,
    )


def _count(weights):
    return sum(math.prod(weight.shape) for weight in weights)
