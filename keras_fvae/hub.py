"""FVAE-LoRA as methods of every KerasHub backbone."""

import functools
import inspect
import sys
import types

import keras

from keras_fvae import adapt
from keras_fvae import containers
from keras_fvae import layers
from keras_fvae import lookup
from keras_fvae import saving

CONFIG_KEY = "keras_fvae"
# Keras imports modules of KerasHub to find a class that a file names, and no
# others: so this one is known where KerasHub is extended, imported or not.
MODULE = "keras_hub.keras_fvae"
# The attribute of a replaced method that holds what it replaced.
ORIGINAL = "keras_fvae_original"


class AdaptedHubModel(containers.AdaptedModel):
    """A backbone or task with adapted layers inside it.

    KerasHub makes these from a flat config, by a class of its own. So the
    adapters are one more entry of the config, and the name that the class is
    saved by is known only where this package is.
    """

    def get_config(self):
        return {
            **super(containers.AdaptedContainer, self).get_config(),
            CONFIG_KEY: containers.describe_adapters(self),
        }

    @classmethod
    def from_config(cls, config, **kwargs):
        base = super(containers.AdaptedContainer, cls)
        return base.from_config(config, **kwargs)

    @classmethod
    def registration(cls, base):
        return f"keras_fvae>{base.__name__}", MODULE, base


def extend_keras_hub():
    """Gives KerasHub's backbones the FVAE-LoRA methods, and saves adapters.

    Called twice it does the same as called once.
    """
    from keras_hub.models import Backbone
    from keras_hub.models import DFineObjectDetector
    from keras_hub.models import Task

    Backbone.enable_fvae_lora = adapt.enable_fvae_lora
    Backbone.save_fvae_lora_weights = saving.save_fvae_lora_weights
    Backbone.load_fvae_lora_weights = saving.load_fvae_lora_weights
    custom_objects = keras.saving.get_custom_objects()
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    for cls in {*filter(inspect.isclass, custom_objects.values())}:
        if issubclass(cls, (Backbone, Task)):
            registered_name, *_ = AdaptedHubModel.registration(cls)
            custom_objects[registered_name] = cls
            setattr(module, cls.__name__, cls)
    _replace(DFineObjectDetector, "compute_loss", _with_losses_of_layers)
    for cls in (Backbone, Task):
        containers.register_container(cls, AdaptedHubModel)
        _replace(cls, "__init__", _restore_adapters_after)
        _replace(cls, "_compute_loss", _in_training)
    # A task is not a container where its backbone alone is adapted.
    _replace(Task, "get_config", _with_adapters)
    _replace(Task, "rematerialized_call", _unless_adapted)
    for name, function in (
        ("fit", containers.refuse_training_if_finalized),
        ("train_on_batch", containers.refuse_training_if_finalized),
        ("_check_quantize_args", containers.refuse_quantization),
        ("make_train_function", containers.join_distribution),
        ("make_test_function", containers.join_distribution),
        ("make_predict_function", containers.join_distribution),
    ):
        _replace(Task, name, functools.partial(_preceded_by, function))
    if keras.config.backend() == "tensorflow":
        _replace(
            Task,
            "_maybe_symbolic_build",
            functools.partial(_preceded_by, containers.make_state, told=True),
        )


def _replace(cls, name, change):
    """Replaces a method of a class by what `change` makes of it.

    KerasHub, or this package, may be imported anew: what is changed is the
    method that was there at first.
    """
    method = getattr(cls, name)
    original = getattr(method, ORIGINAL, method)
    changed = change(original)
    setattr(changed, ORIGINAL, original)
    setattr(cls, name, changed)


def _with_adapters(get_config):
    """A `get_config` that says what is adapted, if anything is."""

    @functools.wraps(get_config)
    def get_config_with_adapters(self):
        config = get_config(self)
        if lookup.adapted_layers(self):
            config[CONFIG_KEY] = containers.describe_adapters(self)
        return config

    return get_config_with_adapters


def _in_training(compute_loss):
    """A `_compute_loss` in which adapted layers know whether they train.

    Keras calls it in every step and always says whether it trains; it calls
    `compute_loss`, which may not be told. SigLIP's and PARSeq's call the model
    once more, without a word of it.
    """

    @functools.wraps(compute_loss)
    def compute_loss_in_training(self, *args, training=True, **kwargs):
        with layers.training_step(training):
            return compute_loss(self, *args, training=training, **kwargs)

    return compute_loss_in_training


def _with_losses_of_layers(compute_loss):
    """A `compute_loss` that has the layers' losses, which D-FINE's leaves out.

    Those are what a Keras model's loss has besides.
    """

    @functools.wraps(compute_loss)
    def compute_loss_with_losses(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) + sum(self.losses)

    return compute_loss_with_losses


def _unless_adapted(rematerialized_call):
    """A `rematerialized_call` that does nothing if anything is adapted."""

    @functools.wraps(rematerialized_call)
    def rematerialized_call_unless_adapted(self, layer_call, *args, **kwargs):
        if lookup.adapted_layers(self):
            return layer_call
        return rematerialized_call(self, layer_call, *args, **kwargs)

    return rematerialized_call_unless_adapted


def _restore_adapters_after(init):
    """A constructor that takes what `AdaptedHubModel.get_config` adds."""

    @functools.wraps(init)
    def init_and_restore(self, *args, **kwargs):
        record = kwargs.pop(CONFIG_KEY, None)
        init(self, *args, **kwargs)
        if record is not None:
            containers.restore_adapters(self, record)

    return init_and_restore


def _preceded_by(function, method, told=False):
    """A method that calls `function` on its object first.

    Args:
        function: Function of the object, and if `told`, of what the method is
            called with.
        method: Function.
        told: Boolean.
    """

    @functools.wraps(method)
    def call_both(self, *args, **kwargs):
        if told:
            function(self, *args, **kwargs)
        else:
            function(self)
        return method(self, *args, **kwargs)

    return call_both
