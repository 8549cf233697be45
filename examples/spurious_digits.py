"""Does FVAE-LoRA lean on a colour that goes with the label, or not?

Scikit-learn's handwritten digits, coloured: the task is to tell 0 to 4 from 5
to 9, and in 95 % of the training images the colour says which. In the test
every image is shown in both colours, so that the colour says nothing. A small
vision transformer, pretrained on other digits without colour, is adapted by
each method with the same budget and the same search:

    python examples/spurious_digits.py

In a minute or two, to see that it runs: `--quick`.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import warnings

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--backend",
    choices=["jax", "tensorflow", "torch"],
    default=os.environ.get("KERAS_BACKEND", "jax"),
    help="default: $KERAS_BACKEND, else jax",
)
parser.add_argument(
    "--quick",
    action="store_true",
    help="a few steps of everything; the figures mean nothing then",
)
parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("output"),
    metavar="FOLDER",
    help="where the figures and the pictures go (default: output)",
)
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import matplotlib.figure
import numpy as np
import scipy.stats
import sklearn.datasets
import sklearn.model_selection
from keras import ops

import keras_fvae

# KerasHub's models shuffle arrays as well, but Keras cannot see it.
warnings.filterwarnings("ignore", message=".*shuffle=True")

RANK = 8
AGREEMENT = 0.95
COLORS = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25]])
COLOR_NAMES = ("red", "green")
LABEL_NAMES = ("0-4", "5-9")
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Budget:
    pretraining_epochs: int
    epochs: int
    learning_rates: tuple
    # Weight decay, and for what has an ELBO its weight: three values each.
    weight_decays: tuple
    elbo_weights: tuple
    search_seeds: tuple
    seeds: tuple


FULL = Budget(
    pretraining_epochs=60,
    epochs=20,
    learning_rates=(1e-3, 4e-3, 1.6e-2),
    weight_decays=(0.0, 0.01, 0.1),
    elbo_weights=(1e-4, 1e-3, 1e-2),
    search_seeds=(100, 101),
    seeds=(0, 1, 2, 3, 4),
)
QUICK = Budget(
    pretraining_epochs=1,
    epochs=1,
    learning_rates=(2e-3,),
    weight_decays=(0.0,),
    elbo_weights=(1e-3,),
    search_seeds=(100,),
    seeds=(0, 1),
)
BUDGET = QUICK if arguments.quick else FULL


def main():
    pretraining, rest = read_digits()
    pretrained = pretrain(*pretraining)
    results = {}
    for name, adapt in METHODS.items():
        settings = search(pretrained, rest, name, adapt)
        runs = [
            run(pretrained, split(*rest, seed), adapt, settings, seed)
            for seed in BUDGET.seeds
        ]
        results[name] = {
            "settings": settings,
            "trainable": runs[0]["trainable"],
            "runs": [r["groups"].to_dict() for r in runs],
            "probes": runs[0]["probes"],
        }
        worst, half = interval([r["groups"].worst for r in runs])
        print(f"{name}: {settings}, worst group {worst:.3f} ± {half:.3f}")
        if name == "FVAE-LoRA":
            print(f"\nIts groups with seed {BUDGET.seeds[0]}:")
            print(runs[0]["groups"], end="\n\n")
            save_pictures(runs[0])
    print_table(results)
    print_probes(results)
    plot_results(results).savefig(
        arguments.output / "spurious_digits.png", dpi=150
    )
    for result in results.values():
        result["probes"] = result["probes"] and result["probes"].to_dicts()
    path = arguments.output / "spurious_digits.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"\nAll figures are in {path}, and the pictures beside it.")


def read_digits():
    """Digits to pretrain on, and the others: pairs of images and digits."""
    digits = sklearn.datasets.load_digits()
    images = (digits.images / 16.0).astype("float32")
    first, others, first_labels, other_labels = (
        sklearn.model_selection.train_test_split(
            images,
            digits.target,
            train_size=900,
            stratify=digits.target,
            random_state=0,
        )
    )
    return (first, first_labels), (others, other_labels)


def color(images, colors):
    """RGB images from grey ones, in the colour of each."""
    return images[..., None] * COLORS[colors][:, None, None].astype("float32")


@dataclasses.dataclass(frozen=True)
class Part:
    x: np.ndarray
    labels: np.ndarray
    colors: np.ndarray

    @property
    def groups(self):
        pairs = zip(self.labels, self.colors)
        return [f"{LABEL_NAMES[y]}, {COLOR_NAMES[c]}" for y, c in pairs]


def split(images, digits, seed):
    """Parts to train, validate and test on; other ones with each seed."""
    rng = np.random.default_rng(seed)
    labels = (digits >= 5).astype(int)
    train, others = sklearn.model_selection.train_test_split(
        np.arange(len(images)),
        train_size=450,
        stratify=digits,
        random_state=seed,
    )
    validation, test = sklearn.model_selection.train_test_split(
        others, train_size=150, stratify=digits[others], random_state=seed
    )
    agrees = rng.random(len(train)) < AGREEMENT
    colors = np.where(agrees, labels[train], 1 - labels[train])
    parts = [Part(color(images[train], colors), labels[train], colors)]
    for indices in (validation, test):
        # Once in each colour.
        indices = np.concatenate([indices, indices])
        colors = np.repeat([0, 1], len(indices) // 2)
        parts.append(
            Part(color(images[indices], colors), labels[indices], colors)
        )
    return parts


def make_backbone():
    return keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,
        num_layers=4,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
    )


def make_classifier(backbone, num_classes):
    return keras_hub.models.ViTImageClassifier(
        backbone, num_classes=num_classes, preprocessor=None, pooling="gap"
    )


def compile_model(model, learning_rate, weight_decay, num_steps):
    """As the authors train: AdamW, a warm-up over 10 %, clipping."""
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=num_steps - num_steps // 10,
        warmup_target=learning_rate,
        warmup_steps=num_steps // 10,
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule, weight_decay=weight_decay, global_clipnorm=1.0
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def pretrain(images, digits):
    """The weights of a backbone that tells all ten digits without colour."""
    keras.utils.set_random_seed(0)
    model = make_classifier(make_backbone(), num_classes=10)
    x = np.repeat(images[..., None], 3, axis=-1)
    shift = keras.layers.RandomTranslation(0.125, 0.125, fill_mode="constant")
    num_steps = BUDGET.pretraining_epochs * math.ceil(len(x) / BATCH_SIZE)
    compile_model(model, 2e-3, 0.01, num_steps)
    for _ in range(BUDGET.pretraining_epochs):
        shifted = ops.convert_to_numpy(shift(x, training=True))
        model.fit(shifted, digits, batch_size=BATCH_SIZE, verbose=0)
    accuracy = model.evaluate(x, digits, verbose=0)[1]
    print(f"Pretrained: {accuracy:.3f} of {len(x)} digits right.", flush=True)
    return model.backbone.get_weights()


def enable_lora(backbone):
    keras_fvae.enable_adapter(
        backbone, keras_fvae.LoRAConfig(RANK), ["query", "value"]
    )


def freeze(backbone):
    backbone.trainable = False


def enable_keras_lora(backbone):
    backbone.enable_lora(RANK)


def enable_fvae_lora(backbone, elbo_weight, **options):
    backbone.enable_fvae_lora(rank=RANK, elbo_weight=elbo_weight, **options)


METHODS = {
    "head only": freeze,
    "full fine-tuning": lambda backbone: None,
    "LoRA": enable_lora,
    "KerasHub's LoRA": enable_keras_lora,
    "VAE2LAT": functools.partial(enable_fvae_lora, objective="vae2lat"),
    "beta-VAE2LAT": functools.partial(
        # The larger one of those that the authors search.
        enable_fvae_lora,
        objective="beta_vae2lat",
        kl_weight=10.0,
    ),
    "FVAE-LoRA": enable_fvae_lora,
}


def search(pretrained, rest, name, adapt):
    """The settings with the best worst group of the validation images.

    Each method has as many to choose from: a learning rate, and a weight decay
    or, if it has an ELBO, the weight of that.
    """
    key, values = "weight_decay", BUDGET.weight_decays
    if name in ("VAE2LAT", "beta-VAE2LAT", "FVAE-LoRA"):
        key, values = "elbo_weight", BUDGET.elbo_weights
    candidates = [
        {"learning_rate": rate, key: value}
        for rate, value in itertools.product(BUDGET.learning_rates, values)
    ]

    def score(settings):
        return np.mean(
            [
                train(pretrained, split(*rest, seed), adapt, settings, seed)[1]
                for seed in BUDGET.search_seeds
            ]
        )

    return max(candidates, key=score)


def train(pretrained, parts, adapt, settings, seed, callbacks=()):
    """A trained model, its worst group in validation, and its history."""
    training, validation, _ = parts
    settings = dict(settings)
    learning_rate = settings.pop("learning_rate")
    weight_decay = settings.pop("weight_decay", 0.01)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    backbone = make_backbone()
    backbone.set_weights(pretrained)
    model = make_classifier(backbone, num_classes=2)
    adapt(backbone, **settings)
    num_steps = BUDGET.epochs * math.ceil(len(training.x) / BATCH_SIZE)
    compile_model(model, learning_rate, weight_decay, num_steps)
    history = model.fit(
        training.x,
        training.labels,
        batch_size=BATCH_SIZE,
        epochs=BUDGET.epochs,
        verbose=0,
        callbacks=[*callbacks],
    )
    return model, evaluate(model, validation).worst, history


def evaluate(model, part):
    return keras_fvae.evaluate_groups(
        model, part.x, part.labels, part.groups, batch_size=256
    )


def run(pretrained, parts, adapt, settings, seed):
    """What comes out on the test images with one seed."""
    has_latents = "elbo_weight" in settings
    callbacks = [keras_fvae.FVAELoRAMonitor()] if has_latents else []
    model, _, history = train(
        pretrained, parts, adapt, settings, seed, callbacks
    )
    test = parts[2]
    result = {
        "groups": evaluate(model, test),
        "trainable": sum(math.prod(w.shape) for w in model.trainable_weights),
        "probes": None,
    }
    if has_latents and seed == BUDGET.seeds[0]:
        result["probes"] = keras_fvae.probe_latents(
            model, test.x, test.labels, {"color": test.colors}
        )
        result |= {
            "history": history,
            "test": test,
            "latents": keras_fvae.latents(model, test.x),
        }
    return result


def save_pictures(result):
    arguments.output.mkdir(parents=True, exist_ok=True)
    plots = keras_fvae.plots
    last_layer = list(result["latents"])[-1]
    figures = {
        "latents": plots.plot_latents(
            result["latents"][last_layer], result["test"].groups, last_layer
        ),
        "layers": plots.plot_layers(result["latents"]),
        "training": plots.plot_training(result["history"]),
        "probes": plots.plot_probes(result["probes"]),
    }
    for name, figure in figures.items():
        path = arguments.output / f"spurious_digits_{name}.png"
        figure.savefig(path, dpi=150)


def interval(values):
    """The mean, and half the width of its 95 % confidence interval."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    return float(np.mean(values)), float(half)


def print_table(results):
    def cell(values, sign=""):
        mean, half = interval(values)
        return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"

    def figures(name, figure):
        return np.array([r[figure] for r in results[name]["runs"]])

    print(
        f"\nOn the test images, in %: mean of {len(BUDGET.seeds)} seeds ± half "
        "the width of its 95 % confidence interval."
    )
    header = ["mean", "worst group", "gap", "worst - LoRA's", "trains"]
    print(" " * 16 + "".join(f"{name:>16}" for name in header))
    for name, result in results.items():
        difference = figures(name, "worst") - figures("LoRA", "worst")
        cells = [
            cell(figures(name, "mean")),
            cell(figures(name, "worst")),
            cell(figures(name, "gap")),
            "" if name == "LoRA" else cell(difference, "+"),
            f"{result['trainable']:,}",
        ]
        print(f"{name:16}" + "".join(f"{c:>16}" for c in cells))


def print_probes(results):
    print(
        "\nWhat linear probes read from the latents, in %: mean of the layers, "
        f"seed {BUDGET.seeds[0]}, chance 50."
    )
    columns = list(itertools.product(["label", "color"], ["z1", "z2"]))
    print(" " * 16 + "".join(f"{a} from {z}".rjust(16) for a, z in columns))
    for name, result in results.items():
        if result["probes"]:
            means = [
                100
                * np.mean(
                    [
                        probe.accuracy
                        for probe in result["probes"]
                        if (probe.attribute, probe.latent) == column
                    ]
                )
                for column in columns
            ]
            print(f"{name:16}" + "".join(f"{mean:16.1f}" for mean in means))


def plot_results(results):
    figure = matplotlib.figure.Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for index, figure_name in enumerate(["mean", "worst"]):
        intervals = [
            interval([run[figure_name] for run in result["runs"]])
            for result in results.values()
        ]
        means, halves = np.array(intervals).T
        axis.errorbar(
            means,
            np.arange(len(results)),
            xerr=halves,
            fmt=keras_fvae.plots.MARKERS[index],
            color=keras_fvae.plots.COLORS[index],
            capsize=2,
            label={"mean": "all", "worst": "worst group"}[figure_name],
        )
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    axis.set_xlabel("accuracy on the test images")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


if __name__ == "__main__":
    main()
