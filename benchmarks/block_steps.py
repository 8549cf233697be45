"""Steps of blocks of ViT-B/16's size on PyTorch, whoever made them."""

import json
import time

import torch

NUM_BLOCKS, BATCH_SIZE, NUM_TOKENS, WIDTH, NUM_HEADS = 4, 8, 197, 768, 12
RANK = 16


def take_steps(models, rounds):
    """Prints the seconds of each model's steps, all in turns.

    Args:
        models: Dict of name to a function of inputs, and the parameters that
            train.
        rounds: Integer.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, NUM_TOKENS, WIDTH)
    x, target = (torch.randn(shape, generator=generator) for _ in range(2))
    optimizers = {
        name: torch.optim.AdamW(trained, 1e-3)
        for name, (_, trained) in models.items()
    }

    def step(name):
        begin = time.perf_counter()
        optimizers[name].zero_grad()
        loss = torch.nn.functional.mse_loss(models[name][0](x), target)
        loss.backward()
        optimizers[name].step()
        loss.item()
        return time.perf_counter() - begin

    seconds = {name: [] for name in models}
    for name in models:
        step(name)
    for number in range(rounds):
        # Each is first as often as it is last.
        for name in [*models][:: 1 if number % 2 else -1]:
            seconds[name].append(step(name))
    print(json.dumps(seconds))
