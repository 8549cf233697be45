"""FVAE-LoRA as methods of every KerasHub backbone."""

from keras_fvae import adapt
from keras_fvae import saving


def add_backbone_methods():
    """Gives `keras_hub.models.Backbone` its FVAE-LoRA methods.

    Does nothing without KerasHub, which this package does not need.
    """
    try:
        from keras_hub.models import Backbone
    except ImportError:
        return
    Backbone.enable_fvae_lora = adapt.enable_fvae_lora
    Backbone.save_fvae_lora_weights = saving.save_fvae_lora_weights
    Backbone.load_fvae_lora_weights = saving.load_fvae_lora_weights
