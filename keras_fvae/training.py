"""What trains in a model, and what its trainer keeps from before."""

import gc
import warnings

import keras
from keras import ops

from keras_fvae import keras_internals


def freeze_all_but(model, weights):
    """Makes the given weights of a model train, and no others."""
    kept_ids = {id(weight) for weight in weights}
    for layer in keras_internals.flatten_layers(model):
        layer.trainable = any(id(w) in kept_ids for w in layer.weights)
    for weight in model.weights:
        weight.trainable = id(weight) in kept_ids


def living_models_with(layers):
    """Every model that holds one of the layers, such as a backbone's task.

    Layers don't know what they are part of, so the models are looked for
    among all objects that there are.
    """
    layer_ids = {id(layer) for layer in layers}
    return [
        obj
        for obj in gc.get_objects()
        # Some may be half made, by a constructor that raised.
        if issubclass(type(obj), keras.Model)
        and hasattr(obj, "_layers")
        and any(
            id(layer) in layer_ids
            for layer in keras_internals.flatten_layers(obj)
        )
    ]


def forget_training(layers, keep_optimizer=True):
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
                f"Model '{model.name}' was trained before FVAE-LoRA changed "
                "which of its weights train. Call `compile()` again before "
                "`fit()`.",
                stacklevel=3,
            )


def forget_compiled_functions(
    model, kinds=("train", "test", "predict", "generate")
):
    """Makes a model compile its steps anew, for its layers as they are now."""
    for kind in kinds:
        if getattr(model, f"{kind}_function", None) is not None:
            setattr(model, f"{kind}_function", None)
