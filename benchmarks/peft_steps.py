"""Training steps of PEFT's methods on blocks of ViT-B/16's size, in seconds.

For `benchmarks.beside_peft`, which runs it in an environment with PEFT,
transformers and PyTorch alone:

    python benchmarks/peft_steps.py ROUNDS METHOD [METHOD ...]
"""

import sys

import peft
import torch
from block_steps import BATCH_SIZE
from block_steps import NUM_BLOCKS
from block_steps import NUM_HEADS
from block_steps import NUM_TOKENS
from block_steps import RANK
from block_steps import WIDTH
from block_steps import take_steps

COMMON = {"r": RANK, "target_modules": ["query", "value"]}
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


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.query = torch.nn.Linear(WIDTH, WIDTH)
        self.key = torch.nn.Linear(WIDTH, WIDTH)
        self.value = torch.nn.Linear(WIDTH, WIDTH)
        self.output = torch.nn.Linear(WIDTH, WIDTH)
        self.norm2 = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm1(x)
        shape = (BATCH_SIZE, NUM_TOKENS, NUM_HEADS, WIDTH // NUM_HEADS)
        query, key, value = (
            layer(y).reshape(shape).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.output(y.transpose(1, 2).reshape(x.shape))
        y = torch.nn.functional.gelu(self.up(self.norm2(x)))
        return x + self.down(y)


def make(method):
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*[Block() for _ in range(NUM_BLOCKS)])
    return peft.get_peft_model(blocks, CONFIGS[method]())


def main(rounds, methods):
    models = {}
    for method in methods:
        model = make(method)
        trained = [p for p in model.parameters() if p.requires_grad]
        models[method] = model, trained
    take_steps(models, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
