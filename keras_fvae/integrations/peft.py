"""Adapters in PEFT's format: its own methods, and the authors' fork."""

import re

import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.integrations import peft_files
from keras_fvae.integrations import peft_fvae
from keras_fvae.integrations import peft_lora
from keras_fvae.integrations.hugging_face import architecture_of
from keras_fvae.integrations.hugging_face import modules_of
from keras_fvae.integrations.peft_files import CONFIG_FILE
from keras_fvae.integrations.peft_files import WEIGHTS_FILE
from keras_fvae.layers.attach import build_adapter
from keras_fvae.layers.attach import check_adaptable
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.model import lookup
from keras_fvae.model import training
from keras_fvae.model.enable import refuse_if_adapted
from keras_fvae.model.files import check_local
from keras_fvae.model.install import install
from keras_fvae.model.summary import summarize
from keras_fvae.model.tree import LayerTree

# What PEFT puts before all names.
ROOT = "base_model.model."
# What a root says if it is of another stack of blocks than the model has.
OTHER_STACKS = re.compile("vision|image|text|audio|encoder|decoder|tower")
READERS = {
    "FVAEPEFT": peft_fvae.FVAEReader,
    "LORA": peft_lora.LoRAReader,
    "ADALORA": peft_lora.LoRAReader,
    "HIRA": peft_lora.LoRAReader,
}


def load_peft_adapter(model, directory):
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
    backbone = getattr(model, "backbone", model)
    architecture = architecture_of(backbone)
    tree = LayerTree(backbone)
    refuse_if_adapted(tree)
    settings, tensors = peft_files.read(check_local(directory, "directory"))
    kind = settings.get("peft_type")
    if kind not in READERS:
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
    head = _match_head(model, architecture, head_tensors)
    adapters = [
        build_adapter(
            one.layer,
            one.config.for_layer(index),
            starts_anew=one.starts_anew,
        )
        for index, one in enumerate(loaded)
    ]
    # From here on nothing is refused.
    for one, adapter in zip(loaded, adapters):
        one.set_weights(adapter)
    install(tree, [one.layer for one in loaded], adapters)
    for weight, value in head:
        weight.assign(value)
    return summarize(backbone)


def save_peft_adapter(
    model, directory, *, as_lora=False, transformers_version=4
):
    """Saves adapters, and the head, as PEFT reads them.

    FVAE-LoRA as the authors' fork of PEFT reads it; LoRA, rsLoRA, FFA-LoRA,
    DropLoRA, PiSSA and OLoRA as LoRA on the untouched base model; DoRA and
    HiRA as themselves.

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
            layer has no name there, the layers have several methods, the
            method or its settings have no counterpart there, or an argument
            is not allowed.

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
    backbone = getattr(model, "backbone", model)
    architecture = architecture_of(backbone)
    adapted = lookup.require_adapted_layers(backbone)
    modules = modules_of(
        LayerTree(backbone), architecture, newer=transformers_version == 5
    )
    chosen = _modules_with(adapted, modules)
    root = "" if backbone is model else architecture.roots[0]
    is_fvae = isinstance(adapted[0].config, FVAELoRAConfig) and not as_lora
    writer = peft_fvae if is_fvae else peft_lora
    lookup.require_adapted_layers(backbone, FVAELoRAConfig if is_fvae else None)
    settings, tensors = writer.write(
        {f"{root}{name}": modules[name] for name in chosen}
    )
    tensors = {f"{ROOT}{name}": array for name, array in tensors.items()}
    settings["target_modules"] = _target_modules(chosen, modules)
    if architecture.is_transposed:
        settings["fan_in_fan_out"] = True
    head = _head_weights(model, architecture)
    for name, (weight, transpose) in head.items():
        tensors[ROOT + name] = transpose(_to_numpy(weight))
    saved_modules = sorted({name.split(".")[0] for name in head})
    settings["modules_to_save"] = saved_modules or None
    peft_files.write(directory, settings, tensors)


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


def _to_numpy(weight):
    return replicas.to_numpy(ops.cast(weight, "float32"))
