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
# # Many tasks on one base model, and the ways out
#
# An adapter is a value: one base model stays in memory, and each task is put
# into it by one call. This guide trains two tasks, switches between them, and
# then goes through what leaves the program: adapter files, whole models on
# another backend, merged models, SavedModel, LiteRT, ONNX and `.pt2`, and
# directories of PEFT.
#
# It runs on any machine, in a minute or two: a small vision transformer that
# knows scikit-learn's digits.

# %%
import importlib.util
import os
import subprocess
import sys

# "jax", "tensorflow" or "torch".
os.environ.setdefault("KERAS_BACKEND", "jax")

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    # More than one backend, for the way from one to another.
    extras = "keras-fvae[hub,analysis,jax,tensorflow,torch]"
    subprocess.run([*pip, extras], check=True)

import pathlib
import time

import keras
import keras_hub
import numpy as np
import sklearn.datasets

import keras_fvae

BACKEND = keras.config.backend()

# %% [markdown]
# ## One base model
#
# Pretrained on all ten digits. Both tasks will have two classes, so that one
# head fits both.

# %%
digits = sklearn.datasets.load_digits()
pictures = np.repeat(digits.images[..., None] / 16, 3, axis=-1)
pictures = pictures.astype("float32")
TASKS = {
    "odd": digits.target % 2,
    "at least five": (digits.target >= 5).astype("int64"),
}
TRAIN, TEST = slice(900, 1350), slice(1350, None)


def make_classifier(num_classes):
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone, num_classes=num_classes, preprocessor=None, pooling="gap"
    )


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
keras.utils.set_random_seed(0)
pretrained = make_classifier(10)
pretrained.compile(keras.optimizers.AdamW(2e-3), loss)
pretrained.fit(
    pictures[:900], digits.target[:900], batch_size=32, epochs=30, verbose=0
)
model = make_classifier(2)
model.backbone.set_weights(pretrained.backbone.get_weights())

# %% [markdown]
# ## Two tasks
#
# Each is trained, taken as a value, and taken off again. The head goes along,
# because it was trained; each task begins with the same one.


# %%
def train(model, y, config):
    keras.utils.set_random_seed(0)
    model.backbone.enable_adapter(config)
    model.compile(
        keras.optimizers.AdamW(1e-2, global_clipnorm=1.0),
        loss,
        metrics=["accuracy"],
    )
    model.fit(pictures[TRAIN], y[TRAIN], batch_size=32, epochs=15, verbose=0)


config = keras_fvae.FVAELoRAConfig(rank=8)
start = model.get_weights()
tasks = {}
for name, y in TASKS.items():
    train(model, y, config)
    tasks[name] = keras_fvae.get_adapter(model)
    keras_fvae.remove_adapter(model)
    model.set_weights(start)
print(tasks["odd"])

# %% [markdown]
# ## Switch
#
# The first `set_adapter` adapts the plain model. The others assign weights, and
# compile nothing.

# %%
keras_fvae.set_adapter(model, tasks["odd"])
model.compile(loss=loss, metrics=["accuracy"])
for _ in range(2):
    for name, state in tasks.items():
        begin = time.perf_counter()
        keras_fvae.set_adapter(model, state)
        milliseconds = 1000 * (time.perf_counter() - begin)
        accuracy = model.evaluate(pictures[TEST], TASKS[name][TEST], verbose=0)[
            1
        ]
        print(f"{name:<15}{accuracy:.3f}   switched in {milliseconds:.1f} ms")

# %% [markdown]
# ## Files
#
# One safetensors file for each task. `include="inference"` leaves out what
# training alone needs; a model that it is put onto is finalized.

# %%
keras_fvae.set_adapter(model, tasks["odd"])
expected = model.predict(pictures[TEST], verbose=0)

tasks["odd"].save("odd.safetensors")
small = keras_fvae.get_adapter(model, include="inference")
small.save("odd_inference.safetensors")
for name in ("odd.safetensors", "odd_inference.safetensors"):
    print(name, f"{os.path.getsize(name) / 1e3:.0f} kB")
print(keras_fvae.read_adapter("odd.safetensors"))

# %% [markdown]
# ## To another backend
#
# What one backend has trained, the others read, adapter files and whole models
# alike. Here a process with another backend loads the model, which needs
# nothing but an import of `keras_fvae`, and then puts the other task into it.

# %%
model.save("odd.keras")
tasks["at least five"].save("at_least_five.safetensors")
np.save("pictures.npy", pictures[TEST])
pathlib.Path("elsewhere.py").write_text("""
import keras
import numpy as np
import keras_fvae

model = keras.saving.load_model("odd.keras")
pictures = np.load("pictures.npy")
np.save("odd.npy", model.predict(pictures, verbose=0))
keras_fvae.load_adapter(model, "at_least_five.safetensors")
np.save("at_least_five.npy", model.predict(pictures, verbose=0))
print("predicted on", keras.config.backend())
""")
other = "jax" if BACKEND == "tensorflow" else "tensorflow"
result = subprocess.run(
    [sys.executable, "elsewhere.py"],
    env={**os.environ, "KERAS_BACKEND": other},
    capture_output=True,
    text=True,
    check=True,
)
print(result.stdout.splitlines()[-1])
np.testing.assert_allclose(np.load("odd.npy"), expected, atol=1e-4)

# %% [markdown]
# ## For use alone: finalize
#
# The second latent, the decoder and the variance go. The rest predicts the
# same, and cannot be trained any more.

# %%
parameters = model.count_params()
keras_fvae.finalize_adapter(model)
print(f"{parameters:,} parameters before, {model.count_params():,} now")
np.testing.assert_allclose(
    model.predict(pictures[TEST], verbose=0), expected, atol=1e-5
)

# %% [markdown]
# ## Nothing left of it: merge
#
# Every method but MoE-LoRA merges into the kernels, FVAE-LoRA if it was trained
# with `encoder_units=()`: its update is a linear function of the input then.
# (Linear encoders learned texts by heart in the project's comparison: take them
# if you must merge.)
#
# First, while the adapters are there, they go to PEFT, as the LoRA that such an
# update is; its offset becomes the bias of B. PEFT reads that, for a base model
# that came from Hugging Face. LoRA, DoRA and others are written as themselves,
# and `load_peft_adapter` reads them again.

# %%
keras_fvae.remove_adapter(model)
model.set_weights(start)
train(model, TASKS["odd"], keras_fvae.FVAELoRAConfig(8, encoder_units=()))
expected = model.predict(pictures[TEST], verbose=0)

keras_fvae.save_peft_adapter(model, "peft", as_lora=True)
print(sorted(path.name for path in pathlib.Path("peft").iterdir()))

# %%
parameters = model.count_params()
keras_fvae.merge_adapter(model)
print(f"{parameters:,} parameters before, {model.count_params():,} now")
merged = model.predict(pictures[TEST], verbose=0)
np.testing.assert_allclose(merged, expected, atol=1e-4)

# %% [markdown]
# ## Export
#
# `model.export` works as for any Keras model, merged, finalized or neither. JAX
# and TensorFlow write a SavedModel, which TensorFlow Serving takes.

# %%
if BACKEND in ("jax", "tensorflow"):
    import tensorflow as tf

    model.export("served", verbose=False)
    served = tf.saved_model.load("served")
    outputs = served.serve(pictures[TEST]).numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)

# %% [markdown]
# LiteRT, once TensorFlow Lite, runs on phones and small devices. Keras writes
# it on TensorFlow, and on PyTorch by the package `litert-torch` and for batches
# of a fixed size, but not on JAX: load the `.keras` file on TensorFlow. The
# interpreter of TensorFlow, which runs the file here, warns that the one of the
# package `ai_edge_litert` is to take its place.

# %%
if BACKEND == "tensorflow":
    model.export("model.tflite", format="litert", verbose=False)
    interpreter = tf.lite.Interpreter("model.tflite")
    served = interpreter.get_signature_runner()
    [outputs] = served(images=pictures[TEST]).values()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)

# %% [markdown]
# PyTorch writes a file of `torch.export`, here for batches of 1 to 1024
# pictures.

# %%
if BACKEND == "torch":
    import torch

    batch = torch.export.Dim("batch", min=1, max=1024)
    model.export(
        "model.pt2", format="torch", verbose=False, dynamic_shapes={0: batch}
    )
    served = torch.export.load("model.pt2").module()
    outputs = served(torch.tensor(pictures[TEST])).detach().numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)

# %% [markdown]
# `model.export("model.onnx", format="onnx")` writes ONNX: on PyTorch by its own
# exporter, on TensorFlow by the package `tf2onnx`, on JAX by `jax2onnx`.
# Whether they can is a question of the base model's layers, not of the
# adapters: attention and dense layers go through, but of this vision
# transformer `tf2onnx` 1.17 does not know the GELU, and PyTorch 2.13 stops at
# the layer normalization. What one backend cannot export, another one may: load
# the `.keras` file there.
