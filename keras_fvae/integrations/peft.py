"""Adapters in the format of the authors' PyTorch code, a fork of PEFT."""

import dataclasses
import json
import re
import warnings
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.layers.attach import adapter_shapes
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.layout import reference_views
from keras_fvae.model import lookup
from keras_fvae.model import training
from keras_fvae.model.enable import refuse_if_adapted
from keras_fvae.model.enable import summarize
from keras_fvae.model.files import check_local
from keras_fvae.model.files import read_json
from keras_fvae.model.files import replaced_when_complete
from keras_fvae.model.install import install
from keras_fvae.model.tree import LayerTree

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ROOT = "base_model.model."
# The dtypes of PyTorch in which adapters are saved, as safetensors has them.
FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": ml_dtypes.bfloat16,
}
# Beside the rank, in the scale of the update, there and not here.
RANK_OFFSET = 1e-5

# What changes the predictions of theirs, and has no counterpart here.
REQUIRED_SETTINGS = {
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
TRAINING_SETTINGS = {
    "lora_dropout": 0.0,
    "enc_l2_reg": 0,
    "dec_l2_reg": 0,
    "z1z2_orthogonal_reg": 0,
}


class Architecture(NamedTuple):
    """What KerasHub and Hugging Face call the layers of one architecture.

    Args:
        root: String, what Hugging Face puts before the names in a task.
        hub_block: String, the path of a block in KerasHub, `{}` its number.
        first_number: Integer, the number of KerasHub's first block.
        block: String, the name of a block in Hugging Face.
        layers: Dict of path in KerasHub's block to name in Hugging Face's.
        heads: Dict of name of a head's layer in Hugging Face to its name in
            the KerasHub task.
    """

    root: str
    hub_block: str
    first_number: int
    block: str
    layers: dict
    heads: dict

    def module_name(self, path):
        """The name in Hugging Face of the layer of a path, or `None`."""
        pattern = re.escape(self.hub_block).replace(r"\{\}", r"(\d+)") + "(.+)"
        match = re.fullmatch(pattern, path)
        if match is None or match[2] not in self.layers:
            return None
        block = self.block.format(int(match[1]) - self.first_number)
        return block + self.layers[match[2]]


def _attention(path, names, output):
    """The four projections of an attention layer."""
    hub_names = ("query", "key", "value")
    layers = {f"{path}/{hub}": name for hub, name in zip(hub_names, names)}
    return {**layers, f"{path}/attention_output": output}


_BERT = Architecture(
    root="bert.",
    hub_block="transformer_layer_{}/",
    first_number=0,
    block="encoder.layer.{}.",
    layers={
        **_attention(
            "self_attention_layer",
            [f"attention.self.{name}" for name in ("query", "key", "value")],
            "attention.output.dense",
        ),
        "feedforward_intermediate_dense": "intermediate.dense",
        "feedforward_output_dense": "output.dense",
    },
    heads={"classifier": "logits"},
)
_ROBERTA = _BERT._replace(
    root="roberta.",
    heads={"classifier.dense": "pooled_dense", "classifier.out_proj": "logits"},
)
_VIT = Architecture(
    root="vit.",
    hub_block="vit_encoder/transformer_block_{}/",
    first_number=1,
    block="encoder.layer.{}.",
    layers={
        **_attention(
            "mha",
            [f"attention.attention.{n}" for n in ("query", "key", "value")],
            "attention.output.dense",
        ),
        "mlp/dense_1": "intermediate.dense",
        "mlp/dense_2": "output.dense",
    },
    heads={"classifier": "predictions"},
)
_PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkv"]
_LLAMA = Architecture(
    root="model.",
    hub_block="transformer_layer_{}/",
    first_number=0,
    block="layers.{}.",
    layers={
        **_attention("self_attention", _PROJECTIONS, "self_attn.o_proj"),
        "feedforward_gate_dense": "mlp.gate_proj",
        "feedforward_intermediate_dense": "mlp.up_proj",
        "feedforward_output_dense": "mlp.down_proj",
    },
    heads={},
)
_GEMMA = _LLAMA._replace(
    hub_block="decoder_block_{}/",
    layers={
        **_attention("attention", _PROJECTIONS, "self_attn.o_proj"),
        "ffw_gating": "mlp.gate_proj",
        "ffw_gating_2": "mlp.up_proj",
        "ffw_linear": "mlp.down_proj",
    },
)
# By the name of KerasHub's backbone, whose subclasses count as well.
ARCHITECTURES = {
    "BertBackbone": _BERT,
    "GemmaBackbone": _GEMMA,
    "LlamaBackbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "QwenBackbone": _LLAMA,
    "RobertaBackbone": _ROBERTA,
    "ViTBackbone": _VIT,
    "XLMRobertaBackbone": _ROBERTA,
}


def load_peft_adapter(model, directory):
    """Adapts a KerasHub model by an adapter that the authors' code saved.

    Args:
        model: KerasHub task or backbone, not adapted yet. A trained head in
            the files goes into the head of the task.
        directory: String or path of the folder with `adapter_config.json` and
            `adapter_model.safetensors`.

    Returns:
        An `AdapterSummary`, as `keras_fvae.enable_fvae_lora`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the architecture is unknown, a file is damaged or of
            another method, or does not fit the model, which is then as it
            was.

    Example:

    ```python
    model = keras_hub.models.ViTImageClassifier.from_preset("hf://...")
    keras_fvae.load_peft_adapter(model, "path/of/the/adapter")
    ```

    Reference: the format is that of the code published with [Latent Space
    Factorization in LoRA](https://arxiv.org/abs/2510.19640).
    """
    lookup.check_model(model)
    backbone = getattr(model, "backbone", model)
    architecture = _find_architecture(backbone)
    tree = LayerTree(backbone)
    refuse_if_adapted(tree)
    settings, tensors = _read(check_local(directory, "directory"))
    modules, head_tensors = _group_by_module(tensors)
    _check_sizes(settings, tensors)
    config = config_from_peft(settings)
    layers = _find_layers(modules, _modules(tree, architecture))
    for module, layer in layers.items():
        check_adaptable(layer)
        _check_shapes(config, layer, modules[module], module)
    training.refuse_while_running(layers.values())
    head = _match_head(model, architecture, head_tensors)
    adapters = [
        build_adapter(layer, config.for_layer(index), starts_anew=False)
        for index, layer in enumerate(layers.values())
    ]
    # From here on nothing is refused.
    for module, adapter in zip(layers, adapters):
        _set_arrays(adapter, modules[module])
    install(tree, layers.values(), adapters)
    for weight, value in head:
        weight.assign(value)
    return summarize(backbone)


def save_peft_adapter(model, directory):
    """Saves adapters, and the head, as the authors' code reads them.

    Args:
        model: KerasHub task or backbone, adapted by FVAE-LoRA.
        directory: String or path of the folder, which is made if need be.

    Raises:
        ValueError: If no layer is adapted, the architecture or an adapted
            layer has no name there, the model is finalized, or its settings
            have no counterpart there.

    Example:

    ```python
    model.backbone.enable_fvae_lora(rank=16)
    model.fit(...)
    keras_fvae.save_peft_adapter(model, "path/of/the/adapter")
    ```

    Reference: the format is that of the code published with [Latent Space
    Factorization in LoRA](https://arxiv.org/abs/2510.19640).
    """
    lookup.check_model(model)
    directory = check_local(directory, "directory")
    backbone = getattr(model, "backbone", model)
    architecture = _find_architecture(backbone)
    adapted = lookup.require_adapted_layers(backbone, FVAELoRAConfig)
    modules = _modules(LayerTree(backbone), architecture)
    names = {id(layer): name for name, layer in modules.items()}
    root = "" if backbone is model else architecture.root
    tensors = {}
    for layer in adapted:
        if id(layer) not in names:
            raise ValueError(
                f"The adapted layer '{layer.path}' has no name in the Hugging "
                f"Face model. These have: {list(modules)}."
            )
        prefix = f"{ROOT}{root}{names[id(layer)]}."
        for name, array in _get_arrays(layer.adapter).items():
            tensors[prefix + name] = array
    settings = config_to_peft([layer.config for layer in adapted])
    settings["target_modules"] = _target_modules(adapted, modules, names)
    head = _head_weights(model, architecture)
    for name, (weight, transpose) in head.items():
        tensors[ROOT + name] = transpose(_to_numpy(weight))
    saved_modules = sorted({name.split(".")[0] for name in head})
    settings["modules_to_save"] = saved_modules or None
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {n: np.ascontiguousarray(a) for n, a in tensors.items()}
    with replaced_when_complete(directory / WEIGHTS_FILE) as file:
        file.write(safetensors.numpy.save(tensors, {"format": "pt"}))
    with replaced_when_complete(directory / CONFIG_FILE) as file:
        file.write(json.dumps(settings, indent=2, sort_keys=True).encode())


def config_from_peft(settings):
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
            encoder_units=[settings["enc_hidden_layer"]]
            * settings["enc_num_of_layer"],
            encoder_shared_trunk=settings["encoder_use_common_hidden_layer"],
            decoder_units=[settings["dec_hidden_layer"]]
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


def config_to_peft(configs):
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
        "lora_alpha": _rounded(config.scale * (rank + RANK_OFFSET)),
        **_uniform("enc", "encoder_units", config.hidden_units, rank),
        **_uniform("dec", "decoder_units", config.decoder_units, rank),
        "encoder_use_common_hidden_layer": config.encoder_shared_trunk,
        "enc_dropout": config.dropout,
        "dec_dropout": config.dropout,
        "latent_fusion": config.latent_fusion,
        "z2_latent_mean": _rounded(config.prior_mean),
        "z2_latent_std": _rounded(config.prior_std),
        "lambda_reconstruction": _rounded(config.reconstruction_weight),
        "lambda_kl_z1": _rounded(config.kl_weight),
        "lambda_z1_l2": _rounded(config.gamma_weights[0] * rank / 2),
        "lambda_z2_l2": _rounded(
            config.gamma_weights[1] * rank / 2 / config.prior_std**2
        ),
        "lambda_downstream": _rounded(1 / config.elbo_weight),
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


def _rounded(value):
    """Without the rounding errors of going there and back."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value


def _find_architecture(backbone):
    for cls in type(backbone).__mro__:
        if cls.__name__ in ARCHITECTURES:
            return ARCHITECTURES[cls.__name__]
    raise ValueError(
        f"It is not known what Hugging Face calls the layers of a "
        f"`{type(backbone).__name__}`. Known are: {list(ARCHITECTURES)}."
    )


def _modules(tree, architecture):
    """The layers of a backbone's tree by their names in Hugging Face."""
    modules = {}
    for path, layer in tree.layers.items():
        name = architecture.module_name(path)
        if name is not None:
            modules[name] = layer
    return modules


def _target_modules(adapted, modules, names):
    """Last names where these choose the adapted layers, else whole ones."""
    last_names = {names[id(layer)].split(".")[-1] for layer in adapted}
    chosen = [n for n in modules if n.split(".")[-1] in last_names]
    if len(chosen) == len(adapted):
        return sorted(last_names)
    return sorted(names[id(layer)] for layer in adapted)


def _group_by_module(tensors):
    """The adapters' tensors by module and name, and all others by name."""
    modules, others = {}, {}
    for name, array in tensors.items():
        name = name.removeprefix(ROOT)
        match = re.fullmatch(r"(.+)\.(lora_[ABE](?:\..+)?)", name)
        if match is None:
            others[name] = array
        elif match[2] != "lora_E":
            # Their forward pass does not use that one.
            modules.setdefault(match[1], {})[match[2]] = array
    if not modules:
        raise ValueError(f"There is no adapter in `{WEIGHTS_FILE}`.")
    return modules, others


def _find_layers(modules, present):
    """Dict of module to the layer that it is for.

    Args:
        modules: Dict whose keys are the names of modules in a file.
        present: Dict of the layers of a model by their names there.
    """
    layers, names_by_layer = {}, {}
    for module in modules:
        # What is around the blocks is called differently: `vit.encoder...`.
        names = [n for n in present if f".{module}".endswith(f".{n}")]
        if not names:
            raise ValueError(
                f"The adapter is for a layer '{module}', which the model does "
                f"not have. It has these: {list(present)}."
            )
        other = names_by_layer.setdefault(names[0], module)
        if other != module:
            raise ValueError(
                f"`{WEIGHTS_FILE}` has two adapters for one layer, as "
                f"'{other}' and as '{module}'."
            )
        layers[module] = present[names[0]]
    return layers


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
        "lora_B": _to_numpy(adapter.kernel_b).T,
        "lora_E": np.zeros((adapter.config.rank, 1), "float32"),
    }


def _head_weights(model, architecture):
    """Dict of tensor name to weight of the head and what turns it around."""
    weights = {}
    for module, layer_name in architecture.heads.items():
        layers = [la for la in model.layers if la.name == layer_name]
        if layers and layers[0] is not model:
            weights[f"{module}.weight"] = layers[0].kernel, np.transpose
            weights[f"{module}.bias"] = layers[0].bias, np.asarray
    return weights


def _match_head(model, architecture, tensors):
    """Pairs of a weight of the head and its value."""
    weights = _head_weights(model, architecture)
    pairs = []
    for name, array in tensors.items():
        if name not in weights:
            raise ValueError(
                f"`{WEIGHTS_FILE}` has '{name}', for which the model has no "
                f"place. Of its head it has: {list(weights)}. Load a trained "
                "head onto the task that it is the head of."
            )
        weight, transpose = weights[name]
        value = transpose(array)
        if value.shape != tuple(weight.shape):
            raise ValueError(
                f"'{name}' in `{WEIGHTS_FILE}` has shape {array.shape}, and "
                f"the model's '{weight.path}' has shape {tuple(weight.shape)}."
            )
        pairs.append((weight, value))
    return pairs


def _read(directory):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"There is no file '{directory / name}'.")
    try:
        settings = read_json((directory / CONFIG_FILE).read_bytes())
        entries = safetensors.deserialize(
            (directory / WEIGHTS_FILE).read_bytes()
        )
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"The adapter in '{directory}' cannot be read: it is damaged, cut "
            f"short, or of another kind ({error})."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{directory / CONFIG_FILE}' is no JSON object.")
    return settings, {name: _to_array(name, entry) for name, entry in entries}


def _to_array(name, entry):
    """A float32 array, of what safetensors has read."""
    if entry["dtype"] not in FLOATS:
        raise ValueError(
            f"'{name}' in `{WEIGHTS_FILE}` is of dtype {entry['dtype']}. It "
            f"must be one of {list(FLOATS)}."
        )
    array = np.frombuffer(entry["data"], FLOATS[entry["dtype"]])
    array = array.reshape(entry["shape"]).astype("float32")
    if not np.isfinite(array).all():
        raise ValueError(
            f"'{name}' in `{WEIGHTS_FILE}` has numbers that are not finite."
        )
    return array


def _to_numpy(weight):
    return replicas.to_numpy(ops.cast(weight, "float32"))
