"""FVAE-LoRA for Keras 3: low-rank adaptation with a factorized latent space."""

import importlib

from keras_fvae.analysis.groups import WorstGroupAccuracy
from keras_fvae.analysis.groups import evaluate_groups
from keras_fvae.analysis.memory import memory_per_device
from keras_fvae.analysis.probes import latents
from keras_fvae.analysis.probes import probe_latents
from keras_fvae.callbacks.monitor import FVAELoRAMonitor
from keras_fvae.callbacks.schedule import FVAELoRASchedule
from keras_fvae.integrations import keras_hub
from keras_fvae.integrations.imports import when_imported
from keras_fvae.integrations.peft import load_peft_adapter
from keras_fvae.integrations.peft import save_peft_adapter
from keras_fvae.layers.adapted import FVAELoRADense
from keras_fvae.layers.adapted import FVAELoRAEinsumDense
from keras_fvae.layers.sharding import fvae_lora_layout_map
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.fvae import FVAE
from keras_fvae.model.enable import enable_fvae_lora
from keras_fvae.model.inference import finalize_fvae_lora
from keras_fvae.model.inference import fvae_lora_disabled
from keras_fvae.model.inference import merge_fvae_lora
from keras_fvae.model.saving import load_fvae_lora_weights
from keras_fvae.model.saving import save_fvae_lora_weights

when_imported("keras_hub", keras_hub.extend_keras_hub)


def __getattr__(name):
    # Only when it is asked for, since it takes matplotlib.
    if name == "plots":
        return importlib.import_module("keras_fvae.analysis.plots")
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
