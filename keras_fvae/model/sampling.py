"""Predictions under what adapters draw: several, which differ by as much as
the model is unsure."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_fvae.backend import keras_internals
from keras_fvae.backend import noise
from keras_fvae.layers import switching
from keras_fvae.layers.config import is_integer
from keras_fvae.model import lookup


@contextlib.contextmanager
def adapter_sampling(model: keras.Layer, seed: int = 0) -> Iterator[None]:
    """Context manager: adapters draw, as in training, and all else does not.

    FVAE-LoRA draws z1 from q1 instead of using its mean; LoRA and MoE-LoRA with
    a `dropout` drop a part of their input, DropLoRA a part of its ranks; the
    noise of Flat-LoRA is for training alone. Inside the block `predict`,
    `evaluate` and `generate` use what is drawn; give each of several texts that
    are generated a block with a `seed` of its own, because KerasHub forgets on
    JAX what it has drawn. After the block the model is as it was. Blocks may be
    nested, and overlap: the `seed` of the one that was entered last counts.

    Args:
        model: `keras.Model` or layer with adapted layers.
        seed: Non-negative integer, what is drawn. The same calls give the same
            numbers, on one backend. Defaults to `0`.

    Raises:
        ValueError: If no layer is adapted, the adapters are finalized or
            turned off by `adapter_disabled`, none of them draws anything, or
            `seed` is no such integer.
        TypeError: If `model` is no Keras model or layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> with keras_fvae.adapter_sampling(model):
    ...     predictions = model.predict(np.ones((1, 4)), verbose=0)
    """
    layers = lookup.require_active_layers(model)
    _check_integer("seed", seed, minimum=0)
    with switching.sampling(layers):
        if not any(layer.adapter.changes_state(False) for layer in layers):
            raise ValueError(
                f"The adapters of model '{model.name}' draw nothing, so that "
                "all samples would be the same: "
                f"{layers[0].config.method_name} with these settings has no "
                "random part at inference. FVAE-LoRA has one, and so have "
                "DropLoRA, and LoRA and MoE-LoRA with a `dropout`."
            )
        with noise.seeds_set(_seed_generators(layers), seed):
            yield


def predict_samples(
    model: keras.Model,
    x: Any,
    num_samples: int = 16,
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> Any:
    """Predicts several times, under what the adapters draw.

    Where the samples agree the model is sure; where they do not it is not.
    Their mean, of probabilities rather than of logits, is a prediction, too;
    see `adapter_sampling` for what is drawn.

    Args:
        model: `keras.Model` with adapted layers.
        x: Anything that `model.predict` takes more than once: arrays, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, or raw data for a
            KerasHub task with a preprocessor; in the same order each time,
            because the samples of an example stand at the same place.
        num_samples: Positive integer. Each takes as long as `predict`.
            Defaults to `16`.
        batch_size: Optional integer, as in `model.predict`.
        seed: Non-negative integer, what is drawn: with the same `batch_size`
            the same samples, on one backend. Defaults to `0`.

    Returns:
        What `model.predict` returns, with a first axis for the samples: for
        one output, a NumPy array of shape `(num_samples, examples, ...)`.

    Raises:
        ValueError: As `adapter_sampling`; or if `num_samples` is no positive
            integer, or `x` a PyTorch `DataLoader` that shuffles.
        TypeError: If `model` is no `keras.Model`, or `x` a generator.

    Example:

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((4,)),
    ...         keras.layers.Dense(3, name="query", activation="softmax"),
    ...     ]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> samples = keras_fvae.predict_samples(model, np.ones((5, 4)))
    >>> samples.shape
    (16, 5, 3)
    >>> probabilities, spread = samples.mean(axis=0), samples.std(axis=0)
    """
    lookup.check_can_predict(model)
    _check_integer("num_samples", num_samples, minimum=1)
    if inspect.isgenerator(x):
        raise TypeError(
            "`x` must be data that can be read more than once, and a "
            "generator cannot. Pass arrays, a `keras.utils.PyDataset` or a "
            f"`tf.data.Dataset`. Received: x={x!r}"
        )
    if _is_shuffled(x):
        raise ValueError(
            "`x` must come in the same order each time, because the samples of "
            "an example stand at the same place. Make the `DataLoader` "
            f"without `shuffle=True`. Received: x={x!r}"
        )
    with adapter_sampling(model, seed):
        samples = [
            model.predict(x, batch_size=batch_size, verbose=0)
            for _ in range(num_samples)
        ]
    return keras.tree.map_structure(lambda *s: np.stack(s), *samples)


def _is_shuffled(x):
    """Whether it is known that data come in another order each time."""
    data = sys.modules.get("torch.utils.data")
    if data is None or not isinstance(x, data.DataLoader):
        return False
    return isinstance(x.sampler, data.RandomSampler)


def _check_integer(name, value, minimum):
    if not is_integer(value) or value < minimum:
        raise ValueError(
            f"`{name}` must be an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )


def _seed_generators(layers):
    """List of what the adapters of layers draw from."""
    return [
        part.seed_generator
        for layer in layers
        for part in keras_internals.flatten_layers(layer.adapter)
        if hasattr(part, "seed_generator")
    ]
