"""Adapters in PEFT's format: its own methods, and the authors' fork."""

from __future__ import annotations

import re
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.backend.types import Filepath
from keras_fvae.integrations import peft_files
from keras_fvae.integrations import peft_fvae
from keras_fvae.integrations import peft_lora
from keras_fvae.integrations.hugging_face import architecture_of
from keras_fvae.integrations.hugging_face import modules_of
from keras_fvae.integrations.peft_files import CONFIG_FILE
from keras_fvae.integrations.peft_files import WEIGHTS_FILE
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.layers.config import check_boolean
from keras_fvae.layers.frozen import CONVOLUTIONS
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.model import lookup
from keras_fvae.model import training
from keras_fvae.model.enable import refuse_if_adapted
from keras_fvae.model.files import check_local
from keras_fvae.model.install import install
from keras_fvae.model.install import refuse_loops
from keras_fvae.model.summary import AdapterSummary
from keras_fvae.model.summary import summarize
from keras_fvae.model.tree import LayerTree

# What PEFT puts before all names.
ROOT = "base_model.model."
# What a root says if it is of another stack of blocks than the model has.
OTHER_STACKS = re.compile("vision|image|text|audio|encoder|decoder|tower")
READERS: dict[str, Any] = {
    "FVAEPEFT": peft_fvae.FVAEReader,
    "LORA": peft_lora.LoRAReader,
    "ADALORA": peft_lora.LoRAReader,
    "HIRA": peft_lora.LoRAReader,
}


def load_peft_adapter(
    model: keras.Layer, directory: Filepath
) -> AdapterSummary:
    """Adapts a KerasHub model by an adapter that PEFT saved.

    Of PEFT's own methods LoRA, rsLoRA, PiSSA, OLoRA, DoRA and HiRA; AdaLoRA as
    the LoRA that is left of it; FVAE-LoRA as the authors' fork of PEFT saves
    it. The base model must be the one that the adapter was trained on.

    Args:
        model: KerasHub task or backbone, not adapted yet. A trained head in
            the files goes into the head of the task.
        directory: String or path of the folder with `adapter_config.json` and
            `adapter_model.safetensors`.

    Returns:
        An `AdapterSummary`, as `keras_fvae.enable_adapter`.

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

    Reference: [PEFT](https://github.com/huggingface/peft), and the code
    published with [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640).
    """
    lookup.check_model(model)
    backbone: Any = getattr(model, "backbone", model)
    architecture = architecture_of(backbone)
    tree = LayerTree(backbone)
    refuse_if_adapted(tree)
    settings, tensors = peft_files.read(check_local(directory, "directory"))
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(
            f"`{CONFIG_FILE}` says peft_type={kind!r}. What can be loaded is "
            f"one of {[*READERS]}."
        )
    modules, head_tensors = _group_by_module(tensors)
    reader = READERS[kind](settings, tensors)
    layers = _find_layers(modules, tree, architecture)
    for these in layers.values():
        for layer in these:
            check_adaptable(layer)
    loaded = [
        adapter
        for module, these in layers.items()
        for adapter in reader.read(module, modules[module], these)
    ]
    if not loaded:
        raise ValueError(f"`{WEIGHTS_FILE}` has no adapter of a rank above 0.")
    training.refuse_while_running([adapter.layer for adapter in loaded])
    heads = _heads(model, architecture)
    head = _match_head(heads, head_tensors, settings)
    adapters = [
        build_adapter(
            one.layer,
            one.config.for_layer(index),
            starts_anew=one.starts_anew,
        )
        for index, one in enumerate(loaded)
    ]
    refuse_loops(tree, [one.layer for one in loaded], adapters)
    # From here on nothing is refused.
    for one, adapter in zip(loaded, adapters):
        one.set_weights(adapter)
    install(tree, [one.layer for one in loaded], adapters)
    for weight, value in head:
        weight.assign(value)
        training.choose(weight)
    return summarize(backbone)


def save_peft_adapter(
    model: keras.Layer,
    directory: Filepath,
    *,
    as_lora: bool = False,
    transformers_version: Literal[4, 5] = 4,
) -> None:
    """Saves adapters, and the head, as PEFT reads them.

    FVAE-LoRA as the authors' fork of PEFT reads it; DoRA and HiRA as
    themselves; all others whose update is that of A and B, such as PiSSA and
    AdaLoRA, as LoRA on the untouched base model.

    Args:
        model: KerasHub task or backbone with adapted layers.
        directory: String or path of the folder, which is made if need be.
        as_lora: Boolean. Whether to write FVAE-LoRA with `encoder_units=()` as
            the plain LoRA that it is at inference, which PEFT itself reads,
            and what serves PEFT's adapters. The offset of its update becomes a
            bias of B (`lora_bias`). Defaults to `False`.
        transformers_version: `4` (default) or `5`, the version of transformers
            whose names the layers get. They differ for ViT and DINOv2, and
            PEFT says that no module was targeted if they are the other's.

    Raises:
        ValueError: If no layer is adapted, the architecture or an adapted
            layer has no name there or is a convolution, the layers have
            several methods, the method or its settings have no counterpart
            there, or an argument is not allowed.

    Example:

    ```python
    model.backbone.enable_adapter(keras_fvae.LoRAConfig(rank=16))
    model.fit(...)
    keras_fvae.save_peft_adapter(model, "path/of/the/adapter")
    ```

    Reference: [PEFT](https://github.com/huggingface/peft), and the code
    published with [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640).
    """
    lookup.check_model(model)
    directory = check_local(directory, "directory")
    if transformers_version not in (4, 5):
        raise ValueError(
            "`transformers_version` must be 4 or 5. Received: "
            f"transformers_version={transformers_version!r}"
        )
    check_boolean("as_lora", as_lora)
    backbone: Any = getattr(model, "backbone", model)
    architecture = architecture_of(backbone)
    adapted = lookup.require_adapted_layers(backbone)
    modules = modules_of(
        LayerTree(backbone), architecture, newer=transformers_version == 5
    )
    chosen = _modules_with(adapted, modules)
    root = "" if backbone is model else architecture.roots[0]
    is_fvae = isinstance(adapted[0].config, FVAELoRAConfig) and not as_lora
    writer = peft_fvae if is_fvae else peft_lora
    if is_fvae:
        _refuse_other_methods(adapted)
    settings, tensors = writer.write(
        {f"{root}{name}": modules[name] for name in chosen}
    )
    tensors = {f"{ROOT}{name}": array for name, array in tensors.items()}
    settings["target_modules"] = _target_modules(chosen, modules)
    if architecture.is_transposed:
        settings["fan_in_fan_out"] = True
    heads = _heads(model, architecture)
    _refuse_leftovers(model, backbone, heads)
    for name, array in _head_tensors(heads).items():
        tensors[ROOT + name] = array
    saved_modules = sorted({name.split(".")[0] for name in heads})
    settings["modules_to_save"] = saved_modules or None
    peft_files.write(directory, settings, tensors)


def _refuse_other_methods(layers):
    """Raises a `ValueError` if not all layers are adapted by FVAE-LoRA."""
    for layer in layers:
        if not isinstance(layer.config, FVAELoRAConfig):
            raise ValueError(
                "A folder holds the adapters of one method. Layer "
                f"'{layers[0].path}' is adapted by FVAE-LoRA, layer "
                f"'{layer.path}' by {layer.config.method_name}."
            )


def _refuse_leftovers(model, backbone, heads):
    """Raises a `ValueError` if something trained would not be written."""
    whole = LayerTree(model)
    inside_ids = {id(la) for la in lookup.adapted_layers(backbone)}
    left = [la.path for la in whole.adapted if id(la) not in inside_ids]
    written_ids = {id(w) for layer in heads.values() for w in layer.weights}
    trained = {
        **training.trained_weights(whole),
        **training.changed_state(whole, if_noted=True),
    }
    left += [p for p, w in trained.items() if id(w) not in written_ids]
    if left:
        raise ValueError(
            "PEFT's format, as this writes it, has room for the adapters of a "
            f"backbone and for a head that is known: {[*heads]}. The model "
            f"has trained {left} as well. Save it by `save_adapter`."
        )


def _modules_with(adapted, modules):
    """List of the names of the modules that have an adapted layer."""
    adapted_ids = {id(layer) for layer in adapted}
    chosen = [
        name
        for name, layers in modules.items()
        if any(id(layer) in adapted_ids for layer in layers)
    ]
    named_ids = {id(layer) for name in chosen for layer in modules[name]}
    for layer in adapted:
        if isinstance(layer, CONVOLUTIONS):
            raise ValueError(
                f"The adapted layer '{layer.path}' is a convolution, and those "
                "are not written in PEFT's format. Save it by `save_adapter`."
            )
        if id(layer) not in named_ids:
            raise ValueError(
                f"The adapted layer '{layer.path}' has no name in the Hugging "
                f"Face model. These have: {list(modules)}."
            )
    return chosen


def _target_modules(chosen, modules):
    """Last names where these choose the modules, else whole ones."""
    last_names = {name.split(".")[-1] for name in chosen}
    with_them = [n for n in modules if n.split(".")[-1] in last_names]
    return sorted(last_names if len(with_them) == len(chosen) else chosen)


def _group_by_module(tensors):
    """The adapters' tensors by module and name, and all others by name."""
    modules, others = {}, {}
    for name, array in tensors.items():
        name = name.removeprefix(ROOT)
        match = re.fullmatch(r"(.+?)\.((?:lora|hira)_.+)", name)
        if match is None:
            others[name] = array
        else:
            modules.setdefault(match[1], {})[match[2]] = array
    if not modules:
        raise ValueError(f"There is no adapter in `{WEIGHTS_FILE}`.")
    return modules, others


def _name_within(module, names, roots):
    """The longest of the names that a module's ends with, or `None`.

    What is around the model may be called in many ways, but is no other stack
    of blocks.
    """
    ends = [name for name in names if f".{module}".endswith(f".{name}")]
    if not ends:
        return None
    name = max(ends, key=len)
    root = module.removesuffix(name)
    if root not in roots and OTHER_STACKS.search(root):
        return None
    return name


def _find_layers(modules, tree, architecture):
    """Dict of module to the tuple of layers that it stands for.

    Args:
        modules: Dict whose keys are the names of modules in a file.
        tree: `LayerTree` of the backbone.
        architecture: `Architecture`.
    """
    present = {
        **modules_of(tree, architecture, newer=True),
        **modules_of(tree, architecture),
    }
    found, modules_by_layer = {}, {}
    for module in modules:
        name = _name_within(module, present, architecture.roots)
        if name is None:
            raise ValueError(
                f"The adapter is for a layer '{module}', which the model does "
                f"not have. It has these: {[*present]}."
            )
        found[module] = present[name]
        for layer in found[module]:
            other = modules_by_layer.setdefault(id(layer), module)
            if other != module:
                raise ValueError(
                    f"`{WEIGHTS_FILE}` has two adapters for one layer, as "
                    f"'{other}' and as '{module}'."
                )
    return found


def _heads(model, architecture):
    """Dict of a head's module in Hugging Face to its layer in the model."""
    return {
        module: layer
        for module, name in architecture.heads.items()
        for layer in model.layers
        if layer.name == name and layer is not model
    }


def _head_tensors(heads):
    """Dict of name to array, of the weights of a head."""
    tensors = {}
    for module, layer in heads.items():
        kernel = keras_internals.float_kernel(layer, full_precision=True)
        tensors[f"{module}.weight"] = _to_numpy(kernel).T
        tensors[f"{module}.bias"] = _to_numpy(layer.bias)
    return tensors


def _match_head(heads, tensors, settings):
    """Pairs of a weight of the head and its value.

    Args:
        heads: What `_heads` returned.
        tensors: Dict of name to array, of all in a file but the adapters.
        settings: Dict, the content of `adapter_config.json`.

    Raises:
        ValueError: If it is not all of a head that the model has, or nothing.
    """
    weights = {
        f"{module}.{name}": weight
        for module, layer in heads.items()
        for name, weight in (("weight", layer.kernel), ("bias", layer.bias))
    }
    said = settings.get("modules_to_save") or []
    if not isinstance(said, list) or not all(isinstance(n, str) for n in said):
        raise ValueError(
            f"`{CONFIG_FILE}` says modules_to_save={said!r}, which must be a "
            "list of names."
        )
    present = {name.split(".")[0] for name in tensors}
    missing = [name for name in said if name not in present]
    if tensors:
        missing += [name for name in weights if name not in tensors]
    for name, array in tensors.items():
        if name not in weights:
            raise ValueError(
                f"`{WEIGHTS_FILE}` has '{name}', for which the model has no "
                f"place. Of its head it has: {list(weights)}. Load a trained "
                "head onto the task that it is the head of."
            )
        shape = tuple(weights[name].shape)
        shape = shape[::-1] if name.endswith(".weight") else shape
        if array.shape != shape:
            raise ValueError(
                f"'{name}' in `{WEIGHTS_FILE}` has shape {array.shape}, and "
                f"for this model it must have shape {shape}."
            )
    if missing:
        raise ValueError(
            f"`{WEIGHTS_FILE}` lacks {missing}: it must have all of a trained "
            "head, or none of it and no `modules_to_save`."
        )
    for module, layer in heads.items():
        if tensors and layer.quantization_mode is not None:
            raise ValueError(
                f"The layer '{layer.name}' is quantized, and `{WEIGHTS_FILE}` "
                f"has trained weights for it, '{module}'. Quantize the "
                "backbone alone."
            )
    return [(weights[name], array.T) for name, array in tensors.items()]


def _to_numpy(weight):
    return replicas.to_numpy(ops.cast(weight, "float32"))
