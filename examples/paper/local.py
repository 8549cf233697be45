"""A table for every machine: data and models that install as packages.

python -m examples.paper.local
python -m examples.paper.local --dataset docstrings --method lora fvae_lora

digits: a small vision transformer that was pretrained on handwritten digits is
adapted to others, turned by a quarter. spurious_digits: to tell 0 to 4 from 5
to 9, in colours that go with the label in training. docstrings: to tell which
package of Python's standard library a docstring is from, by all-MiniLM-L6-v2,
of whose six blocks the upper two are adapted.
"""

import math

import keras

import keras_fvae
from examples.paper import harness
from examples.paper import local_data
from examples.paper import methods
from examples.paper import search
from examples.paper import training

RANK = 8
BATCH_SIZE = 32
FULL = {"epochs": 15, "num_examples": None, "is_tiny": False}
TINY = {"epochs": 2, "num_examples": 32, "is_tiny": True}
SIZES = {
    "full": harness.Size(6, (1, 2, 3, 4, 5), FULL),
    "small": harness.Size(3, (1, 2, 3), FULL),
    "tiny": harness.Size(2, (1,), TINY),
}


def authors_settings(name):
    """As for images; of small models the full fine-tuning is a bit faster."""
    method = methods.METHODS[name]
    learning_rate = 3e-4 if method.trains_backbone else 5e-3
    return search.authors_settings(method, learning_rate, {})


def run(dataset, method_name, settings, seed, size):
    """Fine-tunes on a data set; measures it at the end.

    Args:
        dataset: `local_data.LocalDataset`.
        method_name: String, a key of `METHODS`.
        settings: Dict, what `search` gives.
        seed: Integer.
        size: Dict, the settings of a size.

    Returns:
        Dict of `validation_score`, `test` and what the run took.
    """
    parts = dataset.load(seed)
    if size["num_examples"]:
        parts = {
            name: part.take(slice(size["num_examples"]))
            for name, part in parts.items()
        }
    model = dataset.make_classifier(seed, size["is_tiny"])
    inference_parameters = methods.adapt(
        method_name, model.backbone, RANK, settings, seed
    )
    num_batches = math.ceil(len(parts["train"].labels) / BATCH_SIZE)
    model.compile(
        training.make_optimizer(settings, size["epochs"] * num_batches),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    measured = training.fit(
        model,
        (parts["train"].x, parts["train"].labels),
        (parts["validation"].x, parts["validation"].labels),
        size["epochs"],
        batch_size=BATCH_SIZE,
    )
    measured["cost"]["inference_parameters"] = inference_parameters
    validation, test = (
        measure(model, parts[n]) for n in ("validation", "test")
    )
    return {
        "validation_score": validation.get("worst", validation["accuracy"]),
        "validation": validation,
        "test": test,
        **measured,
    }


def measure(model, part):
    """The metrics of a part, with those of its groups if there are any."""
    measured = training.evaluate_classifier(model, part.x, part.labels)
    if part.groups is not None:
        measured |= keras_fvae.evaluate_groups(
            model, part.x, part.labels, part.groups
        ).to_dict()
    return measured


TABLE = harness.Table(
    name="local",
    version=2,
    datasets=local_data.DATASETS,
    default_datasets=tuple(local_data.DATASETS),
    methods=tuple(methods.METHODS),
    authors_settings=authors_settings,
    run=run,
    sizes=SIZES,
)

if __name__ == "__main__":
    harness.main(TABLE, __doc__)
