"""FVAE-LoRA for Keras 3: low-rank adaptation with a factorized latent space."""

import importlib

from keras_fvae import hub
from keras_fvae.adapt import enable_fvae_lora
from keras_fvae.config import FVAELoRAConfig
from keras_fvae.fvae import FVAE
from keras_fvae.groups import WorstGroupAccuracy
from keras_fvae.groups import evaluate_groups
from keras_fvae.imports import when_imported
from keras_fvae.interop import load_peft_adapter
from keras_fvae.interop import save_peft_adapter
from keras_fvae.layers import FVAELoRADense
from keras_fvae.layers import FVAELoRAEinsumDense
from keras_fvae.memory import memory_per_device
from keras_fvae.monitor import FVAELoRAMonitor
from keras_fvae.probing import latents
from keras_fvae.probing import probe_latents
from keras_fvae.saving import load_fvae_lora_weights
from keras_fvae.saving import save_fvae_lora_weights
from keras_fvae.schedule import FVAELoRASchedule
from keras_fvae.serving import finalize_fvae_lora
from keras_fvae.serving import fvae_lora_disabled
from keras_fvae.serving import merge_fvae_lora
from keras_fvae.sharding import fvae_lora_layout_map

when_imported("keras_hub", hub.extend_keras_hub)


def __getattr__(name):
    # Only when it is asked for, since it takes matplotlib.
    if name == "plots":
        return importlib.import_module("keras_fvae.plots")
    raise AttributeError(f"module 'keras_fvae' has no attribute '{name}'")


__all__ = [
    "FVAE",
    "FVAELoRAConfig",
    "FVAELoRADense",
    "FVAELoRAEinsumDense",
    "FVAELoRAMonitor",
    "FVAELoRASchedule",
    "WorstGroupAccuracy",
    "enable_fvae_lora",
    "evaluate_groups",
    "finalize_fvae_lora",
    "fvae_lora_disabled",
    "fvae_lora_layout_map",
    "latents",
    "load_fvae_lora_weights",
    "load_peft_adapter",
    "memory_per_device",
    "merge_fvae_lora",
    "probe_latents",
    "save_fvae_lora_weights",
    "save_peft_adapter",
]
