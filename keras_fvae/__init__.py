"""FVAE-LoRA for Keras 3: low-rank adaptation with a factorized latent space."""

from keras_fvae import hub
from keras_fvae.adapt import enable_fvae_lora
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.fvae import FVAE
from keras_fvae.layers import FVAELoRADense
from keras_fvae.layers import FVAELoRAEinsumDense
from keras_fvae.saving import load_fvae_lora_weights
from keras_fvae.saving import save_fvae_lora_weights

hub.add_backbone_methods()

__all__ = [
    "FVAE",
    "FVAELoRAConfig",
    "FVAELoRADense",
    "FVAELoRAEinsumDense",
    "enable_fvae_lora",
    "load_fvae_lora_weights",
    "save_fvae_lora_weights",
]
