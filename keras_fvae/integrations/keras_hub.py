"""The methods of every KerasHub backbone."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from typing import Any
from typing import NoReturn

import keras

from keras_fvae.fvae_lora import enable_fvae_lora
from keras_fvae.model import containers
from keras_fvae.model import saving
from keras_fvae.model import training
from keras_fvae.model.enable import enable_adapter
from keras_fvae.model.lookup import adapted_layers
from keras_fvae.model.record import CONFIG_KEY

# Keras imports modules of KerasHub to find a class that a file names, and no
# others: so this one is known where KerasHub is extended, imported or not.
MODULE = "keras_hub.keras_fvae"
# The attribute of a replaced method that holds what it replaced.
ORIGINAL = "keras_fvae_original"


class AdaptedHubModel(containers.AdaptedModel):
    """A backbone or task with adapted layers inside it.

    KerasHub looks at the class that a preset names, so it must be the plain
    one, whose constructor takes the record.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> keras.Layer:
        return containers.base_class(cls).from_config(config, **kwargs)

    @classmethod
    def registration(cls, base: type) -> tuple[str, str, type]:
        return f"keras_fvae>{base.__name__}", MODULE, base

    def enable_lora(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"'{self.name}' is adapted already, and takes no LoRA of Keras's "
            "besides. Call `keras_fvae.remove_adapter` first."
        )

    def export_to_transformers(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"'{self.name}' has adapters, or biases that came of merging them, "
            "and KerasHub would write its base weights alone. To go to Hugging "
            "Face, save the adapters by `save_peft_adapter`, beside the base "
            "model."
        )


def extend_keras_hub() -> None:
    """Gives KerasHub's backbones their methods, and saves adapters.

    Called twice it does the same as called once.
    """
    from keras_hub.models import Backbone
    from keras_hub.models import DFineObjectDetector
    from keras_hub.models import Task

    Backbone.enable_fvae_lora = enable_fvae_lora
    Backbone.enable_adapter = enable_adapter
    Backbone.save_adapter = saving.save_adapter
    Backbone.load_adapter = saving.load_adapter
    custom_objects = keras.saving.get_custom_objects()
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    for cls in {*filter(inspect.isclass, custom_objects.values())}:
        if issubclass(cls, (Backbone, Task)):
            registered_name, *_ = AdaptedHubModel.registration(cls)
            custom_objects[registered_name] = cls
            setattr(module, cls.__name__, cls)
    _replace(DFineObjectDetector, "compute_loss", _with_losses_of_layers)
    for base in (Backbone, Task):
        containers.register_container(base, AdaptedHubModel)
        for cls in training.subclasses(base):
            if not issubclass(cls, containers.AdaptedContainer):
                _extend_constructor(cls)
        _extend_future_subclasses(base)


def _replace(cls, name, change):
    """Replaces a method of a class by what `change` makes of it.

    KerasHub, or this package, may be imported anew: what is changed is the
    method that was there at first.
    """
    method = inspect.getattr_static(cls, name)
    function = getattr(method, "__func__", method)
    original = getattr(function, ORIGINAL, function)
    changed = change(original)
    setattr(changed, ORIGINAL, original)
    is_of_class = isinstance(method, classmethod)
    setattr(cls, name, classmethod(changed) if is_of_class else changed)


def _extend_constructor(cls):
    """Lets the constructor of a class take the record of adapters."""
    if "__init__" in vars(cls):
        _replace(cls, "__init__", _restore_adapters_after)
    if "from_config" in vars(cls):
        _replace(cls, "from_config", _inside_record)


def _restore_adapters_after(init):
    """A constructor that takes what `AdaptedContainer.get_config` adds.

    The outermost one takes it: when that has ended, the model is whole. A
    model that is made around adapted layers has adapters as well.
    """

    @functools.wraps(init)
    def init_and_restore(self, *args, **kwargs):
        record = kwargs.pop(CONFIG_KEY, None)
        init(self, *args, **kwargs)
        training.known_models.add(self)
        if record is not None:
            containers.restore_adapters(self, record)
        elif type(self).__init__ is init_and_restore and adapted_layers(self):
            containers.make_container(self)

    # Keras reads from it whether a class can be cloned as functional models
    # are, and does not see through wrappers.
    init_and_restore.__signature__ = inspect.signature(
        init, follow_wrapped=False
    )
    return init_and_restore


def _inside_record(from_config):
    """A `from_config` that makes layers of the model before the model."""

    @functools.wraps(from_config)
    def from_config_with_record(cls, config, *args, **kwargs):
        inside = contextlib.nullcontext()
        if CONFIG_KEY in config:
            inside = containers.inside_record()
        with inside:
            return from_config(cls, config, *args, **kwargs)

    return from_config_with_record


def _extend_future_subclasses(base):
    """Extends the constructors of classes that will derive from one."""

    def extend_subclass(cls, **kwargs):
        super(base, cls).__init_subclass__(**kwargs)
        _extend_constructor(cls)

    base.__init_subclass__ = classmethod(extend_subclass)


def _with_losses_of_layers(compute_loss):
    """A `compute_loss` that has the layers' losses, which D-FINE's leaves out.

    Those are what a Keras model's loss has besides.
    """

    @functools.wraps(compute_loss)
    def compute_loss_with_losses(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) + sum(self.losses)

    return compute_loss_with_losses
