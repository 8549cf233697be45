"""The models that are timed, and how each method adapts them."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import keras_hub
import numpy as np

import keras_fvae
from keras_fvae.backend import keras_internals


def is_query_or_value(layer):
    return layer.name in ("query", "value") and hasattr(layer, "kernel")


def is_convolution(layer):
    return isinstance(layer, keras.layers.Conv2D)


def is_pointwise(layer):
    return is_convolution(layer) and layer.kernel_size == (1, 1)


@dataclasses.dataclass(frozen=True)
class Size:
    kind: str
    width: int
    num_blocks: int
    batch_size: int
    # The side of an image, or the length of a text.
    length: int
    # Function of a layer, whether every method adapts it.
    is_target: Callable = is_query_or_value

    @property
    def num_tokens(self):
        """Integer, tokens in a sequence."""
        if self.kind == "vit":
            return (self.length // 16) ** 2 + 1
        return self.length


WIDTHS = (512, 1024, 2048)
# Blocks of a narrow ViT: two adapted layers each.
DEPTHS = (1, 24)
SIZES = {
    **{
        f"Llama block, width {width}": Size("llama", width, 1, 2, 256)
        for width in WIDTHS
    },
    **{
        f"narrow ViT, {depth} blocks": Size("vit", 192, depth, 8, 112)
        for depth in DEPTHS
    },
    "ViT-B/16, 4 blocks": Size("vit", 768, 4, 8, 224),
    "ViT-B/16, 12 blocks": Size("vit", 768, 12, 8, 224),
    # The first two of ResNet-50's four stacks, each of as many blocks.
    "ResNet": Size("resnet", 64, 2, 16, 96, is_convolution),
    "ResNet, size 1": Size("resnet", 64, 2, 16, 96, is_pointwise),
    "tiny": Size("vit", 64, 1, 2, 32),
    "tiny ResNet": Size("resnet", 64, 1, 2, 16, is_pointwise),
    # Those of `benchmarks.device`.
    **{
        f"ViT-B/16, {depth} blocks, batch 64": Size("vit", 768, depth, 64, 224)
        for depth in (3, 6, 12)
    },
    "BERT-base, batch 64": Size("bert", 768, 12, 64, 128),
    "Llama 3, 1 block, batch 8": Size("llama3", 4096, 1, 8, 1024),
    "Llama 3, 2 blocks, batch 8": Size("llama3", 4096, 2, 8, 1024),
    "tiny, 2 blocks": Size("vit", 64, 2, 2, 32),
    "tiny BERT": Size("bert", 64, 1, 2, 8),
    "tiny Llama": Size("llama3", 512, 1, 1, 8),
}


def make(size):
    """A task of that size, its inputs and targets."""
    keras.utils.set_random_seed(0)
    makers = {"vit": make_vit, "bert": make_bert, "resnet": make_resnet}
    return makers.get(size.kind, make_llama)(size, np.random.default_rng(0))


def make_vit(size, rng):
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(size.length, size.length, 3),
        patch_size=16,
        num_layers=size.num_blocks,
        num_heads=size.width // 64,
        hidden_dim=size.width,
        mlp_dim=4 * size.width,
    )
    task = keras_hub.models.ViTImageClassifier(
        backbone, num_classes=10, preprocessor=None
    )
    return task, *make_images(size, rng)


def make_images(size, rng):
    shape = (size.batch_size, size.length, size.length, 3)
    images = rng.normal(size=shape).astype("float32")
    return images, np.arange(size.batch_size) % 10


def make_resnet(size, rng):
    backbone = keras_hub.models.ResNetBackbone(
        image_shape=(size.length, size.length, 3),
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[size.width, 2 * size.width],
        stackwise_num_blocks=[size.num_blocks, size.num_blocks],
        stackwise_num_strides=[1, 2],
        block_type="bottleneck_block",
    )
    task = keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=10, preprocessor=None
    )
    return task, *make_images(size, rng)


def make_bert(size, rng):
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=30522,
        num_layers=size.num_blocks,
        num_heads=size.width // 64,
        hidden_dim=size.width,
        intermediate_dim=4 * size.width,
    )
    task = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    inputs = make_tokens(size, rng)
    inputs["segment_ids"] = np.zeros_like(inputs["token_ids"])
    return task, inputs, np.arange(size.batch_size) % 2


def make_llama(size, rng):
    """Of kind "llama3", with the heads of Llama 3, which is a bit wider."""
    if size.kind == "llama3":
        num_heads = size.width // 128
        # Four heads share a key and a value.
        num_key_value_heads = num_heads // 4
        intermediate_dim = 7 * size.width // 2
    else:
        num_heads = num_key_value_heads = size.width // 64
        intermediate_dim = 11 * size.width // 4
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=1000,
        num_layers=size.num_blocks,
        num_query_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        hidden_dim=size.width,
        intermediate_dim=intermediate_dim,
    )
    task = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    inputs = make_tokens(size, rng)
    return task, inputs, np.roll(inputs["token_ids"], -1, axis=1)


def make_tokens(size, rng):
    token_ids = rng.integers(1, 1000, (size.batch_size, size.length))
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


NUM_EXPERTS = 4


def experts(rank):
    """MoE-LoRA with as many ranks in all as the others have."""
    return keras_fvae.MoELoRAConfig(
        rank // NUM_EXPERTS, num_experts=NUM_EXPERTS, top_k=NUM_EXPERTS // 2
    )


# Of our own, beside KerasHub's LoRA.
CONFIGS = {
    "LoRA on x": keras_fvae.LoRAConfig,
    "rsLoRA": keras_fvae.RSLoRAConfig,
    "FFA-LoRA": keras_fvae.FFALoRAConfig,
    "PiSSA": keras_fvae.PiSSAConfig,
    "OLoRA": keras_fvae.OLoRAConfig,
    "SRLoRA": lambda rank: keras_fvae.SRLoRAConfig(rank, num_fused=rank),
    "DoRA": keras_fvae.DoRAConfig,
    "HiRA": keras_fvae.HiRAConfig,
    "AdaLoRA": keras_fvae.AdaLoRAConfig,
    "BeamLoRA": keras_fvae.BeamLoRAConfig,
    "DropLoRA": keras_fvae.DropLoRAConfig,
    "MoE-LoRA": experts,
    "Flat-LoRA": keras_fvae.FlatLoRAConfig,
}


# What else they train with.
CALLBACKS = {
    # Of ten times in a training that a rank starts anew, no timed step is one.
    "SRLoRA": functools.partial(keras_fvae.SRLoRARestarter, interval=1000),
    "AdaLoRA": keras_fvae.AdaLoRAAllocator,
    "BeamLoRA": keras_fvae.BeamLoRAPruner,
    "Flat-LoRA": keras_fvae.FlatLoRASchedule,
}


def targets(task, size):
    """The layers that every method adapts."""
    return [
        layer
        for layer in keras_internals.flatten_layers(task.backbone)
        if size.is_target(layer)
    ]


def enable_lora(task, rank, size):
    """KerasHub's LoRA, which is Keras's own of each layer."""
    names = {layer.name for layer in targets(task, size)}
    task.backbone.enable_lora(rank, sorted(names))


def enable_method(task, rank, size, method):
    keras_fvae.enable_adapter(
        task.backbone, CONFIGS[method](rank), size.is_target
    )


def enable_fvae_lora(task, rank, size, then=None, **options):
    task.backbone.enable_fvae_lora(
        rank=rank, target_layer_names=size.is_target, **options
    )
    if then is not None:
        then(task.backbone)


def freeze(task, rank, size):
    """Leaves the head to train: of a language model, the output embeddings."""
    task.backbone.trainable = False
    if isinstance(task, keras_hub.models.CausalLM):
        embedding = task.backbone.token_embedding
        embedding.trainable = True
        embedding.embeddings.trainable = False


# What trains, and what only predicts.
TRAINING_METHODS = {
    "full fine-tuning": lambda task, rank, size: None,
    "LoRA": enable_lora,
    **{
        method: functools.partial(enable_method, method=method)
        for method in CONFIGS
    },
    "FVAE-LoRA": enable_fvae_lora,
    "rematerialized": functools.partial(enable_fvae_lora, rematerialize=True),
}
METHODS = {
    **TRAINING_METHODS,
    "base": freeze,
    "finalized": functools.partial(
        enable_fvae_lora, then=keras_fvae.finalize_adapter
    ),
    "merged": functools.partial(
        enable_fvae_lora, then=keras_fvae.merge_adapter, encoder_units=()
    ),
}
# What `benchmarks.device` measures: the head alone, and what else trains.
DEVICE_METHODS = ("base", *TRAINING_METHODS)


def make_adapted(size, method, rank, jit_compile="auto"):
    """A compiled task that a method has adapted, its inputs and targets."""
    task, x, y = make(size)
    METHODS[method](task, rank, size)
    task.compile(
        keras.optimizers.AdamW(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return task, x, y
