"""From training to use: finalize, merge, or do without the adapters."""

from keras_fvae.layers import adapted as adapted
from keras_fvae.layers import switching
from keras_fvae.model import containers
from keras_fvae.model import lookup
from keras_fvae.model import training


def finalize_fvae_lora(model):
    """Drops what inference does not need: q2, the decoder, the variance of q1.

    The model predicts what it did. It cannot be trained any more.

    Args:
        model: `keras.Model` or layer with layers adapted by FVAE-LoRA,
            changed in place.

    Raises:
        ValueError: If no layer is adapted, or the adapters sample at
            inference, which needs the variance of q1. The model is then as it
            was.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> keras_fvae.finalize_fvae_lora(model)
    >>> [weight.name for weight in model.layers[0].adapter.weights]
    ['kernel_b', 'feature_weights', 'latent_weights']

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3: only the mean of q1 is used
    at inference.
    """
    layers = lookup.require_adapted_layers(model)
    _refuse_sampling(layers)
    training.refuse_while_running(layers)
    adapters = []
    for layer in layers:
        adapter = adapted.build_adapter(layer, layer.config, finalized=True)
        adapter.set_arrays(layer.adapter.get_arrays(finalized=True))
        adapter.trainable = False
        adapters.append(adapter)
    containers.replace_adapters(layers, adapters)
    training.forget_training(layers, keep_optimizer=False)


def merge_fvae_lora(model):
    """Folds the updates of linear encoders into the kernels.

    The layers are plain Keras layers again, and cost what they did before
    they were adapted. A layer without a bias gets one, for the offset of the
    update. All base weights stay frozen.

    Args:
        model: `keras.Model` or layer with layers adapted by FVAE-LoRA with
            `encoder_units=()`, changed in place.

    Raises:
        ValueError: If no layer is adapted, an encoder has hidden layers, the
            adapters sample at inference, or a layer is quantized. The model
            is then as it was.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2, encoder_units=())
    >>> keras_fvae.merge_fvae_lora(model)
    >>> hasattr(model.layers[0], "adapter")
    False

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """
    layers = lookup.require_adapted_layers(model)
    _refuse_sampling(layers)
    training.refuse_while_running(layers)
    for layer in layers:
        if layer.config.hidden_units:
            raise ValueError(
                f"The encoders of layer '{layer.path}' have hidden layers "
                f"(encoder_units={layer.config.hidden_units}), so its update "
                "is no linear function of the input and cannot be folded into "
                "the kernel. Call `finalize_fvae_lora` instead, or train with "
                "`encoder_units=()`."
            )
        if layer.quantization_mode is not None:
            raise ValueError(
                f"The kernel of layer '{layer.path}' is quantized "
                f"('{layer.quantization_mode}'): nothing can be added to it. "
                "Call `finalize_fvae_lora` instead."
            )
    updates = [adapted.linear_update(layer.adapter) for layer in layers]
    containers.merge_adapters(model, layers, updates)
    training.forget_training(layers, keep_optimizer=False)


def fvae_lora_disabled(model):
    """Makes a model predict like the base model, inside a `with` block.

    For the thread that enters the block, and in any model that the layers are
    in. Blocks may be nested, and overlap. Steps are compiled once for each
    set of adapters that is off, and kept. What trains inside the block does so
    without the adapters, which stay as they are.

    Args:
        model: `keras.Model` or layer with layers adapted by FVAE-LoRA.

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
    >>> with keras_fvae.fvae_lora_disabled(model):
    ...     predictions = model.predict(np.ones((1, 4)), verbose=0)
    """
    return switching.switched_off(lookup.require_adapted_layers(model))


def _refuse_sampling(layers):
    for layer in layers:
        if layer.config.sample_at_inference:
            raise ValueError(
                f"Layer '{layer.path}' samples at inference "
                "(sample_at_inference=True), which needs its variance and "
                "would not be kept. Set it up without."
            )
