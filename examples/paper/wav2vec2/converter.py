"""Wav2Vec2 from checkpoints in Hugging Face's format.

The checkpoints that can be read have a `config.json`, and their tensors in
`model.safetensors`, or in several such files and an index of them.
"""

import collections
import json
import pathlib

import numpy as np
import safetensors

from examples.paper.wav2vec2.backbone import Wav2Vec2Backbone
from examples.paper.wav2vec2.ctc import BLANK
from examples.paper.wav2vec2.ctc import Wav2Vec2CTC

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Our arguments, and what the config calls them. Old configs lack the optional
# ones, whose defaults are ours.
REQUIRED = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "conv_filters": "conv_dim",
    "conv_kernel_sizes": "conv_kernel",
    "conv_strides": "conv_stride",
    "conv_use_bias": "conv_bias",
    "feature_norm": "feat_extract_norm",
    "normalize_first": "do_stable_layer_norm",
    "position_kernel_size": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups",
}
OPTIONAL = {
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "feature_dropout": "feat_proj_dropout",
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "min_masks": "mask_time_min_masks",
    "layer_norm_epsilon": "layer_norm_eps",
}
# The only values that our backbone has.
FIXED = {
    "model_type": "wav2vec2",
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "add_adapter": False,
    "adapter_attn_dim": None,
}

# In checkpoints with a head, all but the head's tensors have it.
PREFIX = "wav2vec2."
HEAD = "lm_head"
MASK_VECTOR = "masked_spec_embed"
# Of pre-training alone.
UNUSED = ("quantizer.", "project_q.", "project_hid.")
POSITIONS = "encoder.pos_conv_embed.conv"
# The norms and the directions of the positional kernel, by version.
WEIGHT_NORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)

# What fills a weight: the shapes of the tensors by their names, and a function
# that makes the weight's value of the tensors.
Source = collections.namedtuple("Source", "weight shapes convert")


def load_backbone(checkpoint, **options):
    """A backbone with the weights of a checkpoint.

    Args:
        checkpoint: Path of a folder, or `"hf://owner/name"`, which is
            downloaded. `"hf://owner/name@revision"` takes that revision, such
            as `refs/pr/1`.
        **options: Arguments of `Wav2Vec2Backbone` that replace those of the
            checkpoint's config. By default the padding mask is used where the
            feature encoder has layer norms.

    Returns:
        A `Wav2Vec2Backbone`.

    Raises:
        FileNotFoundError: If the checkpoint has no config or no safetensors.
        ValueError: If the model is of another kind, or a tensor is unknown,
            missing or of another shape.
    """
    folder = _get_folder(checkpoint)
    config, tensors = _read_config(folder), _open_tensors(folder)
    backbone = _make_backbone(config, options)
    _assign(_backbone_sources(backbone, tensors), tensors)
    return backbone


def load_ctc(checkpoint, vocabulary_size=None, **options):
    """A task with the weights of a checkpoint.

    Args:
        checkpoint: As for `load_backbone`.
        vocabulary_size: Integer, the labels with the blank, for a head with
            random weights. `None` (default) takes the checkpoint's head.
        **options: As for `load_backbone`.

    Returns:
        A `Wav2Vec2CTC`.

    Raises:
        FileNotFoundError: As by `load_backbone`.
        ValueError: As by `load_backbone`, or if the checkpoint's head is asked
            for and there is none, or its blank is not 0.
    """
    folder = _get_folder(checkpoint)
    config, tensors = _read_config(folder), _open_tensors(folder)
    has_new_head = vocabulary_size is not None
    if not has_new_head:
        vocabulary_size = _get_vocabulary_size(folder, config, tensors)
    task = Wav2Vec2CTC(
        _make_backbone(config, options),
        vocabulary_size,
        dropout=config.get("final_dropout", 0.1),
    )
    sources = _backbone_sources(task.backbone, tensors)
    if not has_new_head:
        sources += _dense_sources(HEAD, task.output_dense)
    _assign(sources, tensors)
    return task


def _get_folder(checkpoint):
    """The folder of a checkpoint, which is downloaded if it has to be."""
    if not str(checkpoint).startswith("hf://"):
        return pathlib.Path(checkpoint)
    import huggingface_hub  # Not needed for what is here already.

    name, _, revision = checkpoint.removeprefix("hf://").partition("@")
    folder = huggingface_hub.snapshot_download(
        name,
        revision=revision or None,
        allow_patterns=[CONFIG_FILE, INDEX_FILE, "model*.safetensors"],
    )
    return pathlib.Path(folder)


def _read_config(folder):
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}'. A checkpoint is a folder with "
            f"`{CONFIG_FILE}` and `{WEIGHTS_FILE}`."
        )
    config = json.loads(path.read_text())
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"'{path}' has {name}={config[name]!r}. Only {value!r} can be "
                "converted."
            )
    missing = [name for name in REQUIRED.values() if name not in config]
    if missing:
        raise ValueError(f"'{path}' lacks {missing}.")
    return config


def _open_tensors(folder):
    """Dict of name, without prefix, to tensor that is not read yet."""
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        names = sorted({*index["weight_map"].values()})
    else:
        names = [WEIGHTS_FILE]
    tensors = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"There is no file '{folder / name}'. A checkpoint that has "
                "`pytorch_model.bin` alone cannot be read: convert it to "
                "safetensors, or take a revision in which that was done, such "
                "as 'hf://owner/name@refs/pr/1'."
            )
        file = safetensors.safe_open(folder / name, framework="np")
        for key in file.keys():  # noqa: SIM118  It is no dict.
            tensors[key.removeprefix(PREFIX)] = file.get_slice(key)
    return tensors


def _make_backbone(config, options):
    arguments = {name: config[theirs] for name, theirs in REQUIRED.items()}
    for name, theirs in OPTIONAL.items():
        if theirs in config:
            arguments[name] = config[theirs]
    if not config.get("apply_spec_augment", True):
        arguments["mask_prob"] = 0.0
    arguments["use_padding_mask"] = config["feat_extract_norm"] == "layer"
    return Wav2Vec2Backbone(**{**arguments, **options})


def _get_vocabulary_size(folder, config, tensors):
    if f"{HEAD}.bias" not in tensors:
        raise ValueError(
            f"The checkpoint '{folder}' has no head. Pass `vocabulary_size` "
            "for a new one."
        )
    if config.get("pad_token_id", BLANK) != BLANK:
        raise ValueError(
            f"The blank of the checkpoint '{folder}' is its `pad_token_id` "
            f"{config['pad_token_id']}. It must be {BLANK}. Pass "
            "`vocabulary_size` for a new head."
        )
    return tensors[f"{HEAD}.bias"].get_shape()[0]


def _backbone_sources(backbone, tensors):
    """A list of what fills each weight of the backbone."""
    encoder = backbone.feature_encoder
    projection = backbone.feature_projection
    sources = []
    for i, convolution in enumerate(encoder.convolutions):
        name = f"feature_extractor.conv_layers.{i}.conv"
        sources += _dense_sources(name, convolution)
    for i, norm in enumerate(encoder.norms):
        name = f"feature_extractor.conv_layers.{i}.layer_norm"
        sources += _norm_sources(name, norm)
    sources += _norm_sources(
        "feature_projection.layer_norm", projection.layer_norm
    )
    sources += _dense_sources(
        "feature_projection.projection", projection.projection
    )
    if backbone.time_masking is not None:
        sources.append(_source(MASK_VECTOR, backbone.time_masking.mask_vector))
    convolution = backbone.positional_convolution.convolution
    sources.append(_positional_source(convolution.kernel, tensors))
    sources.append(_source(f"{POSITIONS}.bias", convolution.bias))
    sources += _norm_sources("encoder.layer_norm", backbone.encoder_layer_norm)
    for i, block in enumerate(backbone.transformer_layers):
        name = f"encoder.layers.{i}"
        attention = block.attention
        for theirs, dense in {
            "attention.q_proj": attention.query,
            "attention.k_proj": attention.key,
            "attention.v_proj": attention.value,
            "attention.out_proj": attention.attention_output,
            "feed_forward.intermediate_dense": (
                block.feedforward_intermediate_dense
            ),
            "feed_forward.output_dense": block.feedforward_output_dense,
        }.items():
            sources += _dense_sources(f"{name}.{theirs}", dense)
        sources += _norm_sources(f"{name}.layer_norm", block.attention_norm)
        sources += _norm_sources(
            f"{name}.final_layer_norm", block.feedforward_norm
        )
    return sources


def _source(name, weight):
    # PyTorch has the axes of kernels, of layers and convolutions, in reverse.
    return Source(weight, {name: tuple(weight.shape)[::-1]}, np.transpose)


def _dense_sources(name, layer):
    sources = [_source(f"{name}.weight", layer.kernel)]
    if layer.use_bias:
        sources.append(_source(f"{name}.bias", layer.bias))
    return sources


def _norm_sources(name, layer):
    return [
        _source(f"{name}.weight", layer.gamma),
        _source(f"{name}.bias", layer.beta),
    ]


def _positional_source(kernel, tensors):
    """The source of a kernel that is stored by its norms and directions."""
    spellings = [
        [f"{POSITIONS}.{name}" for name in names] for names in WEIGHT_NORMS
    ]
    norm_name, direction_name = next(
        (names for names in spellings if names[0] in tensors), spellings[0]
    )
    shape = tuple(kernel.shape)
    shapes = {
        norm_name: (1, 1, shape[0]),
        direction_name: shape[::-1],
    }
    return Source(kernel, shapes, _fold_weight_norm)


def _fold_weight_norm(norms, directions):
    """One kernel, (frames, inputs, outputs), of a norm for each frame."""
    lengths = np.sqrt(np.sum(directions**2, axis=(0, 1), keepdims=True))
    return np.transpose(norms * directions / lengths)


def _assign(sources, tensors):
    """Fills the weights, once all tensors are known to fit."""
    shapes = {}
    for source in sources:
        shapes.update(source.shapes)
    unused = [f"{HEAD}.", MASK_VECTOR, *UNUSED]
    unknown = [
        name
        for name in tensors
        if name not in shapes and not name.startswith(tuple(unused))
    ]
    if unknown:
        raise ValueError(
            f"The checkpoint has tensors that the model has no place for: "
            f"{unknown}."
        )
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ValueError(f"The checkpoint lacks tensors: {missing}.")
    for name, shape in shapes.items():
        stored = tuple(tensors[name].get_shape())
        if stored != shape:
            raise ValueError(
                f"The checkpoint's '{name}' has shape {stored}. By its config "
                f"it must have {shape}."
            )
    for weight, names, convert in sources:
        weight.assign(convert(*[tensors[name][:] for name in names]))
