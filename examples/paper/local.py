"""A table for every machine: data and models that install as packages.

python -m examples.paper.local
python -m examples.paper.local --dataset docstrings --method lora fvae_lora

digits: a small vision transformer that was pretrained on handwritten digits is
adapted to others, turned by a quarter. spurious_digits: to tell 0 to 4 from 5
to 9, in colours that go with the label in training.

resnet_digits: the turned digits, enlarged, by a small ResNet whose convolutions
of size 1 are adapted; resnet_digits_all_convolutions: the larger ones, too,
which FVAE-LoRA refuses.

emoji: to tell of which group an emoji is, by EfficientNet-Lite0, whose last
three convolutions of size 1 are adapted. Those of one designer are trained on;
other emoji, by that designer and by another one, are tested on.

The others are texts, for all-MiniLM-L6-v2, of whose six blocks the upper two
are adapted. docstrings: to tell which package of Python's standard library a
docstring is from. marked_docstrings: the same, after a word that goes with the
package in training. kinds: whether a docstring is of a module, a class or a
function; what is tested on is of other packages. glosses: to tell what kind of
thing a gloss of WordNet is about.

digits, docstrings and glosses are there in situations, too, by names such as
digits_5_a_class and docstrings_40_percent_wrong: with few training examples,
or with wrong labels.
"""

import contextlib
import math

import keras
import scipy.special

import keras_fvae
from examples.paper import harness
from examples.paper import local_digits
from examples.paper import local_emoji
from examples.paper import local_resnet
from examples.paper import local_texts
from examples.paper import methods
from examples.paper import metrics
from examples.paper import search
from examples.paper import situations
from examples.paper import training

RANK = 8
BATCH_SIZE = 32
NUM_SAMPLES = 16
FULL = {"num_examples": None, "is_tiny": False}
TINY = {"num_examples": 32, "is_tiny": True}
SIZES = {
    "full": harness.Size(16, tuple(range(1, 11)), FULL),
    "small": harness.Size(3, (1, 2, 3), FULL),
    "tiny": harness.Size(2, (1,), TINY),
}


def authors_settings(name):
    """As for images; of small models the full fine-tuning is a bit faster."""
    method = methods.METHODS[name]
    learning_rate = 3e-4 if method.trains_backbone else 5e-3
    return search.authors_settings(method, learning_rate, {})


def run(dataset, method_name, settings, seed, size):
    """Fine-tunes on a data set; measures the best epoch.

    Args:
        dataset: `local_data.LocalDataset`.
        method_name: String, a key of `METHODS`.
        settings: Dict, what `search` gives.
        seed: Integer.
        size: Dict, the settings of a size.

    Returns:
        Dict of what `measure_validation` returns, and `measure_test` but for
        trials, and what the run took.
    """
    method = methods.METHODS[method_name]
    is_tiny = size["is_tiny"]
    with dataset.stand_in() if is_tiny else contextlib.nullcontext():
        parts = dataset.load(seed)
    if size["num_examples"]:
        parts = {
            name: part.take(slice(size["num_examples"]))
            for name, part in parts.items()
        }
    model = dataset.make_classifier(seed)
    inference_parameters = methods.adapt(
        method_name,
        model.backbone,
        RANK,
        settings,
        seed,
        dataset.target_layer_names,
    )
    epochs = 2 if is_tiny else dataset.epochs
    num_batches = math.ceil(len(parts["train"].labels) / BATCH_SIZE)
    model.compile(
        training.make_optimizer(settings, epochs * num_batches),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    best = training.BestWeights("val_accuracy")
    trained = training.fit(
        model,
        (parts["train"].x, parts["train"].labels),
        (parts["validation"].x, parts["validation"].labels),
        epochs,
        callbacks=[best, *(make() for make in method.callbacks)],
        batch_size=BATCH_SIZE,
        verbose=0,
    )
    best.restore()
    trained["cost"]["inference_parameters"] = inference_parameters
    validation = parts["validation"]
    logits = training.predict_logits(model, validation.x)
    measured = measure_validation(model, validation, logits)
    if not size["is_trial"]:
        temperature = metrics.best_temperature(logits, validation.labels)
        measured |= measure_test(model, parts, temperature, seed)
    return {**measured, **trained}


def measure_validation(model, part, logits):
    """What a trained model is chosen by.

    Args:
        model: `keras.Model` whose outputs are logits.
        part: `local_data.Part`.
        logits: Array, the model's outputs for it.

    Returns:
        Dict of `validation_score`, and of "validation", the metrics.
    """
    validation = metrics.classification_metrics(
        scipy.special.softmax(logits, axis=1), part.labels
    )
    validation |= measure_groups(model, part)
    score = validation.get("worst", validation["accuracy"])
    return {"validation_score": score, "validation": validation}


def measure_groups(model, part):
    """Dict of the accuracies of the groups, if there are any."""
    if part.groups is None:
        return {}
    groups = keras_fvae.evaluate_groups(model, part.x, part.labels, part.groups)
    return groups.to_dict()


def measure_test(model, parts, temperature, seed):
    """All else that is measured of a trained model.

    Args:
        model: `keras.Model` whose outputs are logits.
        parts: Dict of name to `local_data.Part`.
        temperature: Float, which was chosen on the validation data.
        seed: Integer, what is drawn.

    Returns:
        Dict of "train" and "test", the metrics of each; of "calibrated", those
        of the test with the temperature; and, where the method draws, of
        "sampled", those of the test by the mean of samples.
    """
    logits = {
        name: training.predict_logits(model, parts[name].x)
        for name in ("train", "test", "foreign")
    }
    probabilities = {
        name: scipy.special.softmax(values, axis=1)
        for name, values in logits.items()
    }
    measured = {
        name: metrics.classification_metrics(
            probabilities[name], parts[name].labels
        )
        for name in ("train", "test")
    }
    measured["test"] |= measure_groups(model, parts["test"])
    measured["test"]["foreign_auroc"] = metrics.foreign_auroc(
        probabilities["test"], probabilities["foreign"]
    )
    calibrated = scipy.special.softmax(logits["test"] / temperature, axis=1)
    measured["calibrated"] = {
        "temperature": temperature,
        **metrics.classification_metrics(calibrated, parts["test"].labels),
    }
    if draws(model):
        measured["sampled"] = metrics.classification_metrics(
            sampled_probabilities(model, parts["test"].x, seed),
            parts["test"].labels,
        )
    return measured


def draws(model):
    """Whether the adapters of a model draw anything."""
    try:
        with keras_fvae.adapter_sampling(model):
            return True
    except ValueError:
        return False


def sampled_probabilities(model, x, seed):
    """Array of shape `(examples, classes)`, the mean over samples."""
    samples = keras_fvae.predict_samples(model, x, NUM_SAMPLES, seed=seed)
    return scipy.special.softmax(samples.astype("float64"), axis=-1).mean(0)


TABLE = harness.Table(
    name="local",
    version=3,
    datasets={
        **situations.in_all("digits", local_digits.DIGITS),
        "spurious_digits": local_digits.SPURIOUS_DIGITS,
        **situations.in_all("docstrings", local_texts.DOCSTRINGS),
        "marked_docstrings": local_texts.MARKED_DOCSTRINGS,
        "kinds": local_texts.KINDS,
        **situations.in_all("glosses", local_texts.GLOSSES),
        "emoji": local_emoji.EMOJI,
        "resnet_digits": local_resnet.CONVOLUTIONS_OF_SIZE_1,
        "resnet_digits_all_convolutions": local_resnet.ALL_CONVOLUTIONS,
    },
    default_datasets=("digits", "spurious_digits", "docstrings"),
    methods=methods.LOCAL_METHODS,
    authors_settings=authors_settings,
    run=run,
    sizes=SIZES,
)

if __name__ == "__main__":
    harness.main(TABLE, __doc__)
