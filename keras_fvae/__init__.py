"""FVAE-LoRA for Keras 3: low-rank adaptation with a factorized latent space."""

from keras_fvae import hub
from keras_fvae.adapt import enable_fvae_lora
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.fvae import FVAE
from keras_fvae.interop import load_peft_adapter
from keras_fvae.interop import save_peft_adapter
from keras_fvae.layers import FVAELoRADense
from keras_fvae.layers import FVAELoRAEinsumDense
from keras_fvae.saving import load_fvae_lora_weights
from keras_fvae.saving import save_fvae_lora_weights
from keras_fvae.serving import finalize_fvae_lora
from keras_fvae.serving import fvae_lora_disabled
from keras_fvae.serving import merge_fvae_lora

hub.extend_keras_hub()

__all__ = [
    "FVAE",
    "FVAELoRAConfig",
    "FVAELoRADense",
    "FVAELoRAEinsumDense",
    "enable_fvae_lora",
    "finalize_fvae_lora",
    "fvae_lora_disabled",
    "load_fvae_lora_weights",
    "load_peft_adapter",
    "merge_fvae_lora",
    "save_fvae_lora_weights",
    "save_peft_adapter",
]
