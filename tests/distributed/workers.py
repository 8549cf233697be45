"""One of two workers of PyTorch that train together, as `torchrun` starts it.

`distributed_test.py` runs it: `workers.py DIRECTORY`.
"""

import os
import pathlib
import sys

import keras
import numpy as np
import torch
from short_training import LABELS
from short_training import TOKENS
from short_training import make_adapted
from torch.nn.parallel import DistributedDataParallel

import keras_fvae


def main(directory):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = make_adapted()
    parallel = DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Every worker sees its half of each batch of eight.
    tokens = TOKENS.reshape(2, 2, 4, -1)[:, rank]
    labels = LABELS.reshape(2, 2, 4)[:, rank]
    losses = []
    for x, y in [*zip(tokens, labels)] * 2:
        optimizer.zero_grad()
        outputs = parallel(torch.as_tensor(x), training=True)
        loss = loss_of(torch.as_tensor(y), outputs) + sum(model.losses)
        loss.backward()
        optimizer.step()
        torch.distributed.all_reduce(loss.detach_())
        losses.append(float(loss) / 2)
    if rank == 0:
        keras_fvae.save_adapter(model, directory / "workers.safetensors")
        np.savez(
            directory / "workers.npz",
            losses=losses,
            exchanged=num_exchanged(parallel),
            trained=sum(p.numel() for p in parameters),
        )
    torch.distributed.barrier()
    # Taken down in order, gloo now and then waits for its own thread for ever.
    os._exit(0)


def num_exchanged(parallel):
    """How many numbers the buckets hold that go from worker to worker."""
    sizes = parallel._get_ddp_logging_data()["bucket_sizes"]
    return sum(int(size) for size in sizes.split(",")) // 4


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
