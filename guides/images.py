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
# # Images: a vision transformer and TensorFlow Datasets
#
# Pictures of any size come from TensorFlow Datasets, KerasHub's preprocessor
# brings them to the size that the model takes, and `fit` gets them batch by
# batch. The rest is as for texts: one line adapts the backbone.
#
# It runs on any machine, offline, in a minute or so, because the pictures are
# made up and the vision transformer is small. What changes for the real thing
# is said where it does.

# %%
import importlib.util
import os
import subprocess
import sys

# "jax", "tensorflow" or "torch".
os.environ.setdefault("KERAS_BACKEND", "jax")

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    extras = f"keras-fvae[hub,paper,tensorflow,{os.environ['KERAS_BACKEND']}]"
    subprocess.run([*pip, extras], check=True)

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_fvae

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Pictures
#
# `mock_data` has TensorFlow Datasets give what we make up, in the place of what
# it would download. Here the class of a flower is how red its picture is.


# %%
def make_up(builder, split, **kwargs):
    rng = np.random.default_rng(len(split))

    def examples():
        for index in range(96):
            label = index % 4
            picture = rng.integers(0, 80, (40, 48, 3), "uint8")
            picture[..., 0] += np.uint8(50 * label)
            yield {"image": picture, "label": label, "file_name": str(index)}

    signature = {
        "image": tf.TensorSpec((None, None, 3), "uint8"),
        "label": tf.TensorSpec((), "int64"),
        "file_name": tf.TensorSpec((), "string"),
    }
    return tf.data.Dataset.from_generator(
        examples, output_signature=signature
    ).apply(tf.data.experimental.assert_cardinality(96))


# For real pictures, leave out the block and set 102 classes, or take another
# name out of https://www.tensorflow.org/datasets/catalog.
with tfds.testing.mock_data(as_dataset_fn=make_up):
    train, test = (
        tfds.load("oxford_flowers102", split=split)
        for split in ("train", "test")
    )
NUM_CLASSES = 4

# %% [markdown]
# Augmentation is a part of the data. Flip and shift as the task allows.

# %%
flip = keras.layers.RandomFlip("horizontal")
SIDE, BATCH_SIZE = 32, 16


def prepare(dataset, is_training=False):
    def of_example(example):
        picture = tf.image.resize(example["image"], (SIDE, SIDE))
        return picture, example["label"]

    dataset = dataset.map(of_example)
    if is_training:
        dataset = dataset.cache().shuffle(1024).batch(BATCH_SIZE)
        dataset = dataset.map(lambda x, y: (flip(x, training=True), y))
    else:
        dataset = dataset.batch(BATCH_SIZE)
    return dataset.prefetch(tf.data.AUTOTUNE)


# %% [markdown]
# ## The model
#
# The real one is
#
# ```
# model = keras_hub.models.ImageClassifier.from_preset(
#     "vit_base_patch16_224_imagenet21k", num_classes=NUM_CLASSES
# )
# SIDE = 224
# ```
#
# Its preprocessor brings the values to the range that it was trained on, as
# this one does. Here the backbone has random weights.

# %%
backbone = keras_hub.models.ViTBackbone(
    image_shape=(SIDE, SIDE, 3),
    patch_size=8,
    num_layers=2,
    num_heads=4,
    hidden_dim=48,
    mlp_dim=96,
)
converter = keras_hub.layers.ViTImageConverter(
    image_size=(SIDE, SIDE), scale=1 / 127.5, offset=-1.0
)
model = keras_hub.models.ViTImageClassifier(
    backbone,
    num_classes=NUM_CLASSES,
    preprocessor=keras_hub.models.ViTImageClassifierPreprocessor(converter),
)

# %% [markdown]
# ## Adapt it, and train
#
# The query and value projections get adapters, and the new head trains. With
# all of their right labels, LoRA and what derives from it did better on small
# pictures than FVAE-LoRA in the project's comparison; with few of them,
# FVAE-LoRA and LoRA of a higher rank did better than LoRA ([choose a
# method](https://keras-fvae.github.io/keras-fvae/choose_a_method/)). It is one
# line, so try both.

# %%
summary = model.backbone.enable_fvae_lora(rank=8)
# summary = model.backbone.enable_adapter(keras_fvae.LoRAConfig(rank=8))
print(summary)
model.compile(
    keras.optimizers.AdamW(1e-2, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(
    prepare(train, is_training=True),
    validation_data=prepare(test),
    epochs=6,
    callbacks=[
        keras_fvae.AdapterCheckpoint(
            "flowers.safetensors", monitor="val_accuracy", save_best_only=True
        )
    ],
    verbose=2,
)

# %% [markdown]
# ## The best epoch, and how sure it is
#
# The checkpoint has the adapters and the head of the best epoch.

# %%
keras_fvae.load_adapter(model, "flowers.safetensors")
print(model.evaluate(prepare(test), verbose=0, return_dict=True))
logits = keras_fvae.predict_samples(model, prepare(test), num_samples=8)
samples = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
print("most of its samples' spread:", samples.std(axis=0).max().round(3))

# %% [markdown]
# With large pictures:
#
# - `keras.config.set_dtype_policy("mixed_bfloat16")` before the model is made
#   takes half the memory for activations; adapters stay float32.
# - `rematerialize=True` keeps less of the autoencoders for the gradient.
# - A model of convolutions, such as ResNet, takes
#   `target_layer_names="all-conv"` with LoRA. FVAE-LoRA takes convolutions of
#   size 1 alone, which a function chooses ([layers](
#   https://keras-fvae.github.io/keras-fvae/layers/#convolutions)).
