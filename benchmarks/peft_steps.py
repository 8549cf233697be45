"""Training steps on PyTorch by PEFT and by this package, in seconds.

For `benchmarks.beside_peft`, which runs it in an environment with PEFT. Both
adapt the same blocks by the same method, in one process, and take turns:

    python -m benchmarks.peft_steps ROUNDS

Where there is a GPU, both are on it.
"""

import functools
import json
import sys
import time

import peft
import torch

import keras_fvae
from benchmarks import keras_blocks
from benchmarks.beside_peft import NO_METHOD
from benchmarks.keras_blocks import BATCH_SIZE
from benchmarks.keras_blocks import NUM_BLOCKS
from benchmarks.keras_blocks import NUM_HEADS
from benchmarks.keras_blocks import NUM_TOKENS
from benchmarks.keras_blocks import RANK
from benchmarks.keras_blocks import WIDTH

COMMON = {"r": RANK, "target_modules": ["query", "value"]}
# By method: ours, and PEFT's.
CONFIGS = {
    "LoRA": (keras_fvae.LoRAConfig, lambda: lora()),
    "rsLoRA": (keras_fvae.RSLoRAConfig, lambda: lora(use_rslora=True)),
    "PiSSA": (
        keras_fvae.PiSSAConfig,
        lambda: lora(init_lora_weights="pissa"),
    ),
    "OLoRA": (
        keras_fvae.OLoRAConfig,
        lambda: lora(init_lora_weights="olora"),
    ),
    "DoRA": (keras_fvae.DoRAConfig, lambda: lora(use_dora=True)),
    "HiRA": (keras_fvae.HiRAConfig, lambda: peft.HiraConfig(**COMMON)),
    # Without the allocation of ranks between steps.
    "AdaLoRA": (
        keras_fvae.AdaLoRAConfig,
        lambda: peft.AdaLoraConfig(
            init_r=RANK,
            target_r=RANK // 2,
            total_step=1000,
            lora_alpha=RANK,
            target_modules=COMMON["target_modules"],
        ),
    ),
}
SHAPE = BATCH_SIZE, NUM_TOKENS, WIDTH
# As Keras does.
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")


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


def make_blocks():
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*[Block() for _ in range(NUM_BLOCKS)])
    return blocks.requires_grad_(False)


def models():
    """What is timed, by method and then by whose it is.

    Each is a function of the input, and the parameters that train. The blocks
    without a method show what is of Keras's layers, and not of adapters.
    """
    ours = functools.partial(keras_blocks.make_blocks(), training=True)
    pairs = {
        NO_METHOD: {"ours": shifted(ours), "PEFT": shifted(make_blocks())},
    }
    for method, (our_config, their_config) in CONFIGS.items():
        ours = keras_blocks.make(our_config(RANK))
        theirs = peft.get_peft_model(make_blocks(), their_config())
        pairs[method] = {
            "ours": (
                functools.partial(ours, training=True),
                [weight.value for weight in ours.trainable_weights],
            ),
            "PEFT": (
                theirs,
                [p for p in theirs.parameters() if p.requires_grad],
            ),
        }
    return pairs


def shifted(blocks):
    """Frozen blocks, and a shift of their input that trains."""
    shift = torch.nn.Parameter(torch.zeros(WIDTH))
    return lambda x: blocks(x + shift), [shift]


def take_steps(pairs, rounds):
    """The seconds of each step, one a round, by method and whose it is."""
    x, target = torch.randn(SHAPE), torch.randn(SHAPE)
    steps = {
        (method, side): make_step(model, trained, x, target)
        for method, sides in pairs.items()
        for side, (model, trained) in sides.items()
    }
    for step in steps.values():
        step()
    seconds = {method: {"ours": [], "PEFT": []} for method in pairs}
    for number in range(rounds):
        # Each is first as often as it is last.
        for method, side in [*steps][:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            steps[method, side]()
            seconds[method][side].append(time.perf_counter() - begin)
    return seconds


def make_step(model, trained, x, target):
    optimizer = torch.optim.AdamW(trained, 1e-3)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


if __name__ == "__main__":
    print(json.dumps(take_steps(models(), int(sys.argv[1]))))
