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
# # A language model that learns to answer otherwise
#
# A causal language model of KerasHub takes texts and gives texts: `fit` on
# strings, `generate` from a prompt. This guide adapts one, generates before and
# after, lets it answer several times, and keeps the adapter in a file.
#
# It runs on any machine, in two minutes or so: a Qwen 3 of two layers that has
# learned to count up, and is to count down. What changes with a pretrained
# model is said where it does.

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

import json
import random

import keras
import keras_hub
import tokenizers

import keras_fvae

keras.utils.set_random_seed(0)

# %% [markdown]
# ## A model that has learned something
#
# With a pretrained model, these three cells are one line:
#
# ```
# causal_lm = keras_hub.models.CausalLM.from_preset("qwen3_0.6b_en")
# ```
#
# or `"gemma3_instruct_270m"`, `"gemma3_1b"`, `"llama3.2_1b"`, with
# `dtype="bfloat16"` where memory is short. Here the tokenizer is made from the
# texts, and the model is trained from the start.


# %%
def count(first, step, length=6):
    return " ".join(str(first + step * i) for i in range(length))


ups = [f"count: {count(first, 1)}" for first in range(1, 95)]
downs = [f"count: {count(first, -1)}" for first in range(6, 100)]
random.Random(0).shuffle(ups)
random.Random(0).shuffle(downs)

pairs = tokenizers.ByteLevelBPETokenizer()
pairs.train_from_iterator(
    ups + downs,
    vocab_size=400,
    special_tokens=["<|endoftext|>", "<|im_end|>"],
)
learned = json.loads(pairs.to_str())["model"]
tokenizer = keras_hub.models.Qwen3Tokenizer(
    vocabulary=learned["vocab"],
    merges=[" ".join(merge) for merge in learned["merges"]],
)


# %%
def make_causal_lm():
    keras.utils.set_random_seed(0)
    return keras_hub.models.Qwen3CausalLM(
        keras_hub.models.Qwen3Backbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            hidden_dim=64,
            intermediate_dim=128,
        ),
        preprocessor=keras_hub.models.Qwen3CausalLMPreprocessor(
            tokenizer, sequence_length=16
        ),
    )


causal_lm = make_causal_lm()

# %%
decay = keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=240)
causal_lm.compile(keras.optimizers.AdamW(decay), sampler="greedy")
causal_lm.fit(ups, batch_size=16, epochs=40, verbose=0)
base_weights = causal_lm.get_weights()


def show(causal_lm, prompts=("count: 23", "count: 57", "count: 80")):
    for text in causal_lm.generate([*prompts], max_length=16):
        print(text)


show(causal_lm)

# %% [markdown]
# ## Adapt it
#
# All linear layers get adapters. Without `"all-linear"` it would be the query
# and value projections of attention, which is enough for a large model that is
# to learn less. Another method of the family is one word away:
# `enable_adapter(keras_fvae.DoRAConfig(rank=8), "all-linear")`. The model was
# compiled before, so a warning asks to compile it again.

# %%
summary = causal_lm.backbone.enable_fvae_lora(
    rank=8, target_layer_names="all-linear"
)
print(summary)
causal_lm.compile(
    keras.optimizers.AdamW(1e-2, global_clipnorm=1.0), sampler="greedy"
)

# %% [markdown]
# Some texts are kept aside. The loss of `fit` has the autoencoders' part, that
# of `evaluate` is the task's alone: a mean over the tokens that are no padding.

# %%
train, new = downs[18:], downs[:18]
print("before:", causal_lm.evaluate(new, verbose=0, return_dict=True))
causal_lm.fit(train, batch_size=16, epochs=30, verbose=0)
print("after: ", causal_lm.evaluate(new, verbose=0, return_dict=True))

# %% [markdown]
# ## Generate
#
# With the adapters, and without them: what the base model can, it can still. On
# each backend:
#
# ```
# count: 23 22 21 20 19 18
# count: 57 56 55 54 53 52
# count: 80 79 78 77 76 75
# count: 23 24 25 26 27 28
# count: 57 58 59 60 61 62
# count: 80 81 82 83 84 85
# ```

# %%
show(causal_lm)
with keras_fvae.adapter_disabled(causal_lm):
    show(causal_lm)

# %% [markdown]
# A sampler such as `causal_lm.compile(sampler="top_p")` draws the next token
# from what the model says. `adapter_sampling` draws something else: z1, for
# which the adapters have learned a variance. Decoding stays greedy here, so the
# answers differ only where the adapters are unsure. Give each a block with a
# seed of its own.

# %%
for seed in range(4):
    with keras_fvae.adapter_sampling(causal_lm, seed=seed):
        show(causal_lm, ["count: 31", "count: 99", "count: 3"])

# %% [markdown]
# From 31 all of them count down. The others are hard: 99 is in one text of
# training alone, and no text begins with 3, since it would go below 0. There
# the samples drift apart, and are wrong. What two of the seeds said on PyTorch:
#
# ```
# count: 31 30 29 28 27 26    count: 31 30 29 28 27 26
# count: 99 97 96 95 94 93    count: 99 98 97 96 95 94
# count: 3 2 2 2 43 42        count: 3 89 88 87 86 85
# ```
#
# ## Only the answer counts
#
# `fit` on texts learns the prompts, too. To leave them out of the loss, encode
# the texts, and give the prompts' tokens a weight of 0. Adapters' losses count
# every token that is no padding, whatever its weight.

# %%
x, y, sample_weight = causal_lm.preprocessor(train)
num_prompt_tokens = len(tokenizer("count: "))
sample_weight = keras.ops.convert_to_numpy(sample_weight).astype("float32")
sample_weight[:, : num_prompt_tokens - 1] = 0
print(keras.ops.convert_to_numpy(y[0]), sample_weight[0])

# %% [markdown]
# `keras.Model.fit(causal_lm, x, y, sample_weight=sample_weight)` takes them,
# encoded as they are.
#
# ## Keep it
#
# The file has the adapters alone. It goes onto the base model that anyone can
# get.

# %%
causal_lm.backbone.save_adapter("countdown.safetensors")
print(f"{os.path.getsize('countdown.safetensors') / 1e3:.0f} kB")

served = make_causal_lm()
served.set_weights(base_weights)
served.backbone.load_adapter("countdown.safetensors")

# %% [markdown]
# For use alone, the second latent, the decoder and the variance can go. What is
# left predicts the same.

# %%
parameters = served.count_params()
keras_fvae.finalize_adapter(served)
print(f"{parameters:,} parameters before, {served.count_params():,} now")
served.compile(sampler="greedy")
show(served)

# %% [markdown]
# With a large model:
#
# - `causal_lm.preprocessor.sequence_length = 256` sets what each text takes.
# - `causal_lm.backbone.quantize("int8")`, before the adapters are enabled, has
#   the frozen weights take a quarter of float32's. The adapters stay float32.
# - `rematerialize=True` keeps less for the gradient.
# - LoRA that is to be served elsewhere, such as by vLLM, goes out as PEFT has
#   it, by `keras_fvae.save_peft_adapter`. FVAE-LoRA does if it was trained with
#   `encoder_units=()`, by `as_lora=True`.
