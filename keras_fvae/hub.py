"""FVAE-LoRA as methods of every KerasHub backbone."""

from keras_fvae import adapt


def add_backbone_methods():
    """Gives `keras_hub.models.Backbone` its FVAE-LoRA methods.

    Does nothing without KerasHub, which this package does not need.
    """
    try:
        from keras_hub.models import Backbone
    except ImportError:
        return
    Backbone.enable_fvae_lora = adapt.enable_fvae_lora
