"""Training steps of PEFT's methods on a ViT-B/16-like model, in seconds.

For `benchmarks.beside_peft`, which runs it in an environment with PEFT,
transformers and PyTorch alone:

    python benchmarks/peft_steps.py ROUNDS METHOD [METHOD ...]
"""

import json
import sys
import time

import peft
import torch
from transformers import ViTConfig
from transformers import ViTForImageClassification

# The sizes of "ViT-B/16, 4 blocks" in `benchmarks.models`.
NUM_BLOCKS, BATCH_SIZE, RANK = 4, 8, 16
COMMON = {
    "r": RANK,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["classifier"],
}
CONFIGS = {
    "LoRA": lambda: lora(),
    "rsLoRA": lambda: lora(use_rslora=True),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "DoRA": lambda: lora(use_dora=True),
    "HiRA": lambda: peft.HiraConfig(**COMMON),
}


def lora(**options):
    return peft.LoraConfig(lora_alpha=RANK, **COMMON, **options)


def make(method):
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=NUM_BLOCKS, num_labels=10)
    model = peft.get_peft_model(
        ViTForImageClassification(config), CONFIGS[method]()
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, 1e-3)


def step(model, optimizer, images, labels):
    begin = time.perf_counter()
    optimizer.zero_grad()
    logits = model(pixel_values=images).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    loss.item()
    return time.perf_counter() - begin


def main(rounds, methods):
    images = torch.randn(BATCH_SIZE, 3, 224, 224)
    labels = torch.arange(BATCH_SIZE) % 10
    models = {method: make(method) for method in methods}
    seconds = {method: [] for method in methods}
    for model in models.values():
        step(*model, images, labels)
    for number in range(rounds):
        # Each is first as often as it is last.
        for method in methods[:: 1 if number % 2 else -1]:
            seconds[method].append(step(*models[method], images, labels))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
