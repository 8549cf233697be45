"""Enabling: find the layers to adapt, adapt them in place, freeze the rest."""

import dataclasses
import math
import re

from keras_fvae import keras_internals
from keras_fvae.config import DEFAULT_RANK
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.config import resolve_config
from keras_fvae.containers import attach_adapters
from keras_fvae.layers import build_adapter
from keras_fvae.layers import check_adaptable
from keras_fvae.lookup import adaptable_layers
from keras_fvae.lookup import adapted_layers
from keras_fvae.lookup import check_model
from keras_fvae.training import forget_training
from keras_fvae.training import freeze_all_but

# What the query and value projections of attention layers are called, in
# models that do not say themselves what to adapt.
QUERY_AND_VALUE_NAMES = (
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
)


@dataclasses.dataclass(frozen=True)
class FVAELoRASummary:
    """What `enable_fvae_lora` did; `print` it to read it.

    Args:
        config: `FVAELoRAConfig`, the settings.
        layer_paths: Tuple of strings, the paths of the adapted layers.
        base_parameters: Integer, the model's parameters without the adapters.
        total_parameters: Integer, with the adapters.
        trainable_parameters: Integer, the parameters that train.
        inference_parameters: Integer, those of the adapters that inference
            needs.
    """

    config: FVAELoRAConfig
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
                f"FVAE-LoRA of rank {self.config.rank} on "
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


def enable_fvae_lora(
    model,
    rank=DEFAULT_RANK,
    target_layer_names=None,
    *,
    trainable_layer_names=(),
    config=None,
    **config_options,
):
    """Adapts a model by FVAE-LoRA, in place, and freezes all the rest.

    The layers stay the same objects, with the same names, paths and weights.
    At first the model predicts what it did. In training each adapted layer
    adds its share of the FVAE's loss to `model.losses`.

    Args:
        model: `keras.Model` (or layer) that is built. Every `Dense` and
            `EinsumDense` layer inside it, at any depth, can be adapted.
        rank: Positive integer, width of the latents. Defaults to `16`.
        target_layer_names: Which layers to adapt: a layer name, a compiled
            regular expression that is searched for in `layer.path`, a list of
            such, or a function that takes a layer and returns a boolean.
            `None` (default) means what the `default_lora_layer_names()` of a
            KerasHub backbone says, else the query and value projections.
        trainable_layer_names: Layers to train as well, in the same forms.
            Everything else in `model` is frozen.
        config: Optional `keras_fvae.FVAELoRAConfig` with all settings, whose
            `rank` then counts.
        **config_options: Single fields of `keras_fvae.FVAELoRAConfig`, such
            as `dropout=0.0`. The `elbo_weight` is shared among the adapted
            layers; a `seed` is counted up from layer to layer.

    Returns:
        An `FVAELoRASummary`: the adapted layers and the parameter counts.

    Raises:
        ValueError: If nothing matches a name or expression, a layer that
            matches cannot be adapted, the model is adapted already, or a
            setting is not allowed. The model is then as it was.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> inputs = keras.Input((10, 32))
    >>> x = keras.layers.MultiHeadAttention(2, 16)(inputs, inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    >>> summary = keras_fvae.enable_fvae_lora(
    ...     model, rank=4, trainable_layer_names=["head"]
    ... )
    >>> [path.split("/")[-1] for path in summary.layer_paths]
    ['query', 'value']

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """
    check_model(model)
    config = resolve_config(rank, config, **config_options)
    adapted = adapted_layers(model)
    if adapted:
        raise ValueError(
            f"Model '{model.name}' is adapted by FVAE-LoRA already: "
            f"{len(adapted)} layers, the first is '{adapted[0].path}'. It can "
            "be enabled only once; start from the base model."
        )
    targets = _find_targets(model, target_layer_names)
    for layer in targets:
        check_adaptable(layer)
    trainable_layers = _match(
        trainable_layer_names,
        keras_internals.flatten_layers(model)[1:],
        "trainable_layer_names",
    )
    adapters = [
        build_adapter(layer, share)
        for layer, share in zip(targets, share_config(config, len(targets)))
    ]
    attach_adapters(model, targets, adapters)
    trainable_weights = [w for a in adapters for w in a.weights]
    for layer in trainable_layers:
        layer.trainable = True
        trainable_weights += layer.trainable_weights
    freeze_all_but(model, trainable_weights)
    forget_training(targets)
    return summarize(model, config, targets)


def _find_targets(model, target_layer_names):
    """The layers to adapt, or an error that lists what there is."""
    candidates = adaptable_layers(model)
    if not candidates:
        raise ValueError(
            f"Model '{model.name}' has no `Dense` or `EinsumDense` layer to "
            "adapt. If it is not built yet, call it on data first."
        )
    if target_layer_names is not None:
        targets = _match(target_layer_names, candidates, "target_layer_names")
    else:
        targets = _default_targets(model, candidates)
    if not targets:
        raise ValueError(
            f"There is nothing to adapt in model '{model.name}'. Received: "
            f"target_layer_names={target_layer_names!r}. "
            f"{_list_names(candidates)}"
        )
    return targets


def _default_targets(model, candidates):
    own_names = [
        name
        for layer in keras_internals.flatten_layers(model)
        if hasattr(layer, "default_lora_layer_names")
        for name in layer.default_lora_layer_names()
    ]
    for names in (own_names, QUERY_AND_VALUE_NAMES):
        targets = [layer for layer in candidates if layer.name in names]
        if targets:
            break
    return targets


def _match(choices, candidates, argument):
    """The candidates that names, expressions or functions choose."""
    if isinstance(choices, (str, re.Pattern)) or callable(choices):
        choices = [choices]
    if not isinstance(choices, (list, tuple, set)):
        raise TypeError(
            f"`{argument}` must be a layer name, a compiled regular "
            "expression, a function of a layer, or a list of such. "
            f"Received: {argument}={choices!r}"
        )
    chosen_ids = set()
    for choice in choices:
        is_chosen = _predicate(choice, argument)
        chosen = [id(layer) for layer in candidates if is_chosen(layer)]
        if not chosen:
            raise ValueError(
                f"In `{argument}`, {choice!r} matches no layer. "
                f"{_list_names(candidates)}"
            )
        chosen_ids.update(chosen)
    return [layer for layer in candidates if id(layer) in chosen_ids]


def _predicate(choice, argument):
    if isinstance(choice, str):
        return lambda layer: layer.name == choice
    if isinstance(choice, re.Pattern):
        return lambda layer: choice.search(layer.path or layer.name)
    if callable(choice):
        return choice
    raise TypeError(
        f"`{argument}` takes layer names, compiled regular expressions and "
        f"functions of a layer. Received: {choice!r} (of type {type(choice)})"
    )


def _list_names(candidates):
    names = sorted({layer.name for layer in candidates})
    return f"The layers that it can name are: {names}."


def share_config(config, num_layers):
    """One config for each adapted layer: its share of the weight, its seed."""
    for index in range(num_layers):
        yield dataclasses.replace(
            config,
            elbo_weight=config.elbo_weight / num_layers,
            seed=None if config.seed is None else config.seed + index,
        )


def summarize(model, config, targets):
    adapter_ids = {
        id(weight) for layer in targets for weight in layer.adapter.weights
    }
    return FVAELoRASummary(
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
