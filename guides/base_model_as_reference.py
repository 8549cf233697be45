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
# # The base model as a reference
#
# A model with adapters is two models: itself, and the base model that it
# started from. Some losses need both. Direct preference optimization (DPO)
# asks by how much more the model prefers one answer to another than the base
# model does; distillation keeps the model's predictions near the base model's.
# Inside an `adapter_disabled` block the model is the base model, so one set of
# weights does for both.
#
# It runs on any machine, in a minute or so: a Llama with random weights, whose
# task is to prefer the answer whose numbers go up.

# %%
import importlib.util
import os
import subprocess
import sys

# "jax", "tensorflow" or "torch".
os.environ.setdefault("KERAS_BACKEND", "jax")

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    extras = f"keras-fvae[hub,{os.environ['KERAS_BACKEND']}]"
    subprocess.run([*pip, extras], check=True)

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_fvae

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Pairs of answers
#
# Of shape `(pairs, 2, length)`: first the answer that is preferred, then the
# other one. Both start with the same prompt, which the loss leaves out.

# %%
VOCABULARY_SIZE, LENGTH, PROMPT_LENGTH = 32, 12, 4
rng = np.random.default_rng(0)


def make_pairs(number):
    start = rng.integers(1, 8, (number, 1))
    preferred = start + np.arange(LENGTH)
    other = rng.integers(1, VOCABULARY_SIZE, (number, LENGTH))
    other[:, :PROMPT_LENGTH] = preferred[:, :PROMPT_LENGTH]
    return np.stack([preferred, other], axis=1)


pairs, new_pairs = make_pairs(256), make_pairs(64)

# %% [markdown]
# ## The model
#
# It returns the log probability of each answer, the sum over its tokens.
# `compute_loss` asks the base model for the same. The base model needs no
# gradient: without adapters nothing in it trains.

# %%


class PreferenceModel(keras.Model):
    """A causal language model that learns which answers are preferred.

    Reference: [Direct Preference Optimization](
    https://arxiv.org/abs/2305.18290), equation 7.
    """

    def __init__(self, causal_lm, beta=0.1):
        super().__init__()
        self.causal_lm = causal_lm
        self.beta = beta

    def call(self, pairs, training=None):
        tokens = ops.reshape(pairs, (-1, LENGTH))
        logits = self.causal_lm(
            {"token_ids": tokens, "padding_mask": ops.ones_like(tokens)},
            training=training,
        )
        log_probabilities = ops.log_softmax(logits[:, :-1])
        chosen = ops.take_along_axis(
            log_probabilities, tokens[:, 1:, None], axis=-1
        )
        answer = chosen[:, PROMPT_LENGTH - 1 :, 0]
        return ops.reshape(ops.sum(answer, axis=-1), (-1, 2))

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        with keras_fvae.adapter_disabled(self):
            reference = ops.stop_gradient(self(x, training=False))
        gained = y_pred - reference
        margin = self.beta * (gained[:, 0] - gained[:, 1])
        loss = -ops.mean(ops.log_sigmoid(margin))
        # The ELBO of FVAE-LoRA comes by the layers' losses.
        return loss + sum(self.losses)


backbone = keras_hub.models.Llama3Backbone(
    vocabulary_size=VOCABULARY_SIZE,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=64,
    intermediate_dim=128,
)
causal_lm = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
model = PreferenceModel(causal_lm)
model(pairs[:1])
base = model.predict(new_pairs, verbose=0)
summary = backbone.enable_fvae_lora(rank=4)

# %% [markdown]
# ## Training
#
# Adapters are trained, the base model stays what it is.

# %%
model.compile(keras.optimizers.AdamW(5e-3, global_clipnorm=1.0))
model.fit(pairs, batch_size=32, epochs=10, verbose=2)

# %%
gained = model.predict(new_pairs, verbose=0) - base
share = np.mean(gained[:, 0] > gained[:, 1])
print(f"Of new pairs, the better answer gained more in {share:.0%}.")
with keras_fvae.adapter_disabled(model):
    np.testing.assert_array_equal(model.predict(new_pairs, verbose=0), base)

# %% [markdown]
# ## Distillation
#
# To stay near the base model while learning something else, add the
# divergence from its predictions to the loss. `super().compute_loss` has the
# task's loss and the ELBO.

# %%


class NearTheBase(keras_hub.models.Llama3CausalLM):
    """A causal language model that pays for leaving the base model."""

    weight = 1.0

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        with keras_fvae.adapter_disabled(self):
            reference = ops.stop_gradient(self(x, training=False))
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        divergence = keras.losses.kl_divergence(
            ops.softmax(reference), ops.softmax(y_pred)
        )
        return loss + self.weight * ops.mean(divergence)


keras_fvae.remove_adapter(model)
student = NearTheBase(backbone, preprocessor=None)
backbone.enable_fvae_lora(rank=4)
student.compile(
    keras.optimizers.AdamW(5e-3, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
answers = pairs[:, 0]
x = {"token_ids": answers[:, :-1], "padding_mask": answers[:, :-1] > 0}
student.fit(x, answers[:, 1:], batch_size=32, epochs=3, verbose=2)
