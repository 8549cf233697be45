"""Enabling: adapt layers of a model in place, and freeze the rest."""

import dataclasses
import math

import keras

from keras_fvae.backend import keras_internals
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import check_config
from keras_fvae.model.install import install
from keras_fvae.model.lookup import check_built
from keras_fvae.model.targets import find_targets
from keras_fvae.model.targets import match_layers
from keras_fvae.model.training import refuse_while_running
from keras_fvae.model.tree import LayerTree


@dataclasses.dataclass(frozen=True)
class AdapterSummary:
    """What `enable_adapter` did; `print` it to read it.

    Args:
        config: Config of the method.
        layer_paths: Tuple of strings, the paths of the adapted layers.
        base_parameters: Integer, the model's parameters without the adapters.
        total_parameters: Integer, with the adapters.
        trainable_parameters: Integer, the parameters that train.
        inference_parameters: Integer, those of the adapters that inference
            needs.
    """

    config: AdapterConfig
    layer_paths: tuple
    base_parameters: int
    total_parameters: int
    trainable_parameters: int
    inference_parameters: int

    def __str__(self):
        def count(parameters):
            percent = 100 * parameters / self.base_parameters
            return f"{parameters:>15,}  ({percent:.2f} % of the base model)"

        return "\n".join(
            [
                f"{self.config.method_name} of rank {self.config.rank} on "
                f"{len(self.layer_paths)} layers:",
                *(f"  {path}" for path in self.layer_paths),
                "Parameters:",
                f"  base model          {self.base_parameters:>15,}",
                f"  with the adapters   {self.total_parameters:>15,}",
                f"  trainable           {count(self.trainable_parameters)}",
                f"  kept for inference  {count(self.inference_parameters)}",
            ]
        )

    __repr__ = __str__


def enable_adapter(
    model, config, target_layer_names=None, *, trainable_layer_names=()
):
    """Adapts a model by a low-rank method, in place, and freezes all the rest.

    The layers stay the same objects, with the same names, paths and weights.
    At first the model predicts what it did.

    Args:
        model: `keras.Model` (or layer) that is built. Every `Dense` and
            `EinsumDense` layer inside it, at any depth, can be adapted.
        config: Config of the method, such as `keras_fvae.DoRAConfig(rank=16)`.
            A `seed` is counted up from layer to layer.
        target_layer_names: Which layers to adapt: a layer name (for a
            layer without one, the name of the attribute that holds it), a
            compiled regular expression that is searched for in `layer.path`, a
            function that takes a layer and returns a boolean, or a list of
            such. `None` (default) means the query and value projections of
            attention, whatever they are called in KerasHub, and what a
            backbone's `default_lora_layer_names()` says.
        trainable_layer_names: Layers to train as well, in the same forms.
            Everything else in `model` is frozen.

    Returns:
        An `AdapterSummary`: the adapted layers and the parameter counts.

    Raises:
        ValueError: If nothing matches a name or expression, a layer that
            matches cannot be adapted by the method, or the model is adapted
            already. The model is then as it was.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> inputs = keras.Input((10, 32))
    >>> x = keras.layers.MultiHeadAttention(2, 16)(inputs, inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    >>> summary = keras_fvae.enable_adapter(
    ...     model, keras_fvae.LoRAConfig(4), trainable_layer_names=["head"]
    ... )
    >>> [path.split("/")[-1] for path in summary.layer_paths]
    ['query', 'value']
    """
    check_built(model)
    check_config(config)
    tree = LayerTree(model)
    refuse_if_adapted(tree)
    targets = find_targets(model, target_layer_names)
    for layer in targets:
        check_adaptable(layer)
    refuse_while_running(targets)
    trainable_layers = match_layers(
        model,
        trainable_layer_names,
        keras_internals.flatten_layers(model)[1:],
        "trainable_layer_names",
    )
    adapters = [
        build_adapter(layer, config.for_layer(index, len(targets)))
        for index, layer in enumerate(targets)
    ]
    _refuse_loops(tree, targets, adapters)
    install(tree, targets, adapters, trainable_layers)
    return summarize(model, config, targets)


def refuse_if_adapted(tree):
    """Raises a `ValueError` if a model has adapters."""
    if tree.adapted:
        layer = tree.adapted[0]
        raise ValueError(
            f"Model '{tree.model.name}' is adapted by "
            f"{layer.config.method_name} already: {len(tree.adapted)} layers, "
            f"the first is '{layer.path}'. Call "
            "`keras_fvae.remove_adapter(model)` first, which makes it the "
            "plain model again."
        )


def _refuse_loops(tree, targets, adapters):
    """Refuses layers in a loop, out of which TensorFlow and JAX let no loss.

    Nor do random numbers get out; what has neither trains there.
    """
    layers = [
        layer
        for layer, adapter in zip(targets, adapters)
        if adapter.changes_state(training=True)
    ]
    for holder in tree.ancestors(layers):
        if isinstance(holder, keras.layers.RNN) and not holder.unroll:
            inner_ids = {
                id(inner) for inner in keras_internals.flatten_layers(holder)
            }
            layer = next(t for t in layers if id(t) in inner_ids)
            raise ValueError(
                f"The layer '{layer.path}' is in the loop of the recurrent "
                f"layer '{holder.name}', out of which neither a loss nor "
                "random numbers of an adapter come. Make that layer with "
                "`unroll=True`, take a method that has neither, such as "
                "`LoRAConfig()`, or choose other `target_layer_names`."
            )


def summarize(model, config, targets):
    adapter_ids = {
        id(weight) for layer in targets for weight in layer.adapter.weights
    }
    return AdapterSummary(
        config=config,
        layer_paths=tuple(layer.path for layer in targets),
        base_parameters=_count(
            w for w in model.weights if id(w) not in adapter_ids
        ),
        total_parameters=_count(model.weights),
        trainable_parameters=_count(model.trainable_weights),
        inference_parameters=sum(
            layer.adapter.num_inference_parameters for layer in targets
        ),
    )


def _count(weights):
    return sum(math.prod(weight.shape) for weight in weights)
