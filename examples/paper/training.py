"""Fine-tuning as the paper does it, whatever the task."""

import time

import keras
import numpy as np
from keras import ops

from examples.paper import provenance
from examples.paper.metrics import classification_metrics

# Of what is normalized or added, the paper decays nothing.
UNDECAYED = ["bias", "beta", "gamma", "scale_tril"]


@keras.saving.register_keras_serializable(package="keras_fvae_paper")
class LinearWarmupAndDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly from 0, and falls linearly to 0.

    Args:
        peak: Float, the highest learning rate.
        warmup_steps: Integer, the steps until then.
        num_steps: Integer, all steps.
    """

    def __init__(self, peak, warmup_steps, num_steps):
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.num_steps = num_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        falling_steps = max(self.num_steps - self.warmup_steps, 1)
        share = ops.clip((self.num_steps - step) / falling_steps, 0.0, 1.0)
        if self.warmup_steps:
            share = ops.minimum(share, step / self.warmup_steps)
        return self.peak * share

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "num_steps": self.num_steps,
        }


def make_optimizer(settings, num_steps, warmup_steps=None):
    """AdamW with linear warm-up and decay.

    Args:
        settings: Dict, what `search.authors_settings` returned.
        num_steps: Integer, the steps of all epochs.
        warmup_steps: Integer. `None` (default) means a tenth of all.

    Returns:
        A Keras optimizer.
    """
    if warmup_steps is None:
        warmup_steps = num_steps // 10
    optimizer = keras.optimizers.AdamW(
        LinearWarmupAndDecay(
            settings["learning_rate"], warmup_steps, num_steps
        ),
        weight_decay=settings["weight_decay"],
        epsilon=settings["epsilon"],
        global_clipnorm=settings["global_clipnorm"],
    )
    optimizer.exclude_from_weight_decay(var_names=UNDECAYED)
    return optimizer


class BestWeights(keras.callbacks.Callback):
    """Keeps what trains as it was at the end of the best epoch.

    Args:
        monitor: String, the entry of the logs that is to be highest.
        patience: Integer, after how many epochs that were not better training
            stops; `None` for never.
    """

    def __init__(self, monitor, patience=None):
        super().__init__()
        self.monitor = monitor
        self.patience = patience
        self.best = -np.inf
        self.best_epoch = None

    def on_epoch_end(self, epoch, logs=None):
        if logs[self.monitor] > self.best:
            self.best, self.best_epoch = logs[self.monitor], epoch
            self.weights = [
                ops.convert_to_numpy(w) for w in self.model.trainable_weights
            ]
        elif self.patience and epoch - self.best_epoch >= self.patience:
            self.model.stop_training = True

    def restore(self):
        """Sets the weights to those of the best epoch."""
        if self.best_epoch is None:
            raise ValueError(
                f"In no epoch was `{self.monitor}` a number: training diverged."
            )
        for weight, value in zip(self.model.trainable_weights, self.weights):
            weight.assign(value)


def fit(model, data, validation_data, epochs, callbacks=(), **options):
    """Trains a compiled model, and counts what it takes.

    Args:
        model: Compiled `keras.Model`.
        data: What `fit` takes, or a pair of arrays.
        validation_data: The same.
        epochs: Integer.
        callbacks: Sequence of callbacks.
        **options: Further arguments of `fit`.

    Returns:
        Dict of what JSON takes: `history` and `cost`.
    """
    x, y = data if isinstance(data, tuple) else (data, None)
    provenance.reset_peak_memory()
    timer = EpochTimer()
    began = time.perf_counter()
    # Of `keras.Model`, because KerasHub's own batches what is batched already.
    history = keras.Model.fit(
        model,
        x,
        y,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=[*callbacks, timer],
        **options,
    )
    return {
        "history": {
            name: [float(value) for value in values]
            for name, values in history.history.items()
        },
        "cost": {
            "seconds": time.perf_counter() - began,
            "step_seconds": timer.step_seconds(),
            "peak_memory_mib": provenance.peak_memory(),
            "trainable_parameters": sum(
                int(np.prod(w.shape)) for w in model.trainable_weights
            ),
        },
    }


class EpochTimer(keras.callbacks.Callback):
    """The time of a training step, from the epochs after the first."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began, self.num_steps = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        self.num_steps += 1
        self.ended = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append((self.ended - self.began) / self.num_steps)

    def step_seconds(self):
        # The first epoch compiles.
        return float(np.median(self.seconds[1:] or self.seconds))


def evaluate_classifier(model, x, labels, batch_size=None):
    """The metrics of a model whose outputs are logits."""
    logits = keras.Model.predict(model, x, batch_size=batch_size, verbose=0)
    probabilities = ops.convert_to_numpy(ops.softmax(logits, axis=-1))
    return classification_metrics(probabilities, labels)
