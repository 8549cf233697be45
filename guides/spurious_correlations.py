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
# # A spurious correlation, and what the latents say
#
# In training a colour goes with the label, and in use it does not. A model that
# leans on the colour is right in training and on average, and wrong for a group
# of pictures. FVAE-LoRA is made for this: z1, which drives the update, is to
# hold what the task needs, and z2 the rest.
#
# This guide trains LoRA and FVAE-LoRA on such data, measures them group by
# group, and looks into the latents. It runs on any machine, in two minutes or
# so, on PyTorch in some more: scikit-learn's digits and a vision transformer of
# four small blocks.

# %%
import importlib.util
import os
import subprocess
import sys

# "jax", "tensorflow" or "torch".
os.environ.setdefault("KERAS_BACKEND", "jax")

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    extras = f"keras-fvae[hub,analysis,{os.environ['KERAS_BACKEND']}]"
    subprocess.run([*pip, extras], check=True)

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets

import keras_fvae

SEED = 0

# %% [markdown]
# ## Coloured digits
#
# 0 to 4 are to be told from 5 to 9. In training 95 % of the one are red and 95
# % of the other green; in validation and test each picture is there in both
# colours. A group is a label together with a colour. The first 900 digits are
# to pretrain on, as they are.

# %%
digits = sklearn.datasets.load_digits()
rng = np.random.default_rng(SEED)
order = rng.permutation(len(digits.images))
pictures = np.repeat(digits.images[order, ..., None] / 16, 3, axis=-1)
pictures, targets = pictures.astype("float32"), digits.target[order]

COLORS = np.array([[1, 0.25, 0.25], [0.25, 1, 0.25]], "float32")
NAMES = np.array(["0-4, red", "0-4, green", "5-9, red", "5-9, green"])


def color(part, colors):
    labels = (targets[part] >= 5).astype("int32")
    x = pictures[part] * COLORS[colors][:, None, None]
    return x, labels, colors, NAMES[2 * labels + colors]


def both_colors(part):
    parts = [color(part, np.full(part.size, c)) for c in (0, 1)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


pretraining, training, validating, testing = np.split(
    np.arange(len(targets)), [900, 1350, 1500]
)
agrees = rng.random(training.size) < 0.95
labels_of = (targets[training] >= 5).astype("int32")
x, y, _, groups = color(training, np.where(agrees, labels_of, 1 - labels_of))
x_val, y_val, _, groups_val = both_colors(validating)
x_test, y_test, colors_test, groups_test = both_colors(testing)
for name, number in zip(*np.unique(groups, return_counts=True)):
    print(f"{name:<12}{number:>4}")

# %%
figure, axes = plt.subplots(2, 8, figsize=(8, 2.4))
for row, group in enumerate(("0-4, red", "5-9, green")):
    for axis, picture in zip(axes[row], x[groups == group]):
        axis.imshow(picture)
        axis.axis("off")

# %% [markdown]
# ## A pretrained model
#
# It has seen digits, in grey, and tells all ten. For pictures of your own take
# `keras_hub.models.ImageClassifier.from_preset("vit_base_patch16_224_imagenet",
# num_classes=2)` in the place of this cell.


# %%
def make_classifier(num_classes):
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,
        num_layers=4,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone, num_classes=num_classes, preprocessor=None, pooling="gap"
    )


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
keras.utils.set_random_seed(SEED)
pretrained = make_classifier(10)
pretrained.compile(keras.optimizers.AdamW(2e-3), loss, metrics=["accuracy"])
pretrained.fit(
    pictures[pretraining],
    targets[pretraining],
    batch_size=32,
    epochs=40,
    validation_data=(pictures[validating], targets[validating]),
    verbose=0,
)
print(f"{pretrained.history.history['val_accuracy'][-1]:.3f}")

# %% [markdown]
# ## Train both
#
# The learning rate, and of FVAE-LoRA the two weights of the objective, are
# those that did best of sixteen on validation data in the project's comparison
# of just this; `from_paper` has the authors' other settings.
# `WorstGroupAccuracy` measures the worst group after each epoch.

# %%
CONFIGS = {
    "LoRA": keras_fvae.LoRAConfig(rank=8),
    "FVAE-LoRA": keras_fvae.FVAELoRAConfig.from_paper(
        rank=8, reconstruction_weight=0.1, kl_weight=10.0
    ),
}
EPOCHS = 15


def train(config):
    keras.utils.set_random_seed(SEED)
    model = make_classifier(2)
    model.backbone.set_weights(pretrained.backbone.get_weights())
    model.backbone.enable_adapter(config)
    steps = EPOCHS * -(-len(x) // 32)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=1.5e-2, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.AdamW(learning_rate, global_clipnorm=1.0),
        loss,
        metrics=["accuracy"],
    )
    worst = keras_fvae.WorstGroupAccuracy(x_val, y_val, groups_val)
    model.fit(x, y, batch_size=32, epochs=EPOCHS, callbacks=[worst], verbose=0)
    return model


models = {"LoRA": train(CONFIGS["LoRA"])}

# %%
models["FVAE-LoRA"] = train(CONFIGS["FVAE-LoRA"])

# %% [markdown]
# ## Group by group

# %%
for name, model in models.items():
    print(name)
    print(f"in training: {model.evaluate(x, y, verbose=0)[1]:.3f}")
    print(keras_fvae.evaluate_groups(model, x_test, y_test, groups_test))
    print()

# %% [markdown]
# Both get all training pictures right, and nearly all of those whose colour
# goes with the label. Where it does not, on JAX and two CPU cores (2026-11-28):
#
# ```
# LoRA                                    FVAE-LoRA
# 0-4, green           0.725       167    0-4, green           0.850       167
# 5-9, red             0.538       130    5-9, red             0.608       130
# ```
#
# **One seed proves nothing.** 130 pictures leave some 9 points of doubt to each
# figure, and another seed may turn the two around. TensorFlow and PyTorch draw
# other numbers from the same seed: the worst groups were 0.531 and 0.769 on the
# one, 0.500 and 0.654 on the other. Over twenty seeds the worst group gets 6.8
# points more right with FVAE-LoRA as published than with LoRA (a 95 % interval
# of 2.8 to 11.2), and with the default settings 3.8 (-1.4 to 9.4):
# [results](https://keras-fvae.github.io/keras-fvae/results/).
#
# From epoch to epoch it swings as much as that, too. To keep the best epoch,
# pass `AdapterCheckpoint("best.safetensors", monitor="worst_group_accuracy",
# mode="max", save_best_only=True)` after `WorstGroupAccuracy`.

# %%
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, model in models.items():
    history = model.history.history
    axis.plot(history["worst_group_accuracy"], label=name)
axis.set(xlabel="epoch", ylabel="worst group")
axis.legend()

# %% [markdown]
# ## What the latents say
#
# A probe is a linear classifier that reads the label, or the colour, from one
# latent of one layer.

# %%
model = models["FVAE-LoRA"]
probes = keras_fvae.probe_latents(
    model, x_test, y_test, {"colour": colors_test}
)
print(probes)

# %%
keras_fvae.plots.plot_probes(probes)

# %% [markdown]
# If the latents were factorized as they are meant to be, the label would be
# read from z1, and the colour from z2 alone. Here they are not, as far as a
# linear probe can tell:
#
# - In the first block either latent gives the colour away, z1 to 99 % or more.
#   Further up both have less of it, and neither has more of it everywhere.
# - The label is read better the higher the block, to 79 % in the last, and from
#   z1 no better than from z2 but for single layers.
#
# So a better worst group is not yet evidence that z1 has left the colour out. A
# probe says what can be read from a latent, not what the layers above use of
# it.
#
# The next picture says how much z1 carries: its divergence from the prior is
# small in the upper blocks, because `kl_weight=10` asks for that, yet nearly
# all of its units vary from token to token.

# %%
latents = keras_fvae.latents(model, x_test)
keras_fvae.plots.plot_layers(latents)

# %% [markdown]
# And the means of both latents, averaged over the tokens of each picture, in
# the first adapted layer and in the last. In the first the main component of
# either is the colour; in the last it is not.

# %%
paths = [*latents]
keras_fvae.plots.plot_latents(latents[paths[0]], groups_test, title=paths[0])

# %%
keras_fvae.plots.plot_latents(latents[paths[-1]], groups_test, title=paths[-1])

# %% [markdown]
# ## On data of your own
#
# - Groups are all you need: an integer or a string for each example, such as
#   the background of a picture or the hospital that it comes from. They are
#   needed in validation and test, not in training.
# - Choose settings by the worst group of validation data, with several seeds.
# - Without groups, `evaluate_groups` cannot tell; an attribute that you suspect
#   can be probed for, still.
# - [See what the latents do](https://keras-fvae.github.io/keras-fvae/latents/)
#   says which values of the monitor are good ones.
