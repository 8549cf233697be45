"""From training to use: finalize, merge, or do without the adapters."""

from __future__ import annotations

from contextlib import AbstractContextManager

import keras

from keras_fvae.layers import attach
from keras_fvae.layers import switching
from keras_fvae.layers.config import is_finite
from keras_fvae.model import containers
from keras_fvae.model import lookup
from keras_fvae.model import training
from keras_fvae.model.tree import LayerTree


def finalize_adapter(model: keras.Layer) -> None:
    """Drops what inference does not need.

    Of FVAE-LoRA that is q2, the decoder and the variance of q1; DoRA keeps
    the ratio of its magnitudes to the norms in the place of both. The model
    predicts what it did. It cannot be trained any more.

    Args:
        model: `keras.Model` or layer with adapted layers, changed in place.

    Raises:
        ValueError: If no layer is adapted, or an FVAE samples at inference,
            which needs the variance of q1. The model is then as it was.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.finalize_adapter(model)
    >>> [weight.name for weight in model.layers[0].adapter.weights]
    ['kernel_b', 'feature_weights', 'latent_weights']

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3: only the mean of q1 is used
    at inference.
    """
    layers = lookup.require_adapted_layers(model)
    for layer in layers:
        with _named_refusals("finalized", layer):
            layer.adapter.check_can_finalize()
    training.refuse_while_running(layers)
    adapters = []
    for layer in layers:
        adapter = attach.build_adapter(
            layer,
            layer.adapter.inference_config,
            finalized=True,
            starts_anew=False,
        )
        adapter.set_arrays(attach.inference_arrays(layer))
        adapter.trainable = False
        adapters.append(adapter)
    containers.replace_adapters(layers, adapters)
    training.reset_training_state(layers, keep_optimizer=False)


def merge_adapter(model: keras.Layer) -> None:
    """Folds the updates into the kernels.

    The layers are plain Keras layers again, and cost what they did before
    they were adapted. All base weights stay frozen. FVAE-LoRA can be merged if
    it was trained with `encoder_units=()`; a layer without a bias gets one
    then, for the offset of the update.

    Args:
        model: `keras.Model` or layer with adapted layers, changed in place.

    Raises:
        ValueError: If no layer is adapted, an update is no linear function of
            the input or is not the same each time, or a layer is quantized.
            The model is then as it was.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2, encoder_units=())
    >>> keras_fvae.merge_adapter(model)
    >>> hasattr(model.layers[0], "adapter")
    False

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """
    layers = lookup.require_adapted_layers(model)
    training.refuse_while_running(layers)
    merged = []
    for layer in layers:
        with _named_refusals("merged", layer):
            merged.append(attach.merged_weights(layer))
    containers.detach_adapters(model, layers, merged)
    training.reset_training_state(layers, keep_optimizer=False)


def remove_adapter(model: keras.Layer) -> None:
    """Takes the adapters off: the base model again, bit for bit.

    What trained before the model was adapted trains again. A head that was
    trained with the adapters stays as it was trained. Another method, or the
    same with other settings, can take the place.

    Args:
        model: `keras.Model` or layer with adapted layers, changed in place.

    Raises:
        ValueError: If no layer is adapted.
        TypeError: If `model` is no Keras model or layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> for rank in (1, 2):
    ...     summary = keras_fvae.enable_adapter(
    ...         model, keras_fvae.LoRAConfig(rank)
    ...     )
    ...     keras_fvae.remove_adapter(model)
    >>> [weight.name for weight in model.trainable_weights]
    ['kernel', 'bias']
    """
    layers = lookup.require_adapted_layers(model)
    training.refuse_while_running(layers)
    containers.detach_adapters(model, layers)
    training.train_as_before(LayerTree(model))
    training.reset_training_state(layers, keep_optimizer=False)


def adapter_disabled(model: keras.Layer) -> AbstractContextManager[None]:
    """Makes a model predict like the base model, inside a `with` block.

    For the thread that enters the block, and in any model that the layers are
    in. Blocks may be nested, and overlap. Steps are compiled once for each
    set of adapters that is off, and kept. What trains inside the block does so
    without the adapters, which stay as they are.

    Args:
        model: `keras.Model` or layer with adapted layers.

    Returns:
        A context manager.

    Raises:
        ValueError: If no layer is adapted.
        TypeError: If `model` is no Keras model or layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> with keras_fvae.adapter_disabled(model):
    ...     predictions = model.predict(np.ones((1, 4)), verbose=0)
    """
    return switching.switched_off(lookup.require_adapted_layers(model))


def adapter_scale(
    model: keras.Layer, factor: float
) -> AbstractContextManager[object]:
    """Makes the updates of all adapters weigh more, or less.

    For good, or inside a `with` block: `alpha` of each adapter is multiplied
    by the factor, so that what is saved, finalized or merged has it, too.
    Steps are compiled once for each factor, and kept.

    Args:
        model: `keras.Model` or layer with adapted layers, changed in place.
        factor: Positive float. 1 leaves the updates as they are; two factors
            one after the other multiply.

    Returns:
        A context manager, whose block ends without the factor. Blocks may be
        nested, and overlap.

    Raises:
        ValueError: If no layer is adapted, `factor` is not positive, or the
            method has no `alpha`, such as HiRA, or is DoRA and finalized.
        TypeError: If `model` is no Keras model or layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> with keras_fvae.adapter_scale(model, 0.5):
    ...     predictions = model.predict(np.ones((1, 4)), verbose=0)
    >>> layer_scale = keras_fvae.adapter_scale(model, 2.0)
    >>> model.layers[0].config.scale
    2.0
    """
    layers = lookup.require_adapted_layers(model)
    if not is_finite(factor) or factor <= 0:
        raise ValueError(
            "`factor` must be a positive number. Received: "
            f"factor={factor!r}. To do without the adapters, use "
            "`adapter_disabled`."
        )
    for layer in layers:
        with _named_refusals("scaled", layer):
            layer.adapter.check_can_scale()
    training.refuse_while_running(layers)
    return _Scaled(layers, factor)


class _Scaled:
    """What `adapter_scale` returns: the block ends without its factor."""

    def __init__(self, layers, factor):
        self._factor = factor
        self._scaled = [
            (layer, layer.adapter, layer.config, layer.config.scaled(factor))
            for layer in layers
        ]
        containers.set_configs(layers, [config for *_, config in self._scaled])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        configs = {}
        for layer, adapter, previous, scaled in self._scaled:
            # Adapters may have been removed or replaced inside the block.
            if getattr(layer, "adapter", None) is not adapter:
                continue
            # Another factor may have come inside the block, and stays.
            is_last = layer.config is scaled
            configs[layer] = (
                previous if is_last else layer.config.scaled(1 / self._factor)
            )
        containers.set_configs([*configs], [*configs.values()])


def _named_refusals(what, layer):
    """Says of which layer a refusal is, inside the block."""
    return attach.refusals_after(
        f"The adapter of layer '{layer.path}' cannot be {what}"
    )
