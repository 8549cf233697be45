"""The ELBO's terms in the logs of `fit`, and a word where they go wrong."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.networks import STD_FLOOR
from keras_fvae.methods.fvae.objective import LOG_2_PI
from keras_fvae.methods.fvae.totals import NAMES
from keras_fvae.methods.fvae.totals import TermTotals
from keras_fvae.model.lookup import require_adapted_layers
from keras_fvae.model.training import forget_compiled_functions
from keras_fvae.model.tree import numbered

# From where on the warnings speak.
COLLAPSED_KL_PER_UNIT = 0.01
# On digits it was up to 5 at the learning rates of the comparison, and 463 and
# 4337 at 0.1, where the accuracy was 20 and 4 points lower.
DIVERGED_KL_PER_UNIT = 1000
# Below this, models of `examples/paper/local.py` lost accuracy.
DROWNED_SIGNAL_TO_NOISE = 0.3
EXPLAINED_ENOUGH = 0.9
STILL_GROWS = 1.1
NEAR_FLOOR = 2 * STD_FLOOR


class FVAELoRAMonitor(keras.callbacks.Callback):
    """Puts the terms of the FVAE into the logs at the end of each epoch.

    So the progress bar, `History`, `CSVLogger` and `TensorBoard` have them;
    put it before such callbacks in the list. All are means over the steps of
    the epoch and over the adapted layers, with latents drawn as in training:

    - `fvae_loss`: the negated objective, `elbo_weight` times which is part of
      `loss`.
    - `negative_log_likelihood`, `kl_z1`, `gamma`: its terms.
    - `wasserstein`: the squared 2-Wasserstein distance of q1 and q2.
    - `active_units`: how many units of z1 vary from token to token (the
      variance of their posterior means is above 0.01).
    - `signal_to_noise`: by how much the posterior means of z1 vary from token
      to token, beside the noise that is drawn.
    - `explained_variance`: the share of the variance of the layer's inputs
      that the decoder reconstructs.
    - `task_loss`: `loss` without what FVAE-LoRA's layers add to it. That is
      what `ReduceLROnPlateau` and its like should follow, by `mode="min"`,
      which they do not guess from this name; `val_loss` has no part of
      theirs.

    Once in each `fit` it warns of a layer whose z1 has collapsed to its prior
    while the decoder still needs it, of a layer whose z1 drowns in its noise
    and gets no clearer, of numbers that are not finite or far beyond those of
    a training that goes well, of a decoder whose scale is at its floor, and of
    an ELBO that outweighs the task's loss.

    After each epoch `health` is a dict that says in a word of each layer, by
    its path, what z1 is: `"fine"`, `"collapsed"`, `"drowned"` or `"diverged"`.
    `adapter_summary` shows the word.

    Args:
        per_layer: Boolean. Whether to log the terms of each layer, too, as
            `"{layer path}/{term}"`; the progress bar does not show those.
            Defaults to `False`.

    Raises:
        ValueError: In `fit`, if no layer of the model is adapted.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    ... )
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> model.compile("adamw", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 4)),
    ...     np.ones((8, 3)),
    ...     callbacks=[keras_fvae.FVAELoRAMonitor()],
    ...     verbose=0,
    ... )
    >>> len(history.history["kl_z1"])
    1

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(self, per_layer: bool = False) -> None:
        super().__init__()
        self.per_layer = per_layer

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._layers = require_adapted_layers(self.model, FVAELoRAConfig)
        # Of layers with the same path each has a name of its own.
        names = numbered((layer.path, layer) for layer in self._layers)
        self._names = {id(layer): name for name, layer in names.items()}
        self._warned: set[str] = set()
        self._previous: dict[int, dict[str, float]] = {}
        self.health: dict[str, str] = {}
        for layer in self._layers:
            layer.adapter.fvae.totals = TermTotals(
                layer.config.rank, layer.adapter.width
            )
            layer.adapter.callback = self
        if self.per_layer:
            paths = tuple(f"{name}/" for name in names)
            keras_internals.hide_from_progress_bar(self.model, paths)
        self.model.make_train_function(force=True)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.leave()

    def leave(self) -> None:
        """Ends the counting, also where an error has ended `fit`."""
        for layer in self._layers:
            layer.adapter.fvae.totals = None
            layer.adapter.callback = None
        forget_compiled_functions(self.model, kinds=("train",))

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Outside of an epoch, Keras has the variables' values in the model.
        for layer in self._layers:
            layer.adapter.fvae.totals.reset()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        logs = {} if logs is None else logs
        means = [layer.adapter.fvae.totals.means() for layer in self._layers]
        # A layer may have not been called.
        called = [
            (layer, terms)
            for layer, terms in zip(self._layers, means)
            if terms is not None
        ]
        if not called:
            return
        for name in NAMES:
            mean = float(np.mean([terms[name] for _, terms in called]))
            logs[name] = mean
        if "loss" in logs:
            added = sum(float(terms["added_loss"]) for _, terms in called)
            logs["task_loss"] = logs["loss"] - added
        if self.per_layer:
            for layer, terms in called:
                for name in NAMES:
                    logs[f"{self._names[id(layer)]}/{name}"] = float(
                        terms[name]
                    )
        self._warn(called, logs)

    def _grows(self, layer, terms, name):
        """Whether a term of a layer is larger than an epoch ago.

        It begins at 0, so it counts as growing where there was no epoch.
        """
        previous = self._previous.get(id(layer), {})
        return terms[name] > STILL_GROWS * previous.get(name, -math.inf)

    def _warn(self, called, logs):
        """Warns of what it has not warned of yet in this `fit`."""
        for layer, terms in called:
            layer.adapter.health = _health(layer, terms)
        self.health = {
            self._names[id(layer)]: layer.adapter.health for layer, _ in called
        }
        for what, message in [
            *self._of_latents(called),
            *_of_decoders(called),
            *_of_loss(called, logs),
        ]:
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(message, stacklevel=2)
        self._previous = {id(layer): terms for layer, terms in called}

    def _of_latents(self, called):
        """Yields what each warning of latents is of, and its message."""
        collapsed = [
            self._names[id(layer)]
            for layer, terms in called
            if layer.adapter.health == "collapsed"
            and terms["explained_variance"] < EXPLAINED_ENOUGH
            and not self._grows(layer, terms, "kl_z1")
        ]
        if collapsed:
            yield (
                "posterior collapse",
                f"z1 has collapsed to its prior in {_list(collapsed)}: its KL "
                f"is below {COLLAPSED_KL_PER_UNIT} a unit, while the decoder "
                "leaves more than a tenth of the variance unexplained. A "
                "smaller `kl_weight`, or a `FVAELoRASchedule` that warms it "
                "up, lets z1 carry more.",
            )
        drowned = [
            self._names[id(layer)]
            for layer, terms in called
            if layer.adapter.health == "drowned"
            and not self._grows(layer, terms, "signal_to_noise")
        ]
        if drowned:
            yield (
                "noise",
                f"z1 drowns in its noise in {_list(drowned)}: its means vary "
                f"by less than {DROWNED_SIGNAL_TO_NOISE} of the noise's "
                "variance, and no more than an epoch ago. If the task does not "
                "learn, raise the learning rate, or lower the `kl_weight` or "
                "the `elbo_weight`.",
            )
        diverged = [p for p, word in self.health.items() if word == "diverged"]
        if diverged:
            yield (
                "divergence",
                f"Training diverged: the latents of {_list(diverged)} are not "
                f"finite, or their KL is above {DIVERGED_KL_PER_UNIT} a unit. "
                "Lower the learning rate, or clip the gradients "
                "(`global_clipnorm=1.0` in the optimizer).",
            )


def _of_decoders(called):
    """As `FVAELoRAMonitor._of_latents`, of the decoders."""
    at_floor = [
        layer.path
        for layer, _ in called
        if layer.adapter.fvae.decoder_std.min() < NEAR_FLOOR
    ]
    if at_floor:
        yield (
            "scale floor",
            f"The decoder's scale is at its floor of {STD_FLOOR} in "
            f"{_list(at_floor)}: some inputs of the layer hardly vary, and "
            "their likelihood outgrows all else. Normalize what the layer "
            "gets, or lower the `reconstruction_weight`.",
        )


def _of_loss(called, logs):
    """As `FVAELoRAMonitor._of_latents`, of the model's loss."""
    if "loss" not in logs:
        return
    elbo = logs["loss"] - logs["task_loss"]
    pull = elbo - sum(_constant(layer) for layer, _ in called)
    task = logs["task_loss"]
    if abs(pull) > abs(task):
        yield (
            "outweighed task",
            f"The ELBO outweighs the task: it is {pull:.3g} of the loss, "
            "without the constant of the likelihood, and the task's own loss "
            f"is {task:.3g}. If the task does not learn, lower the "
            "`elbo_weight`.",
        )


def _health(layer, terms):
    """What z1 of a layer is, in a word."""
    if (
        not np.isfinite([*terms.values()]).all()
        or terms["kl_z1"] > DIVERGED_KL_PER_UNIT * layer.config.rank
    ):
        return "diverged"
    if terms["kl_z1"] < COLLAPSED_KL_PER_UNIT * layer.config.rank:
        return "collapsed"
    if terms["signal_to_noise"] < DROWNED_SIGNAL_TO_NOISE:
        return "drowned"
    return "fine"


def _constant(layer):
    """What log 2 pi, which pulls at nothing, is of what a layer adds."""
    fvae, config = layer.adapter.fvae, layer.config
    weight = float(ops.convert_to_numpy(fvae.loss_weight))
    is_weighted = config.objective == "fvae"
    reconstruction_weight = config.reconstruction_weight if is_weighted else 1.0
    width = fvae.feature_weights.shape[0]
    constant = reconstruction_weight * width * LOG_2_PI / 2
    return weight * constant


def _list(paths):
    first = "', '".join(paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"'{first}'{more}"
