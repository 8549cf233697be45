# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # FVAE-LoRA on many devices
#
# A model that outgrows one device goes where Keras takes it: to a mesh of
# devices by `keras.distribution` on JAX, to the replicas of a `tf.distribute`
# strategy on TensorFlow, to the workers of `torchrun` on PyTorch. Adapters
# follow. This guide shows what that means: what is sharded and why, what is
# saved by whom, and what it all takes on each device.
#
# It runs on any machine: the devices are parts of the CPU.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    extras = "keras-fvae[hub,jax,tensorflow,torch]"
    subprocess.run([*pip, extras], check=True)

# %% [markdown]
# All of these must be set before JAX starts. With real accelerators, leave the
# last two out.

# %%
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import pathlib

import keras
import keras_hub
import numpy as np

import keras_fvae

print(keras.distribution.list_devices())

# %% [markdown]
# ## A task
#
# To go on with a text, byte by byte. The texts are docstrings; the model has
# the architecture of Llama, a few units, and random weights in the place of
# pretrained ones. All of it stands in a file of its own, since other processes
# will need it, too.

# %%
pathlib.Path("task.py").write_text("""
import pydoc

import keras
import keras_hub
import numpy as np

LENGTH = 32


def docstrings(name):
    for member in vars(pydoc.locate(name)).values():
        if callable(member) and member.__doc__:
            yield member.__doc__.encode()


texts = [*docstrings("logging"), *docstrings("asyncio")]
texts = [[*text[: LENGTH + 1]] for text in texts if len(text) > LENGTH]
texts = np.array(texts[:48])
x = {
    "token_ids": texts[:, :-1],
    "padding_mask": np.ones_like(texts[:, :-1]),
}
y = texts[:, 1:]
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_model(seed=0):
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=256,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
    )
    return keras_hub.models.LlamaCausalLM(backbone)
""")
sys.path.insert(0, ".")

from task import loss_of
from task import make_model
from task import texts
from task import x
from task import y

print(len(texts), "texts, for example:", bytes(texts[0].tolist()))

# %% [markdown]
# ## One device


# %%
def train(model):
    model.compile(keras.optimizers.AdamW(5e-3), loss_of)
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    return history.history["loss"]


model = make_model()
model.backbone.enable_fvae_lora(rank=8, seed=0)
alone = train(model)
print(alone)

# %% [markdown]
# ## Every device has the model, and a part of each batch
#
# One line more than before, the one that sets the distribution.

# %%
keras.distribution.set_distribution(keras.distribution.DataParallel())

model = make_model()
model.backbone.enable_fvae_lora(rank=8, seed=0)
losses = train(model)
print(losses)
np.testing.assert_allclose(losses, alone, rtol=1e-3)

# %% [markdown]
# The losses are those of one device: the objective is a mean over the tokens of
# the whole batch, wherever they are, and each token gets the noise that it got
# before.
#
# ## A mesh: the model is in parts, too
#
# KerasHub knows how to cut its larger models up. Here each batch is shared
# between two rows of devices, and the weights among the four of each row.

# %%
mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
layout_map = keras_hub.models.LlamaBackbone.get_layout_map(mesh)
distribution = keras.distribution.ModelParallel(
    layout_map=layout_map, batch_dim_name="batch"
)
keras.distribution.set_distribution(distribution)

model = make_model()
model.backbone.enable_fvae_lora(rank=8, seed=0)
losses = train(model)
print(losses)
np.testing.assert_allclose(losses, alone, rtol=1e-3)

# %% [markdown]
# Every adapter lies as the kernel that it adapts:


# %%
def show_layouts(model):
    for weight in model.weights:
        if "layer_0/self_attention/query" in weight.path:
            _, name = weight.path.split("self_attention/")
            axes = str(tuple(weight.value.sharding.spec))
            print(f"{name:<36}{tuple(weight.shape)!s:<14}{axes}")


show_layouts(model)

# %% [markdown]
# The kernel is of shape (width, heads, width of a head). KerasHub cuts its
# inputs along "model" and its heads along "batch". So:
#
# - **B**, of shape (rank, outputs), is cut along "batch", as the outputs are.
#   What it adds is where the kernel's result is.
# - **`feature_weights`**, with a row for each input, is cut along "model". It
#   holds what grows with the width of the model: the encoders' first layer and
#   the decoder's last. A device has those rows for which it has the inputs'
#   rows of the kernel.
# - **`latent_weights`**, all that does not grow with the model, is on every
#   device. To share some thousand numbers would cost more than to keep them.
#
# The optimizer's variables lie as the weights do.
#
# `enable_fvae_lora` does this unasked, whether it is called under the
# distribution or before it is set. To see it in the layout map, or to say
# otherwise, extend the map:

# %%
layout_map = keras_fvae.adapter_layout_map(
    keras_hub.models.LlamaBackbone.get_layout_map(mesh)
)
layout_map[".*query/adapter/kernel_b"] = (None, None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
)
other = make_model()
other.backbone.enable_fvae_lora(rank=8)
show_layouts(other)
print([path for path in layout_map if "layer_0" in path and "value" in path])

# %% [markdown]
# ## Save and load
#
# A file knows of no devices: from a mesh to one device, or to another mesh.

# %%
model.backbone.save_adapter("text.safetensors")
expected = model.predict(x, verbose=0)

keras.distribution.set_distribution(None)
one = make_model()
one.backbone.load_adapter("text.safetensors")
np.testing.assert_allclose(one.predict(x, verbose=0), expected, atol=1e-4)

# %% [markdown]
# ## What it takes on each device
#
# `memory_per_device` counts it from the shapes: it makes the model, but none of
# its variables gets a value, and the devices need not be there. This is
# Llama 3 with 8 billion weights in bfloat16, with Adam, on one device and on
# eight.

# %%
LLAMA_3_8B = {
    "vocabulary_size": 128256,
    "num_layers": 32,
    "num_query_heads": 32,
    "num_key_value_heads": 8,
    "hidden_dim": 4096,
    "intermediate_dim": 14336,
    "dtype": "bfloat16",
}
METHODS = {
    "full fine-tuning": lambda backbone: None,
    "KerasHub's LoRA": lambda backbone: backbone.enable_lora(16),
    "FVAE-LoRA": lambda backbone: backbone.enable_fvae_lora(rank=16),
}
Llama = keras_hub.models.Llama3Backbone
mesh = keras.distribution.DeviceMesh(
    (1, 8), ("batch", "model"), devices=[f"gpu:{i}" for i in range(8)]
)
distribution = keras.distribution.ModelParallel(
    layout_map=Llama.get_layout_map(mesh), batch_dim_name="batch"
)


def count(method, distribution):
    def make_large():
        backbone = Llama(**LLAMA_3_8B)
        METHODS[method](backbone)
        return backbone

    return keras_fvae.memory_per_device(make_large, distribution)


print(count("FVAE-LoRA", distribution))
print()
print("GiB on each device      one      eight")
for method in METHODS:
    memories = [count(method, where) for where in (None, distribution)]
    sizes = "".join(f"{memory.total / 2**30:>9.2f}" for memory in memories)
    print(f"{method:<18}{sizes}")

# %% [markdown]
# Of the frozen weights 0.86 GiB more than an eighth stay on each device, since
# KerasHub's map leaves the embedding for the output whole. The matrices of LoRA
# match none of its patterns, so every device keeps all of them and trains them.
#
# Activations come on top, which grow with the batch; `rematerialize=True` keeps
# nothing of the autoencoders for the gradient, but computes them once more.
#
# ## Several processes
#
# On several machines, each runs the same program; Keras connects them, and has
# them agree on a seed, so that all draw the same weights. Here each process
# brings its own part of every batch. (With `auto_shard_dataset=True`, the
# default, Keras would share out the batches of a `tf.data.Dataset`.)
#
# Every process calls `save`, and the first one writes. Every process calls
# `load`, and gets what the first one reads: the others need not see its disk.

# %%
pathlib.Path("processes.py").write_text("""
import os
import sys

process = int(sys.argv[1])
os.environ["KERAS_BACKEND"] = "jax"
# With real accelerators, leave this out.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras

# Before JAX looks for devices: the address of the first process, how many
# there are, and which one this is.
keras.distribution.initialize("127.0.0.1:29500", 2, process)

import numpy as np
import keras_fvae
from task import loss_of, make_model, x, y

distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
keras.distribution.set_distribution(distribution)
model = make_model()
model.backbone.enable_fvae_lora(rank=8)
model.compile(keras.optimizers.AdamW(5e-3), loss_of)
x = {name: np.split(value, 2)[process] for name, value in x.items()}
y = np.split(y, 2)[process]
history = model.fit(x, y, batch_size=8, epochs=2, verbose=0)
model.backbone.save_adapter("processes.safetensors")
model.backbone.load_adapter("processes.safetensors")
print(history.history["loss"], distribution.num_processes, "processes")
""")
processes = [
    subprocess.Popen(
        [sys.executable, "processes.py", str(index)],
        stdout=subprocess.PIPE,
        text=True,
    )
    for index in range(2)
]
for process in processes:
    print(process.communicate()[0].splitlines()[-1])
    assert process.returncode == 0

# %% [markdown]
# ## TensorFlow
#
# Make and compile the model in the scope of a strategy. Each replica works on
# its part of the batch, and draws noise of its own. Where padding is uneven, a
# replica has more tokens that count than another; the objective is the mean
# over all of them, as on one device.

# %%
pathlib.Path("replicas.py").write_text("""
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf
import keras_fvae
from task import loss_of, make_model, x, y

# With real accelerators, leave this out, and take `MirroredStrategy()`.
[cpu] = tf.config.list_physical_devices("CPU")
halves = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, halves)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

with strategy.scope():
    model = make_model()
    model.backbone.enable_fvae_lora(rank=8)
    model.compile(keras.optimizers.AdamW(5e-3), loss_of)
history = model.fit(x, y, batch_size=16, epochs=2, verbose=0)
model.backbone.save_adapter("replicas.safetensors")
print(history.history["loss"], strategy.num_replicas_in_sync, "replicas")
""")


def run(*command):
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout.splitlines()[-1])


run("replicas.py")

# %% [markdown]
# ## PyTorch
#
# Keras leaves the loop to PyTorch, and `torchrun` starts it once for each
# worker. The adapters' loss is added by hand, as any other of `model.losses`.
# Every parameter that trains takes part in each step, so there is no need for
# `find_unused_parameters`, and only the gradients of those are exchanged.
#
# Each worker takes the mean over its own part of a batch, and PyTorch the mean
# of these: as for the task's loss, workers with few tokens count as much as
# those with many.

# %%
pathlib.Path("workers.py").write_text("""
import os

os.environ["KERAS_BACKEND"] = "torch"
# With real accelerators, leave this out.
os.environ["KERAS_TORCH_DEVICE"] = "cpu"

import torch
from torch.nn.parallel import DistributedDataParallel
import keras_fvae
from task import loss_of, make_model, texts

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
# With a seed for each, so that no two workers draw the same noise. Their
# weights are those of the first, which PyTorch gives to all.
model = make_model(seed=rank)
model.backbone.enable_fvae_lora(rank=8)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=5e-3
)
# Every other text is this worker's.
for batch in torch.as_tensor(texts)[rank::2].split(8):
    tokens = batch[:, :-1]
    x = {"token_ids": tokens, "padding_mask": torch.ones_like(tokens)}
    optimizer.zero_grad()
    loss = loss_of(batch[:, 1:], parallel(x, training=True))
    loss = loss + sum(model.losses)
    loss.backward()
    optimizer.step()
if rank == 0:
    model.backbone.save_adapter("workers.safetensors")
    size = torch.distributed.get_world_size()
    print(float(loss), size, "workers", flush=True)
torch.distributed.barrier()
# Taken down in order, gloo now and then waits for its own thread for ever.
os._exit(0)
""")
# On the command line: torchrun --standalone --nproc_per_node 2 workers.py
torchrun = ["-m", "torch.distributed.run", "--standalone"]
run(*torchrun, "--nproc_per_node", "2", "workers.py")
