"""What Hugging Face calls the layers of KerasHub's backbones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import keras

from keras_fvae.model.tree import LayerTree


class Blocks(NamedTuple):
    """The blocks of one stack, such as an encoder, and the layers in each.

    Args:
        path: String, the path of a block in KerasHub, `{}` its number.
        name: String, the name of a block in Hugging Face, `{}` its number.
        layers: Dict of name in Hugging Face's block to path in KerasHub's; a
            tuple of paths where Hugging Face has one layer for several, whose
            outputs lie one after the other.
        first_number: Integer, the number of KerasHub's first block.
    """

    path: str
    name: str
    layers: dict[str, str | tuple[str, ...]]
    first_number: int = 0


class Architecture(NamedTuple):
    """What KerasHub and Hugging Face call the layers of one architecture.

    Args:
        roots: Tuple of strings, what Hugging Face may put before the names;
            the first one is that of a task.
        blocks: Tuple of `Blocks`.
        others: Dict of name in Hugging Face to path in KerasHub, of what is in
            no block.
        heads: Dict of name of a head's layer in Hugging Face to its name in
            the KerasHub task.
        newer_blocks: Tuple of `Blocks`, as transformers 5 calls them, where
            that is not as transformers 4 does.
        is_transposed: Boolean. Whether Hugging Face has the kernels as Keras
            does, its `fan_in_fan_out`.
    """

    roots: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    others: dict[str, str] = {}
    heads: dict[str, str] = {}
    newer_blocks: tuple[Blocks, ...] = ()
    is_transposed: bool = False


def architecture_of(backbone: keras.Layer) -> Architecture:
    """The `Architecture` of a KerasHub backbone.

    Raises:
        ValueError: If it is not known.
    """
    for cls in type(backbone).__mro__:
        if cls.__name__ in ARCHITECTURES:
            architecture = ARCHITECTURES[cls.__name__]
            if callable(architecture):
                return architecture(backbone)
            return architecture
    raise ValueError(
        f"It is not known what Hugging Face calls the layers of a "
        f"`{type(backbone).__name__}`. Known are: {sorted(ARCHITECTURES)}."
    )


def modules_of(
    tree: LayerTree, architecture: Architecture, newer: bool = False
) -> dict[str, tuple[keras.Layer, ...]]:
    """The layers of a backbone by their names in Hugging Face.

    Args:
        tree: `LayerTree` of the backbone.
        architecture: `Architecture`.
        newer: Boolean. Whether to call them as transformers 5 does.

    Returns:
        Dict of name, without a root, to tuple of layers.
    """
    blocks = architecture.blocks
    if newer and architecture.newer_blocks:
        blocks = architecture.newer_blocks
    known_parts = _parts(
        [
            *(stack.path for stack in blocks),
            *(path for stack in blocks for path in _flat(stack.layers)),
            *_flat(architecture.others),
        ]
    )
    layers: dict[str, keras.Layer] = {}
    for path, layer in tree.layers.items():
        layers.setdefault(_without_numbers(path, known_parts), layer)
    modules: dict[str, tuple[keras.Layer, ...]] = {}
    for stack in blocks:
        number = stack.first_number
        found: Any = True
        while found:
            found = {
                stack.name.format(number - stack.first_number) + name: these
                for name, paths in stack.layers.items()
                if (these := _at(layers, stack.path.format(number), paths))
            }
            modules |= found
            number += 1
    for name, path in architecture.others.items():
        if these := _at(layers, "", path):
            modules[name] = these
    return modules


def _at(layers, block, paths):
    """Tuple of the layers at paths below a block; empty if one is missing."""
    paths = paths if isinstance(paths, tuple) else (paths,)
    found = tuple(layers.get(block + path) for path in paths)
    return () if None in found else found


def _flat(layers):
    """Yields the paths of a dict of name to path, or to a tuple of paths."""
    for paths in layers.values():
        yield from paths if isinstance(paths, tuple) else (paths,)


def _parts(paths):
    """Set of the names of layers in paths."""
    return {part for path in paths for part in path.split("/")}


def _without_numbers(path, known_parts):
    """A path without the numbers that Keras gives to layers without a name."""

    def plain(part):
        stem = re.sub(r"_\d+$", "", part)
        return stem if stem in known_parts and part not in known_parts else part

    return "/".join(map(plain, path.split("/")))


def _attention(path, names, output):
    """The four projections of an attention layer."""
    hub_names = ("query", "key", "value")
    layers = {name: f"{path}/{hub}" for hub, name in zip(hub_names, names)}
    return {**layers, output: f"{path}/attention_output"}


_INTERMEDIATE = "feedforward_intermediate_dense"
_GATE = "feedforward_gate_dense"
_OUTPUT = "feedforward_output_dense"


def _encoder(path, name, attention, output, mlp, attention_path=None):
    """`Blocks` of KerasHub's usual encoder or decoder layers."""
    return Blocks(
        path=path,
        name=name,
        layers={
            **_attention(
                attention_path or "self_attention_layer", attention, output
            ),
            mlp[0]: _INTERMEDIATE,
            mlp[1]: _OUTPUT,
        },
    )


_BERT_BLOCKS = _encoder(
    "transformer_layer_{}/",
    "encoder.layer.{}.",
    [f"attention.self.{name}" for name in ("query", "key", "value")],
    "attention.output.dense",
    ("intermediate.dense", "output.dense"),
)
_BERT = Architecture(
    roots=("bert.", ""),
    blocks=(_BERT_BLOCKS,),
    others={"pooler.dense": "pooled_dense"},
    heads={"classifier": "logits"},
)
_ROBERTA = Architecture(
    roots=("roberta.", ""),
    blocks=(_BERT_BLOCKS,),
    heads={"classifier.dense": "pooled_dense", "classifier.out_proj": "logits"},
)
_DISTILBERT = Architecture(
    roots=("distilbert.", ""),
    blocks=(
        _encoder(
            "transformer_layer_{}/",
            "transformer.layer.{}.",
            [f"attention.{name}_lin" for name in "qkv"],
            "attention.out_lin",
            ("ffn.lin1", "ffn.lin2"),
        ),
    ),
    heads={"pre_classifier": "pooled_dense", "classifier": "logits"},
)
_DEBERTA = Architecture(
    roots=("deberta.", ""),
    blocks=(
        _encoder(
            "disentangled_attention_encoder_layer_{}/",
            "encoder.layer.{}.",
            [f"attention.self.{n}_proj" for n in ("query", "key", "value")],
            "attention.output.dense",
            ("intermediate.dense", "output.dense"),
        ),
    ),
    heads={"pooler.dense": "pooled_dense", "classifier": "logits"},
)
_VIT_ATTENTION = [f"attention.attention.{n}" for n in ("query", "key", "value")]
_NEWER_ATTENTION = [f"attention.{name}_proj" for name in "qkv"]
_VIT_BLOCKS = Blocks(
    path="vit_encoder/transformer_block_{}/",
    name="encoder.layer.{}.",
    layers={
        **_attention("mha", _VIT_ATTENTION, "attention.output.dense"),
        "intermediate.dense": "mlp/dense_1",
        "output.dense": "mlp/dense_2",
    },
    first_number=1,
)
_VIT = Architecture(
    roots=("vit.", ""),
    blocks=(_VIT_BLOCKS,),
    heads={"classifier": "predictions"},
    newer_blocks=(
        _VIT_BLOCKS._replace(
            name="layers.{}.",
            layers={
                **_attention("mha", _NEWER_ATTENTION, "attention.o_proj"),
                "mlp.fc1": "mlp/dense_1",
                "mlp.fc2": "mlp/dense_2",
            },
        ),
    ),
)
_DINO_MLP = {"mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
_DINO_GATED = {
    "mlp.weights_in": "mlp/weights_in",
    "mlp.weights_out": "mlp/weights_out",
}
_DINO_BLOCKS = Blocks(
    path="encoder/layers_{}/",
    name="encoder.layer.{}.",
    layers={
        **_attention(
            "attention/attention", _VIT_ATTENTION, "attention.output.dense"
        ),
        **_DINO_MLP,
        **_DINO_GATED,
    },
)
_DINO = Architecture(
    roots=("dinov2.", ""),
    blocks=(_DINO_BLOCKS,),
    newer_blocks=(
        _DINO_BLOCKS._replace(
            layers={
                **_attention(
                    "attention/attention", _NEWER_ATTENTION, "attention.o_proj"
                ),
                **_DINO_MLP,
                **_DINO_GATED,
            }
        ),
    ),
)
_PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkv"]
_LLAMA_BLOCKS = Blocks(
    path="transformer_layer_{}/",
    name="layers.{}.",
    layers={
        **_attention("self_attention", _PROJECTIONS, "self_attn.o_proj"),
        "mlp.gate_proj": _GATE,
        "mlp.up_proj": _INTERMEDIATE,
        "mlp.down_proj": _OUTPUT,
    },
)
_LLAMA = Architecture(roots=("model.", ""), blocks=(_LLAMA_BLOCKS,))
_MIXTRAL_BLOCKS = _LLAMA_BLOCKS._replace(
    layers={
        **_attention("self_attention", _PROJECTIONS, "self_attn.o_proj"),
        "block_sparse_moe.gate": "mixtral_sparse_moe_block/"
        "sparse_feedforward_gate_dense",
    },
)
_PHI3 = Architecture(
    roots=("model.", ""),
    blocks=(
        _LLAMA_BLOCKS._replace(
            layers={
                "self_attn.qkv_proj": (
                    "attention/query",
                    "attention/key",
                    "attention/value",
                ),
                "self_attn.o_proj": "attention/attention_output",
                "mlp.gate_up_proj": (_GATE, _INTERMEDIATE),
                "mlp.down_proj": _OUTPUT,
            },
        ),
    ),
)
_GEMMA_BLOCKS = _LLAMA_BLOCKS._replace(
    path="decoder_block_{}/",
    layers={
        **_attention("attention", _PROJECTIONS, "self_attn.o_proj"),
        "mlp.gate_proj": "ffw_gating",
        "mlp.up_proj": "ffw_gating_2",
        "mlp.down_proj": "ffw_linear",
    },
)


def _gemma3(backbone):
    """Gemma 3's, which are called otherwise where there are pictures."""
    if backbone.vision_encoder is None:
        return Architecture(roots=("model.", ""), blocks=(_GEMMA_BLOCKS,))
    texts = _GEMMA_BLOCKS._replace(name="language_model.layers.{}.")
    pictures = Blocks(
        path="gemma3_vision_encoder/image_encoder/encoder_block_{}/",
        name="vision_tower.vision_model.encoder.layers.{}.",
        layers={
            "self_attn.q_proj": "multi_head_attention/query_proj",
            "self_attn.k_proj": "multi_head_attention/key_proj",
            "self_attn.v_proj": "multi_head_attention/value_proj",
            "self_attn.out_proj": "multi_head_attention/out_proj",
            "mlp.fc1": "mlp_dense_1",
            "mlp.fc2": "mlp_dense_2",
        },
    )
    newer = pictures._replace(name="vision_tower.encoder.layers.{}.")
    return Architecture(
        roots=("model.", ""),
        blocks=(texts, pictures),
        newer_blocks=(texts, newer),
    )


_GPT2 = Architecture(
    roots=("transformer.", ""),
    blocks=(
        Blocks(
            path="transformer_layer_{}/",
            name="h.{}.",
            layers={
                "attn.c_attn": (
                    "self_attention/query",
                    "self_attention/key",
                    "self_attention/value",
                ),
                "attn.c_proj": "self_attention/attention_output",
                "mlp.c_fc": _INTERMEDIATE,
                "mlp.c_proj": _OUTPUT,
            },
        ),
    ),
    is_transposed=True,
)
_WHISPER_DECODER = _encoder(
    "transformer_decoder_layer_{}/",
    "decoder.layers.{}.",
    _PROJECTIONS,
    "self_attn.out_proj",
    ("fc1", "fc2"),
    attention_path="self_attention",
)
_WHISPER = Architecture(
    roots=("model.", ""),
    blocks=(
        _encoder(
            "transformer_encoder_layer_{}/",
            "encoder.layers.{}.",
            _PROJECTIONS,
            "self_attn.out_proj",
            ("fc1", "fc2"),
        ),
        _WHISPER_DECODER._replace(
            layers={
                **_WHISPER_DECODER.layers,
                **_attention(
                    "cross_attention",
                    [f"encoder_attn.{name}_proj" for name in "qkv"],
                    "encoder_attn.out_proj",
                ),
            }
        ),
    ),
)


def _t5(backbone):
    """T5's, where the first layer's name says whether there is a gate."""
    first = "wi_0" if backbone.use_gated_activation else "wi"

    def attention(path, number, name):
        hub_names = ("query", "key", "value", "output")
        return {
            f"layer.{number}.{name}.{short}": f"{path}/{hub}_projector"
            for hub, short in zip(hub_names, "qkvo")
        }

    def mlp(number):
        prefix = f"layer.{number}.DenseReluDense."
        return {
            f"{prefix}{first}": "input_projector",
            f"{prefix}wi_1": "gate_projector",
            f"{prefix}wo": "output_projector",
        }

    own = attention("self_attention", 0, "SelfAttention")
    cross = attention("cross_attention", 1, "EncDecAttention")
    return Architecture(
        roots=("",),
        blocks=(
            Blocks(
                "transformer_encoder_layer_{}/",
                "encoder.block.{}.",
                {**own, **mlp(1)},
            ),
            Blocks(
                "transformer_decoder_layer_{}/",
                "decoder.block.{}.",
                {**own, **cross, **mlp(2)},
            ),
        ),
    )


def _towers(path, attention_path, mlp, others=None):
    """`Architecture` of two encoders, for pictures and for texts."""
    return Architecture(
        roots=("",),
        blocks=tuple(
            Blocks(
                path=f"{path}_{kind}_encoder/encoder_block_{{}}/",
                name=f"{kind}_model.encoder.layers.{{}}.",
                layers={
                    **_attention(
                        attention_path, _PROJECTIONS, "self_attn.out_proj"
                    ),
                    "mlp.fc1": mlp[0],
                    "mlp.fc2": mlp[1],
                },
            )
            for kind in ("vision", "text")
        ),
        others=others or {},
    )


# By the name of KerasHub's backbone, whose subclasses count as well.
ARCHITECTURES: dict[
    str, Architecture | Callable[[keras.Layer], Architecture]
] = {
    "BertBackbone": _BERT,
    "CLIPBackbone": _towers("clip", "attention", ("dense_1", "dense_2")),
    "DINOV2Backbone": _DINO,
    "DebertaV3Backbone": _DEBERTA,
    "DistilBertBackbone": _DISTILBERT,
    "GPT2Backbone": _GPT2,
    "Gemma3Backbone": _gemma3,
    "GemmaBackbone": _LLAMA._replace(blocks=(_GEMMA_BLOCKS,)),
    "LlamaBackbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "MixtralBackbone": _LLAMA._replace(blocks=(_MIXTRAL_BLOCKS,)),
    "Phi3Backbone": _PHI3,
    "Qwen3Backbone": _LLAMA,
    "QwenBackbone": _LLAMA,
    "RobertaBackbone": _ROBERTA,
    "SigLIPBackbone": _towers(
        "sig_lip",
        "self_attn",
        ("mlp/fc1", "mlp/fc2"),
        others={
            "vision_model.head.mlp.fc1": "sig_lip_vision_encoder/head/mlp/fc1",
            "vision_model.head.mlp.fc2": "sig_lip_vision_encoder/head/mlp/fc2",
        },
    ),
    "T5Backbone": _t5,
    "ViTBackbone": _VIT,
    "WhisperBackbone": _WHISPER,
    "XLMRobertaBackbone": _ROBERTA,
}
