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
# # A training loop of your own
#
# An adapted model trains in a loop by hand as any Keras model does. There is
# one thing more to know: FVAE-LoRA and AdaLoRA have a loss of their own, which
# is in `model.losses`. This guide has the loop for each backend, shows that it
# computes what `fit` does, and runs the callbacks that some methods need.
#
# It runs on any machine, in a minute or so, on the backend that you choose. The
# cells of the other two backends do nothing.

# %%
import importlib.util
import os
import subprocess
import sys

# "jax", "tensorflow" or "torch".
os.environ.setdefault("KERAS_BACKEND", "jax")

if importlib.util.find_spec("keras_fvae") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    extras = f"keras-fvae[analysis,{os.environ['KERAS_BACKEND']}]"
    subprocess.run([*pip, extras], check=True)

import keras
import numpy as np
import sklearn.datasets

import keras_fvae

BACKEND = keras.config.backend()
BATCH_SIZE, EPOCHS = 32, 3
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

# %% [markdown]
# ## A model and data
#
# Scikit-learn's digits: each of the eight rows of a picture is a token. A
# backbone of KerasHub would do as well. `compile` is there for the comparison
# with `fit`, and because callbacks look for `model.optimizer`.

# %%
digits = sklearn.datasets.load_digits()
x = digits.images[:640].astype("float32") / 16
y = digits.target[:640].astype("int32")
starts = range(0, len(x), BATCH_SIZE)
batches = [(x[i : i + BATCH_SIZE], y[i : i + BATCH_SIZE]) for i in starts]


def make_model(config):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8))
    h = keras.layers.Dense(32, name="embedding")(inputs)
    h = h + keras.layers.MultiHeadAttention(4, 8, name="attention")(h, h)
    h = keras.layers.Flatten()(h)
    model = keras.Model(inputs, keras.layers.Dense(10, name="head")(h))
    keras_fvae.enable_adapter(model, config, trainable_layer_names=["head"])
    model.compile(
        keras.optimizers.AdamW(5e-3, global_clipnorm=1.0),
        loss_of,
        # TensorFlow's XLA draws other numbers from the same seeds.
        jit_compile=BACKEND == "jax",
    )
    return model


# %% [markdown]
# ## The step
#
# On every backend:
#
# - Call the model with `training=True`. At inference FVAE-LoRA takes the mean
#   of z1, and adds no loss.
# - Add `sum(model.losses)` to your loss, after each call. Each adapted layer
#   has put its part of the ELBO there, weighted by `elbo_weight`.
# - Take gradients with respect to what trains alone. The base model is frozen.
#
# ### JAX
#
# `stateless_call` gives the losses if it is asked to. It gives the new values
# of the other variables, too, with which the next step must go on: the seeds of
# the noise are among them, and without them every step would draw the same.
#
# Here each step takes the values from the model and puts them back, so that
# callbacks find them. Where that costs too much, keep the state outside, and
# put it back when somebody looks.

# %%
if BACKEND == "jax":
    import jax

    def make_step(model):
        optimizer = model.optimizer

        def compute_loss(trainable, non_trainable, x, y):
            y_pred, non_trainable, losses = model.stateless_call(
                trainable, non_trainable, x, training=True, return_losses=True
            )
            return loss_of(y, y_pred) + sum(losses), non_trainable

        @jax.jit
        def update(trainable, non_trainable, of_optimizer, x, y):
            (loss, non_trainable), gradients = jax.value_and_grad(
                compute_loss, has_aux=True
            )(trainable, non_trainable, x, y)
            trainable, of_optimizer = optimizer.stateless_apply(
                of_optimizer, gradients, trainable
            )
            return loss, (trainable, non_trainable, of_optimizer)

        kinds = (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )

        def step(x, y):
            state = [[variable.value for variable in kind] for kind in kinds]
            loss, state = update(*state, x, y)
            for kind, values in zip(kinds, state):
                for variable, value in zip(kind, values):
                    variable.assign(value)
            return loss

        return step


# %% [markdown]
# ### TensorFlow

# %%
if BACKEND == "tensorflow":
    import tensorflow as tf

    def make_step(model):
        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                y_pred = model(x, training=True)
                loss = loss_of(y, y_pred) + sum(model.losses)
            variables = model.trainable_variables
            gradients = tape.gradient(loss, variables)
            model.optimizer.apply(gradients, variables)
            return loss

        return step


# %% [markdown]
# ### PyTorch
#
# With an optimizer of Keras. One of PyTorch's own is at the end.

# %%
if BACKEND == "torch":
    import torch

    def make_step(model):
        def step(x, y):
            x, y = torch.as_tensor(x), torch.as_tensor(y)
            model.zero_grad()
            loss = loss_of(y, model(x, training=True)) + sum(model.losses)
            loss.backward()
            variables = model.trainable_variables
            gradients = [variable.value.grad for variable in variables]
            with torch.no_grad():
                model.optimizer.apply(gradients, variables)
            return loss

        return step


# %% [markdown]
# ## The loop
#
# The same for all three. The callbacks are none at first.


# %%
def train(model, callbacks=()):
    model.optimizer.build(model.trainable_variables)
    callbacks = keras.callbacks.CallbackList(
        [*callbacks],
        add_history=True,
        model=model,
        epochs=EPOCHS,
        steps=len(batches),
    )
    callbacks.on_train_begin()
    step = make_step(model)
    for epoch in range(EPOCHS):
        callbacks.on_epoch_begin(epoch)
        losses = []
        for index, (x_batch, y_batch) in enumerate(batches):
            callbacks.on_train_batch_begin(index)
            losses.append(float(step(x_batch, y_batch)))
            callbacks.on_train_batch_end(index)
        callbacks.on_epoch_end(epoch, {"loss": float(np.mean(losses))})
    callbacks.on_train_end()
    return model.history.history


def assert_same_as_fit(model, callbacks, losses):
    history = model.fit(
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )
    np.testing.assert_allclose(losses, history.history["loss"], rtol=1e-3)


def frozen_weights(model):
    return [keras.ops.convert_to_numpy(w) for w in model.non_trainable_weights]


config = keras_fvae.FVAELoRAConfig(rank=8, seed=0)
model = make_model(config)
before = frozen_weights(model)
losses = train(model)["loss"]
print(losses)

# %% [markdown]
# It is what `fit` computes, with the same noise, if the batches are the same.
# The frozen weights have not moved.

# %%
assert_same_as_fit(make_model(config), [], losses)
for one, other in zip(frozen_weights(model), before):
    np.testing.assert_array_equal(one, other)

# %% [markdown]
# ## Callbacks
#
# They work as in `fit`, because the loop calls them where `fit` does: in this
# order, with the variables' values in the model, and before the step is traced.
# The monitor tells the task's loss from the ELBO; the schedule changes weights
# of the objective from step to step, which compiles nothing anew.


# %%
def make_callbacks():
    return [
        keras_fvae.FVAELoRAMonitor(),
        keras_fvae.FVAELoRASchedule(
            elbo_weight=lambda step: 1e-3 * min(1.0, step / 40)
        ),
    ]


history = train(make_model(config), make_callbacks())
for name in ("loss", "task_loss", "kl_z1", "signal_to_noise"):
    print(name, np.round(history[name], 3))
assert_same_as_fit(make_model(config), make_callbacks(), history["loss"])

# %% [markdown]
# AdaLoRA is nothing without its callback. `AdaLoRAAllocator` sees the gradients
# where a Keras optimizer applies them, inside the step, keeps its scores among
# the optimizer's variables, and sets singular values to 0. AdaLoRA's loss keeps
# A and B orthogonal; it is in `model.losses`, too.

# %%
config = keras_fvae.AdaLoRAConfig(rank=6, target_rank=3, seed=0)
model = make_model(config)
allocator = keras_fvae.AdaLoRAAllocator()
losses = train(model, [allocator])["loss"]
print(allocator.history[-1])
assert sum(allocator.history[-1].values()) == 3 * len(allocator.layers)
assert_same_as_fit(make_model(config), [keras_fvae.AdaLoRAAllocator()], losses)

# %% [markdown]
# What a loop of your own has to give each of them:
#
# - `FVAELoRASchedule`: `model.optimizer.iterations`, up to date before each
#   step.
# - `FVAELoRAMonitor`: the hooks of training and of each epoch, and in the logs
#   a `loss`, of which it finds the `task_loss`.
# - `AdaLoRAAllocator`: a Keras optimizer that is built, and `epochs` and
#   `steps`, or its own `total_steps`.
# - `BeamLoRAPruner` and `SRLoRARestarter`: the same, and on JAX the state in
#   the model after each step.
# - `FlatLoRASchedule`: `epochs` and `steps`, and on JAX the state as well.
#
# What does not work:
#
# - An optimizer that is not Keras's, such as PyTorch's or Optax's, with
#   AdaLoRA, BeamLoRA or SRLoRA: nobody tells the callback of an update. Nor is
#   there a warning in a loop of your own, because it is `fit` that warns.
# - Several replicas of TensorFlow with these three, because the gradients of
#   one replica are not those of the step. That is an error.
# - A step that was compiled before the adapters were enabled, removed or
#   switched off: JAX and TensorFlow go on with what they have traced. Make the
#   step anew, or use `model.predict` inside `adapter_disabled`.
# - A model that itself calls an adapted layer in a branch of `ops.cond`, the
#   body of a loop, or `jax.checkpoint`: the adapter's loss does not get out of
#   there, which is an error. A `jax.lax.scan` of whole steps works.
#
# ## PyTorch's own optimizers
#
# `requires_grad` is set as Keras's `trainable` is. FVAE-LoRA needs nothing of
# the optimizer. For several devices wrap the model in
# `DistributedDataParallel`, and still ask the model inside for `losses`; [many
# devices]( https://keras-fvae.github.io/keras-fvae/guides/distributed/#pytorch)
# has that loop.

# %%
if BACKEND == "torch":
    model = make_model(keras_fvae.FVAELoRAConfig(rank=8))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    for epoch in range(EPOCHS):
        losses = []
        for x_batch, y_batch in batches:
            x_batch, y_batch = map(torch.as_tensor, (x_batch, y_batch))
            optimizer.zero_grad()
            loss = loss_of(y_batch, model(x_batch, training=True))
            loss = loss + sum(model.losses)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            losses.append(float(loss))
        print(f"epoch {epoch}: {np.mean(losses):.3f}")
