"""Fine-tuning as the paper does it, whatever the task."""

import pickle
import time

import keras
import numpy as np
import scipy.special
from keras import ops

from examples.paper import provenance
from examples.paper.metrics import classification_metrics

# Biases and the weights of norms. FVAE-LoRA's biases lie in one array with its
# kernels, and decay as these do.
UNDECAYED = ["bias", "beta", "gamma", "^scale$"]


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
        self.state = {"score": -np.inf, "epoch": -1, "weights": None}

    @property
    def best(self):
        """Float, the highest value of what is monitored."""
        return self.state["score"]

    def on_epoch_end(self, epoch, logs=None):
        score = float(logs[self.monitor])
        if score > self.best:
            weights = [
                ops.convert_to_numpy(w) for w in self.model.trainable_weights
            ]
            self.state = {"score": score, "epoch": epoch, "weights": weights}
        elif self.patience and epoch - self.state["epoch"] >= self.patience:
            self.model.stop_training = True

    def restore(self):
        """Sets the weights to those of the best epoch."""
        if self.state["weights"] is None:
            raise ValueError(
                f"In no epoch was `{self.monitor}` a number: training diverged."
            )
        for weight, value in zip(
            self.model.trainable_weights, self.state["weights"]
        ):
            weight.assign(value)


class Epochs(keras.callbacks.Callback):
    """The logs of all epochs, and the time that they took."""

    def __init__(self):
        super().__init__()
        self.state = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began, self.num_steps = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        self.num_steps += 1
        self.last_step_ended = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # An epoch whose end a killed process did not see comes once more.
        del self.state[epoch:]
        step_seconds = (self.last_step_ended - self.began) / self.num_steps
        self.state.append(
            {
                "logs": {name: float(value) for name, value in logs.items()},
                "seconds": time.perf_counter() - self.began,
                "step_seconds": step_seconds,
            }
        )

    def results(self):
        """Dict of what JSON takes: `history`, and the times of `cost`."""
        # The first epoch compiles.
        timed = self.state[1:] or self.state
        return {
            "history": {
                name: [epoch["logs"][name] for epoch in self.state]
                for name in self.state[0]["logs"]
            },
            "cost": {
                "seconds": sum(epoch["seconds"] for epoch in self.state),
                "step_seconds": float(
                    np.median([epoch["step_seconds"] for epoch in timed])
                ),
            },
        }


class Resumable(keras.callbacks.Callback):
    """Keeps the state of other callbacks, should the process be killed.

    Args:
        folder: Path, which is there. Who made it deletes it in the end.
        callbacks: List of `BestWeights` and `Epochs`.
    """

    def __init__(self, folder, callbacks):
        super().__init__()
        self.path = folder / "callbacks.pickle"
        self.callbacks = callbacks

    def on_train_begin(self, logs=None):
        if self.path.exists():
            states = pickle.loads(self.path.read_bytes())
            for callback, state in zip(self.callbacks, states):
                callback.state = state

    def on_epoch_end(self, epoch, logs=None):
        part = self.path.with_suffix(".part")
        part.write_bytes(pickle.dumps([c.state for c in self.callbacks]))
        part.replace(self.path)


def fit(
    model, data, validation_data, epochs, callbacks=(), backup=None, **options
):
    """Trains a compiled model, and counts what it takes.

    Args:
        model: Compiled `keras.Model`.
        data: What `fit` takes, or a pair of arrays.
        validation_data: The same.
        epochs: Integer.
        callbacks: Sequence of callbacks.
        backup: Optional path of a folder, which is there. Where the process
            was killed, the next one goes on after the last whole epoch; the
            random numbers of the data and of dropout begin anew.
        **options: Further arguments of `fit`.

    Returns:
        Dict of what JSON takes: `history` and `cost`.
    """
    x, y = data if isinstance(data, tuple) else (data, None)
    record = Epochs()
    callbacks = [*callbacks, record]
    if backup is not None:
        resumed = [c for c in callbacks if hasattr(c, "state")]
        callbacks += [
            Resumable(backup, resumed),
            keras.callbacks.BackupAndRestore(
                str(backup / "model"),
                double_checkpoint=True,
                # Testing may take long, too.
                delete_checkpoint=False,
            ),
        ]
    provenance.reset_peak_memory()
    # Of `keras.Model`, because KerasHub's own batches what is batched already.
    keras.Model.fit(
        model,
        x,
        y,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=callbacks,
        **options,
    )
    results = record.results()
    results["cost"] |= {
        "peak_memory_mib": provenance.peak_memory(),
        "trainable_parameters": sum(
            int(np.prod(w.shape)) for w in model.trainable_weights
        ),
    }
    return results


def evaluate_classifier(model, x, labels, batch_size=None):
    """The metrics of a model whose outputs are logits."""
    logits = predict_logits(model, x, batch_size)
    return classification_metrics(scipy.special.softmax(logits, axis=1), labels)


def predict_logits(model, x, batch_size=None):
    """Float64 array of shape `(examples, classes)`."""
    logits = keras.Model.predict(model, x, batch_size=batch_size, verbose=0)
    return np.asarray(logits, "float64")
