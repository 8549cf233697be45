"""Optimizers for the two factors of a low-rank update, A and B."""

from keras_fvae.optimizers.lora_rite import LoRARITE
from keras_fvae.optimizers.op_lora import OPLoRA
from keras_fvae.optimizers.riemannian import RiemannianPreconditioning

__all__ = ["LoRARITE", "OPLoRA", "RiemannianPreconditioning"]
