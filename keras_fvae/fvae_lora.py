"""The star's own verb."""

from __future__ import annotations

from typing import Any

import keras

from keras_fvae.layers.config import DEFAULT_RANK
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.config import resolve_config
from keras_fvae.model.enable import enable_adapter
from keras_fvae.model.summary import AdapterSummary
from keras_fvae.model.targets import LayerChoices
from keras_fvae.model.targets import Targets


def enable_fvae_lora(
    model: keras.Layer,
    rank: int = DEFAULT_RANK,
    target_layer_names: Targets | None = None,
    *,
    trainable_layer_names: LayerChoices = (),
    exclude_layer_names: LayerChoices = (),
    config: FVAELoRAConfig | None = None,
    **config_options: Any,
) -> AdapterSummary:
    """Adapts a model by FVAE-LoRA, in place, and freezes all the rest.

    The layers stay the same objects, with the same names, paths and weights.
    At first the model predicts what it did. In training each adapted layer
    adds its share of the FVAE's loss to `model.losses`.

    Args:
        model: `keras.Model` (or layer) that is built. Every `Dense`,
            `EinsumDense`, `Conv1D`, `Conv2D` and `Conv3D` layer inside it, at
            any depth, can be adapted, but for convolutions larger than 1,
            because the FVAE is not worth there what it costs.
        rank: Positive integer, width of the latents. Defaults to `16`.
        target_layer_names: Which layers to adapt, as in
            `keras_fvae.enable_adapter`: names, expressions, functions,
            `"all-linear"`, `"all-conv"`, or a dict of such to ranks. `None`
            (default) means the query and value projections of attention.
        trainable_layer_names: Layers to train as well, as a name, expression,
            function, or a list of such. Everything else in `model` is frozen.
        exclude_layer_names: Layers not to adapt, in the same forms.
        config: Optional `keras_fvae.FVAELoRAConfig` with all settings, whose
            `rank` then counts.
        **config_options: Single fields of `keras_fvae.FVAELoRAConfig`, such
            as `dropout=0.0`. A `seed` is counted up from layer to layer.

    Returns:
        An `AdapterSummary`: the adapted layers and the parameter counts.

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
    return enable_adapter(
        model,
        resolve_config(rank, config, **config_options),
        target_layer_names,
        trainable_layer_names=trainable_layer_names,
        exclude_layer_names=exclude_layer_names,
    )
