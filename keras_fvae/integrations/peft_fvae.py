"""FVAE-LoRA as the authors' PyTorch code has it, a fork of PEFT."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_fvae.backend import replicas
from keras_fvae.integrations.peft_files import CONFIG_FILE
from keras_fvae.integrations.peft_files import WEIGHTS_FILE
from keras_fvae.integrations.peft_lora import LoadedAdapter
from keras_fvae.integrations.peft_lora import rounded
from keras_fvae.layers.attach import adapter_shapes
from keras_fvae.methods.ada_lora import RANK_OFFSET
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.layout import reference_views

# What changes the predictions of theirs, and has no counterpart here.
REQUIRED_SETTINGS: dict[str, Any] = {
    "peft_type": "FVAEPEFT",
    "encoder_nn_type": "mlp",
    "decoder_nn_type": "mlp",
    "force_classical_ae": False,
    "force_classical_vae": False,
    "force_minhyp": False,
    "force_test_vae": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# What changes only how theirs is trained, and has no counterpart here.
TRAINING_SETTINGS: dict[str, Any] = {
    "lora_dropout": 0.0,
    "enc_l2_reg": 0,
    "dec_l2_reg": 0,
    "z1z2_orthogonal_reg": 0,
}


class FVAEReader:
    """Reads the adapters that the authors' code saved.

    Args:
        settings: Dict, the content of `adapter_config.json`.
        tensors: Dict of name to array, all that the file has.

    Raises:
        ValueError: If a setting is missing, or has no counterpart here.
    """

    def __init__(
        self, settings: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> None:
        _check_sizes(settings, tensors)
        self.config: FVAELoRAConfig = config_from_peft(settings)

    def read(
        self,
        module: str,
        tensors: dict[str, np.ndarray],
        layers: tuple[keras.Layer, ...],
    ) -> list[LoadedAdapter]:
        """The adapters of the layers that a module stands for.

        Args:
            module: String, the name of the module, for messages.
            tensors: Dict of name to array, those of the module.
            layers: Tuple of layers.

        Returns:
            List of `LoadedAdapter`.

        Raises:
            ValueError: If the tensors are not the layers'.
        """
        if len(layers) > 1:
            raise ValueError(
                f"The module '{module}' stands for {len(layers)} layers here, "
                "each of which would have an FVAE of its own."
            )
        # Their forward pass does not use that one.
        tensors = {n: a for n, a in tensors.items() if n != "lora_E"}
        _check_shapes(self.config, layers[0], tensors, module)
        set_weights = functools.partial(_set_arrays, arrays=tensors)
        return [LoadedAdapter(layers[0], self.config, False, set_weights)]


def write(
    modules: Mapping[str, tuple[keras.Layer, ...]],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of adapters, as the authors' code reads them.

    Args:
        modules: Dict of the name of a module to a tuple of the layers that it
            stands for.

    Returns:
        Dict of settings, and dict of name to array.

    Raises:
        ValueError: If a module stands for several layers, is finalized, or its
            settings have no counterpart there.
    """
    tensors, configs = {}, []
    for module, layers in modules.items():
        if len(layers) > 1:
            raise ValueError(
                f"In Hugging Face's model '{module}' is one module for "
                f"{len(layers)} layers here, and so has no room for an FVAE of "
                "each."
            )
        adapter = layers[0].adapter
        adapter.refuse_if_finalized()
        configs.append(adapter.config)
        for name, array in _get_arrays(adapter).items():
            tensors[f"{module}.{name}"] = array
    return config_to_peft(configs), tensors


def config_from_peft(settings: dict[str, Any]) -> FVAELoRAConfig:
    """The `FVAELoRAConfig` for settings of the authors' code.

    Args:
        settings: Dict, the content of `adapter_config.json`.

    Raises:
        ValueError: If a setting is missing, or has no counterpart here.
    """
    for name, value in REQUIRED_SETTINGS.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"`{CONFIG_FILE}` says {name}={settings[name]!r}. Only "
                f"{name}={value!r} can be loaded."
            )
    ignored = {
        name: settings[name]
        for name, value in TRAINING_SETTINGS.items()
        if settings.get(name, value) != value
    }
    try:
        rank, prior_std = settings["latent_dim"], settings["z2_latent_std"]
        dropout = settings["enc_dropout"]
        if settings["dec_dropout"] != dropout:
            ignored["dec_dropout"] = settings["dec_dropout"]
        config = FVAELoRAConfig(
            rank=rank,
            alpha=settings["lora_alpha"] * rank / (rank + RANK_OFFSET),
            encoder_units=(settings["enc_hidden_layer"],)
            * settings["enc_num_of_layer"],
            encoder_shared_trunk=settings["encoder_use_common_hidden_layer"],
            decoder_units=(settings["dec_hidden_layer"],)
            * settings["dec_num_of_layer"],
            dropout=dropout,
            latent_fusion=settings["latent_fusion"],
            prior_mean=settings["z2_latent_mean"],
            prior_std=prior_std,
            reconstruction_weight=settings["lambda_reconstruction"],
            kl_weight=settings["lambda_kl_z1"],
            # Theirs weigh means over the latent, with no half.
            gamma_weight=(
                2 * settings["lambda_z1_l2"] / rank,
                2 * settings["lambda_z2_l2"] * prior_std**2 / rank,
            ),
            gamma_estimator="monte_carlo",
            elbo_weight=1 / settings["lambda_downstream"],
            num_samples=settings["num_of_z_sampled"],
        )
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"`{CONFIG_FILE}` is not one of FVAE-LoRA: {error!r}."
        ) from error
    if ignored:
        warnings.warn(
            f"`{CONFIG_FILE}` has settings that keras_fvae has not, and which "
            f"count in training alone: {ignored}.",
            stacklevel=3,
        )
    return config


def config_to_peft(configs: Sequence[FVAELoRAConfig]) -> dict[str, Any]:
    """The settings of the authors' code for the configs of adapted layers.

    Args:
        configs: List of `FVAELoRAConfig`, one for each adapted layer.

    Returns:
        Dict, the content of `adapter_config.json` but for the modules' names.

    Raises:
        ValueError: If the configs differ, or have no counterpart there.
    """
    config = configs[0]
    for other in configs:
        if dataclasses.replace(other, seed=config.seed) != config:
            raise ValueError(
                "The adapted layers have different settings, and the file has "
                f"room for one: {config} and {other}."
            )
    for name, allowed in (
        ("objective", ("fvae",)),
        ("sample_at_inference", (False,)),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"The authors' code has no {name}={getattr(config, name)!r}."
            )
    if config.elbo_weight == 0:
        raise ValueError("The authors' code has no elbo_weight=0.")
    rank = config.rank
    return {
        **REQUIRED_SETTINGS,
        **TRAINING_SETTINGS,
        "base_model_name_or_path": "",
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
        "r": rank,
        "latent_dim": rank,
        "lora_alpha": rounded(config.scale * (rank + RANK_OFFSET)),
        **_uniform("enc", "encoder_units", config.hidden_units, rank),
        **_uniform("dec", "decoder_units", config.decoder_units, rank),
        "encoder_use_common_hidden_layer": config.encoder_shared_trunk,
        "enc_dropout": config.dropout,
        "dec_dropout": config.dropout,
        "latent_fusion": config.latent_fusion,
        "z2_latent_mean": rounded(config.prior_mean),
        "z2_latent_std": rounded(config.prior_std),
        "lambda_reconstruction": rounded(config.reconstruction_weight),
        "lambda_kl_z1": rounded(config.kl_weight),
        "lambda_z1_l2": rounded(config.gamma_weights[0] * rank / 2),
        "lambda_z2_l2": rounded(
            config.gamma_weights[1] * rank / 2 / config.prior_std**2
        ),
        "lambda_downstream": rounded(1 / config.elbo_weight),
        "num_of_z_sampled": config.num_samples,
        "scalar_decoder_std": True,
    }


def _uniform(prefix, name, units, rank):
    """The width and number of hidden layers, all of one width there."""
    if len(set(units)) > 1:
        raise ValueError(
            "In the authors' code all hidden layers are of one width. "
            f"Received: {name}={units}."
        )
    return {
        f"{prefix}_hidden_layer": units[0] if units else rank,
        f"{prefix}_num_of_layer": len(units),
    }


def _check_sizes(settings, tensors):
    """Raises a `ValueError` if settings call for more than a file can have.

    Before anything is made as large as they say.
    """
    largest = max(max(a.shape, default=1) for a in tensors.values())
    limits = {
        "latent_dim": largest,
        "enc_hidden_layer": largest,
        "dec_hidden_layer": largest,
        "enc_num_of_layer": len(tensors),
        "dec_num_of_layer": len(tensors),
    }
    for name, limit in limits.items():
        value = settings.get(name, 0)
        if isinstance(value, (int, float)) and not value <= limit:
            raise ValueError(
                f"`{CONFIG_FILE}` says {name}={value}, which is more than "
                f"`{WEIGHTS_FILE}` has room for."
            )


def _check_shapes(config, layer, arrays, module):
    """Raises a `ValueError` if the tensors of a module are not a layer's."""
    shapes = adapter_shapes(layer, config)
    rank, units = shapes.pop("kernel_b")
    # Of no size in memory, whatever their shapes are.
    nothing = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    views = reference_views(config, nothing)
    expected = {
        "lora_B": (units, rank),
        **{f"lora_A.{name}": view.shape for name, view in views.items()},
    }
    for name in arrays:
        if name not in expected:
            raise ValueError(
                f"Unknown weight: '{module}.{name}'. By its settings a module "
                f"has these: {list(expected)}."
            )
    for name, shape in expected.items():
        if name not in arrays or arrays[name].shape != shape:
            problem = "" if name in arrays else "Missing weight: "
            received = getattr(arrays.get(name), "shape", "none")
            raise ValueError(
                f"{problem}'{module}.{name}' must have shape {shape} for this "
                f"model. Received: {received}."
            )


def _set_arrays(adapter, arrays):
    """Sets an adapter's weights from a module's tensors."""
    adapter.fvae.set_reference_weights(
        {
            name.removeprefix("lora_A."): array
            for name, array in arrays.items()
            if name.startswith("lora_A.")
        }
    )
    adapter.kernel_b.assign(arrays["lora_B"].T)


def _get_arrays(adapter):
    """A module's tensors, from an adapter's weights."""
    reference_weights = adapter.fvae.get_reference_weights()
    return {
        **{f"lora_A.{name}": a for name, a in reference_weights.items()},
        "lora_B": replicas.to_numpy(adapter.kernel_b).T,
        "lora_E": np.zeros((adapter.config.rank, 1), "float32"),
    }
