"""A process that takes a training step whenever it is asked to, on PyTorch.

For `benchmarks.peers`. It fine-tunes ViT-B/16 with 4 blocks and a head of ten
classes, by a method of this package or KerasHub, of PEFT or of the authors of
FVAE-LoRA, whose fork of PEFT is then the one that is imported:

    python -m benchmarks.peer_steps WHOSE METHOD BATCH_SIZE

It says that it is ready; then each line that it reads is answered by the
seconds of a step.
"""

import dataclasses
import sys
import time

import numpy as np
import torch

NUM_CLASSES, RANK = 10, 16
# As transformers calls the query and value projections of a ViT.
TARGETS = ["q_proj", "v_proj"]
LEARNING_RATE = 1e-3


def make_ours(method, batch_size):
    """The step of a KerasHub task."""
    import keras

    import keras_fvae
    from benchmarks import models

    size = dataclasses.replace(
        models.SIZES["ViT-B/16, 4 blocks"], batch_size=batch_size
    )
    published = keras_fvae.FVAELoRAConfig.from_paper
    methods = {
        "none": models.METHODS["base"],
        "LoRA": models.METHODS["LoRA on x"],
        "DoRA": models.METHODS["DoRA"],
        "HiRA": models.METHODS["HiRA"],
        "FVAE-LoRA": models.METHODS["FVAE-LoRA"],
        "FVAE-LoRA as published": lambda task, rank, size: (
            keras_fvae.enable_adapter(
                task.backbone, published(rank), size.is_target
            )
        ),
        "KerasHub's LoRA": models.METHODS["LoRA"],
    }
    task, x, y = models.make(size)
    methods[method](task, RANK, size)
    task.compile(
        keras.optimizers.AdamW(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return lambda: task.train_on_batch(x, y)


def make_theirs(method, batch_size):
    """The step of a ViT of transformers."""
    import peft
    import transformers

    config = transformers.ViTConfig(
        num_hidden_layers=4, num_labels=NUM_CLASSES, hidden_dropout_prob=0.0
    )
    model = transformers.ViTForImageClassification(config)
    common = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
    if method == "none":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    else:
        model = peft.get_peft_model(model, make_config(peft, method, common))
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(batch_size, 3, 224, 224)).astype("float32")
    inputs = {
        "pixel_values": torch.tensor(pictures),
        "labels": torch.arange(batch_size) % NUM_CLASSES,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE)
    model.train()

    def step():
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def make_config(peft, method, common):
    """PEFT's config of a method, or that of the authors' fork."""
    lora = {"r": RANK, "lora_alpha": RANK, **common}
    if method == "HiRA":
        return peft.HiraConfig(r=RANK, **common)
    if method in ("LoRA", "DoRA"):
        return peft.LoraConfig(use_dora=method == "DoRA", **lora)
    # Of the fork alone.
    from peft.tuners.fvae_peft.config import FVAEPEFTConfig

    return FVAEPEFTConfig(
        latent_dim=RANK,
        enc_num_of_layer=1,
        enc_hidden_layer=RANK,
        dec_num_of_layer=3,
        dec_hidden_layer=128,
        lambda_downstream=1000,
        **common,
    )


MAKERS = {"ours": make_ours, "PEFT": make_theirs, "authors": make_theirs}


def main(whose, method, batch_size):
    step = MAKERS[whose](method, int(batch_size))
    # The first one is longer.
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
