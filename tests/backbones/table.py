"""The table of `docs/supported_backbones.md`: what is adapted by default.

To write it anew: `make table`.
"""

import collections
import contextlib

import keras

import keras_fvae
from backbones import BACKBONES
from keras_fvae.backend import keras_internals
from keras_fvae.model import targets
from keras_fvae.model.tree import LayerTree

HEADER = """\
# KerasHub's backbones

What `backbone.enable_fvae_lora()` adapts, without arguments, in each backbone
of KerasHub: the projections to queries and values of every attention layer,
as `attention layer`: `projections`, and how many layers that is at the size at
which the test makes the model, mostly two blocks; then how many convolutions
`target_layer_names="all-conv"` adapts there, and how many of these are of size
1, which are those that FVAE-LoRA takes.

A test makes each of these backbones, at the smallest size, and checks that the
row is true; that predictions are at first what they were; that a step of `fit`
has a finite loss and moves the adapters alone; and that a file of the adapters,
loaded onto the base model, gives the same predictions. This runs on PyTorch;
for rows with a star on JAX and TensorFlow, too; for rows with two stars, which
PyTorch would need another package for or KerasHub cannot make or train there,
on TensorFlow.

| Backbone | Adapted by default | Layers | Convolutions | Of size 1 |
|---|---|---:|---:|---:|
"""

FOOTER = """
Backbones that adapt nothing by default raise a `ValueError`, which lists the
layers that `target_layer_names` can take, and says what FVAE-LoRA does not fit,
or that `"all-conv"` is the way. Convolutions in several groups of channels, as
in MobileNet, depthwise, separable and transposed ones cannot be adapted, and
are not counted. The `Dense` layers of a task around a convolutional backbone
can be named.

- Vision encoders: MobileNetV5's attention, also within Gemma 3n, is made of
  convolutions, which `"all-conv"` adapts. Gemma 4 reads the kernels of its
  vision encoder's projections past the layers that hold them, so that an
  adapter there would do nothing.
- BASNet does not call the first convolution of its image encoder, so that an
  adapter there does nothing.
- Gemma 4's audio encoder wraps its projections in layers that clip. They can be
  adapted by `target_layer_names=re.compile("attn_[qv]_proj")`.
- SAM's mask decoder belongs to the task. Adapt `SAMImageSegmenter` as a whole,
  by `keras_fvae.enable_fvae_lora(segmenter)`, and it is adapted, too.
- Where one layer projects to queries, keys and values, the update is of all
  three. In Flux's single-stream blocks the first layer of the MLP is part of
  it.
- RWKV-7 has receptances for queries. FNet mixes tokens by Fourier transforms.
"""

# On PyTorch KerasHub cannot make T5 encoders for Stable Diffusion, `fit` cannot
# build Qwen 3.5 with images, and SAM 3 takes `torchvision`.
TENSORFLOW_ALONE = (
    "Qwen3_5Backbone",
    "Qwen3_5MoeBackbone",
    "SAM3PromptableConceptBackbone",
    "StableDiffusion3Backbone",
)
# Convolutions that a backbone holds and leaves out.
NOT_CALLED = [("BASNetBackbone", "conv1_conv")]
SAMPLE = (
    "AlbertBackbone",
    "BartBackbone",
    "FluxBackbone",
    "Gemma3Backbone",
    "MiTBackbone",
    "MixtralBackbone",
    "SwinTransformerBackbone",
    "WhisperBackbone",
)


def row(name, model):
    """The row of an adapted model, or of one with nothing to adapt."""
    projections = collections.defaultdict(set)
    tree = LayerTree(model)
    for layer in tree.adapted:
        # The innermost.
        holder = min(tree.ancestors([layer]), key=_num_layers)
        projections[type(holder).__name__].add(_called(layer, holder))
    cell = "; ".join(
        f"`{holder}`: {', '.join(f'`{name}`' for name in sorted(names))}"
        for holder, names in sorted(projections.items())
    )
    stars = "*" * (name in SAMPLE) + "**" * (name in TENSORFLOW_ALONE)
    return (
        f"| `{name}`{stars} | {cell or 'nothing'} | {len(tree.adapted)} | "
        f"{len(convolutions(model))} | {len(fvae_convolutions(model))} |"
    )


def convolutions(model):
    """List of the layers that `"all-conv"` adapts of a backbone."""
    try:
        pairs = targets.find_targets(
            model, keras_fvae.LoRAConfig(), targets.ALL_CONV
        )
    except ValueError:
        return []
    return [layer for layer, _ in pairs]


def fvae_convolutions(model):
    """List of those that FVAE-LoRA fits."""
    return [
        layer
        for layer in convolutions(model)
        if keras_fvae.FVAELoRAConfig().why_not(layer) is None
    ]


def _num_layers(holder):
    return len(keras_internals.flatten_layers(holder))


def _called(layer, holder):
    """The layer's name, or where it has none that of its attribute."""
    names = [name.split(".")[-1] for name in targets.QUERY_AND_VALUE_NAMES]
    if layer.name in names:
        return layer.name
    return next(n for n in names if getattr(holder, n, None) is layer)


def main():
    print(HEADER, end="")
    for name in sorted(BACKBONES, key=str.lower):
        keras.utils.clear_session()
        model = BACKBONES[name]()
        with contextlib.suppress(ValueError):
            keras_fvae.enable_fvae_lora(model)
        print(row(name, model))
    print(FOOTER, end="")


if __name__ == "__main__":
    main()
