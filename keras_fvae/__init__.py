"""Low-rank adapters for Keras 3: FVAE-LoRA and the family around it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from keras_fvae import optimizers
from keras_fvae.analysis.groups import WorstGroupAccuracy
from keras_fvae.analysis.groups import evaluate_groups
from keras_fvae.analysis.memory import memory_per_device
from keras_fvae.analysis.probes import latents
from keras_fvae.analysis.probes import probe_latents
from keras_fvae.callbacks.ada_lora import AdaLoRAAllocator
from keras_fvae.callbacks.beam_lora import BeamLoRAPruner
from keras_fvae.callbacks.checkpoint import AdapterCheckpoint
from keras_fvae.callbacks.flat_lora import FlatLoRASchedule
from keras_fvae.callbacks.monitor import FVAELoRAMonitor
from keras_fvae.callbacks.schedule import FVAELoRASchedule
from keras_fvae.callbacks.sr_lora import SRLoRARestarter
from keras_fvae.fvae_lora import enable_fvae_lora
from keras_fvae.integrations import keras_hub
from keras_fvae.integrations.hub import download_adapter
from keras_fvae.integrations.hub import upload_adapter
from keras_fvae.integrations.imports import when_imported
from keras_fvae.integrations.peft import load_peft_adapter
from keras_fvae.integrations.peft import save_peft_adapter
from keras_fvae.layers.adapted import AdaptedConv1D
from keras_fvae.layers.adapted import AdaptedConv2D
from keras_fvae.layers.adapted import AdaptedConv3D
from keras_fvae.layers.adapted import AdaptedDense
from keras_fvae.layers.adapted import AdaptedEinsumDense
from keras_fvae.layers.sharding import adapter_layout_map
from keras_fvae.methods.ada_lora import AdaLoRAConfig
from keras_fvae.methods.beam_lora import BeamLoRAConfig
from keras_fvae.methods.dora import DoRAConfig
from keras_fvae.methods.drop_lora import DropLoRAConfig
from keras_fvae.methods.flat_lora import FlatLoRAConfig
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.fvae import FVAE
from keras_fvae.methods.fvae.layers import FVAELoRADense
from keras_fvae.methods.fvae.layers import FVAELoRAEinsumDense
from keras_fvae.methods.hira import HiRAConfig
from keras_fvae.methods.lora import FFALoRAConfig
from keras_fvae.methods.lora import LoRAConfig
from keras_fvae.methods.lora import RSLoRAConfig
from keras_fvae.methods.moe_lora import MoELoRAConfig
from keras_fvae.methods.op_lora import OPLoRAConfig
from keras_fvae.methods.pissa import OLoRAConfig
from keras_fvae.methods.pissa import PiSSAConfig
from keras_fvae.methods.sr_lora import SRLoRAConfig
from keras_fvae.model.enable import enable_adapter
from keras_fvae.model.inference import adapter_disabled
from keras_fvae.model.inference import adapter_scale
from keras_fvae.model.inference import finalize_adapter
from keras_fvae.model.inference import merge_adapter
from keras_fvae.model.inference import remove_adapter
from keras_fvae.model.sampling import adapter_sampling
from keras_fvae.model.sampling import predict_samples
from keras_fvae.model.saving import get_adapter
from keras_fvae.model.saving import load_adapter
from keras_fvae.model.saving import save_adapter
from keras_fvae.model.saving import set_adapter
from keras_fvae.model.state import AdapterState
from keras_fvae.model.state import read_adapter
from keras_fvae.model.summary import adapter_summary

# The one place that says which version this is; `pyproject.toml` reads it.
__version__ = "0.2.0"

when_imported("keras_hub", keras_hub.extend_keras_hub)


# To a type checker, a module with this function would have all names.
if TYPE_CHECKING:
    from keras_fvae.analysis import plots as plots
else:

    def __getattr__(name):
        # Only when it is asked for, since it takes matplotlib.
        if name == "plots":
            return importlib.import_module("keras_fvae.analysis.plots")
        raise AttributeError(f"module 'keras_fvae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "plots"])


__all__ = [
    "FVAE",
    "AdaLoRAAllocator",
    "AdaLoRAConfig",
    "AdaptedConv1D",
    "AdaptedConv2D",
    "AdaptedConv3D",
    "AdaptedDense",
    "AdaptedEinsumDense",
    "AdapterCheckpoint",
    "AdapterState",
    "BeamLoRAConfig",
    "BeamLoRAPruner",
    "DoRAConfig",
    "DropLoRAConfig",
    "FFALoRAConfig",
    "FVAELoRAConfig",
    "FVAELoRADense",
    "FVAELoRAEinsumDense",
    "FVAELoRAMonitor",
    "FVAELoRASchedule",
    "FlatLoRAConfig",
    "FlatLoRASchedule",
    "HiRAConfig",
    "LoRAConfig",
    "MoELoRAConfig",
    "OLoRAConfig",
    "OPLoRAConfig",
    "PiSSAConfig",
    "RSLoRAConfig",
    "SRLoRAConfig",
    "SRLoRARestarter",
    "WorstGroupAccuracy",
    "adapter_disabled",
    "adapter_layout_map",
    "adapter_sampling",
    "adapter_scale",
    "adapter_summary",
    "download_adapter",
    "enable_adapter",
    "enable_fvae_lora",
    "evaluate_groups",
    "finalize_adapter",
    "get_adapter",
    "latents",
    "load_adapter",
    "load_peft_adapter",
    "memory_per_device",
    "merge_adapter",
    "optimizers",
    "predict_samples",
    "probe_latents",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "save_peft_adapter",
    "set_adapter",
    "upload_adapter",
]
