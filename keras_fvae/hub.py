"""FVAE-LoRA as methods of every KerasHub backbone."""

import functools
import inspect

import keras

from keras_fvae import adapt
from keras_fvae import containers
from keras_fvae import lookup
from keras_fvae import saving

CONFIG_KEY = "keras_fvae"


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
        return f"keras_fvae>{base.__name__}", base


def extend_keras_hub():
    """Gives KerasHub's backbones the FVAE-LoRA methods, and saves adapters.

    Does nothing without KerasHub, which this package does not need.
    """
    try:
        from keras_hub.models import Backbone
        from keras_hub.models import Task
    except ImportError:
        return
    Backbone.enable_fvae_lora = adapt.enable_fvae_lora
    Backbone.save_fvae_lora_weights = saving.save_fvae_lora_weights
    Backbone.load_fvae_lora_weights = saving.load_fvae_lora_weights
    custom_objects = keras.saving.get_custom_objects()
    for cls in [*custom_objects.values()]:
        if inspect.isclass(cls) and issubclass(cls, (Backbone, Task)):
            registered_name, _ = AdaptedHubModel.registration(cls)
            custom_objects[registered_name] = cls
    for cls in (Backbone, Task):
        containers.register_container(cls, AdaptedHubModel)
        cls.__init__ = _restore_adapters_after(cls.__init__)
    # A task is not a container where its backbone alone is adapted.
    Task.get_config = _with_adapters(Task.get_config)
    refuse_training = containers.refuse_training_if_finalized
    Task.fit = _check_before(Task.fit, refuse_training)
    Task.train_on_batch = _check_before(Task.train_on_batch, refuse_training)
    Task._check_quantize_args = _check_before(
        Task._check_quantize_args, containers.refuse_quantization
    )


def _with_adapters(get_config):
    """A `get_config` that says what is adapted, if anything is."""

    @functools.wraps(get_config)
    def get_config_with_adapters(self):
        config = get_config(self)
        if lookup.adapted_layers(self):
            config[CONFIG_KEY] = containers.describe_adapters(self)
        return config

    return get_config_with_adapters


def _restore_adapters_after(init):
    """A constructor that takes what `AdaptedHubModel.get_config` adds."""

    @functools.wraps(init)
    def init_and_restore(self, *args, **kwargs):
        record = kwargs.pop(CONFIG_KEY, None)
        init(self, *args, **kwargs)
        if record is not None:
            containers.restore_adapters(self, record)

    return init_and_restore


def _check_before(method, check):
    """A method that calls `check` on its object first."""

    @functools.wraps(method)
    def check_and_call(self, *args, **kwargs):
        check(self)
        return method(self, *args, **kwargs)

    return check_and_call
