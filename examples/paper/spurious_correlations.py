"""The paper's table of spurious correlations: three data sets with groups.

python -m examples.paper.spurious_correlations
python -m examples.paper.spurious_correlations --dataset waterbirds --seed 1

A group is a class together with what goes with it in training. The epoch is
chosen by the worst group of the validation data, and beside it by the average.
"""

import numpy as np
import tensorflow as tf

import keras_fvae
from examples.paper import harness
from examples.paper import images
from examples.paper import methods
from examples.paper import training
from examples.paper.builders import spuco_animals
from examples.paper.builders import waterbirds
from examples.paper.image_classification import FULL
from examples.paper.image_classification import SMALL
from examples.paper.image_classification import adapted_classifier
from examples.paper.image_classification import authors_settings
from examples.paper.image_classification import data_at_hand
from examples.paper.images import ImageDataset


def group_of(example):
    return example["group"]


def blond_hair(example):
    return tf.cast(example["attributes"]["Blond_Hair"], tf.int32)


def celeb_a_group(example):
    is_man = tf.cast(example["attributes"]["Male"], tf.int32)
    return 2 * blond_hair(example) + is_man


DATASETS = {
    "waterbirds": ImageDataset(
        "paper_waterbirds",
        "1.0.0",
        2,
        validation="validation",
        group=group_of,
        group_names=waterbirds.GROUPS,
    ),
    "celeb_a": ImageDataset(
        "celeb_a",
        "2.1.0",
        2,
        validation="validation",
        label=blond_hair,
        group=celeb_a_group,
        group_names=(
            "not blond, woman",
            "not blond, man",
            "blond, woman",
            "blond, man",
        ),
    ),
    "spuco_animals": ImageDataset(
        "paper_spuco_animals",
        "1.0.0",
        4,
        validation="validation",
        group=group_of,
        group_names=tuple(spuco_animals.GROUPS),
    ),
}
TINY = {
    "side": 16,
    "batch_size": 16,
    "num_examples": 48,
    "epochs": 2,
    "is_tiny": True,
}
SIZES = {
    "full": harness.Size(6, harness.SEEDS, FULL | {"epochs": 20}),
    "small": harness.Size(6, harness.SEEDS, FULL | SMALL),
    "tiny": harness.Size(2, (1,), TINY),
}


def run(dataset, method_name, settings, seed, size):
    """Fine-tunes on a data set with groups, and measures each group.

    Args:
        dataset: `ImageDataset` with groups.
        method_name: String, a key of `METHODS`.
        settings: Dict, what `search` gives.
        seed: Integer.
        size: Dict, the settings of a size.

    Returns:
        Dict of `validation_score`, that of the worst group; `test`, at the
        epoch with the best worst group and at that with the best average; and
        what the run took.
    """
    with data_at_hand(dataset, size):
        train, validation, test = images.load_parts(dataset, seed, size)
        groups = {
            part: images.labels_and_groups(dataset, part, seed, size)
            for part in ("train", "validation", "test")
        }
        names, counts = np.unique(groups["train"][1], return_counts=True)
        num_steps = size["epochs"] * int(train.cardinality())
        model, inference_parameters = adapted_classifier(
            dataset, method_name, settings, seed, size, num_steps
        )
        worst_group = keras_fvae.WorstGroupAccuracy(
            images.without_labels(validation), *groups["validation"]
        )
        chosen_by = {
            name: training.BestWeights(name)
            for name in ("worst_group_accuracy", "mean_group_accuracy")
        }
        measured = training.fit(
            model,
            train,
            None,
            size["epochs"],
            [worst_group, *chosen_by.values()],
            size["backup"],
        )
        measured["cost"]["inference_parameters"] = inference_parameters
        tested = {}
        for name, best in chosen_by.items():
            best.restore()
            accuracy = keras_fvae.evaluate_groups(
                model, images.without_labels(test), *groups["test"]
            )
            # The custom for Waterbirds, whose test groups are evened out.
            by_group = [accuracy.accuracies.get(name, 0.0) for name in names]
            mean = np.average(by_group, weights=counts)
            tested[f"chosen_by_{name}"] = {
                **accuracy.to_dict(),
                "mean_by_training_shares": float(mean),
            }
        return {
            "validation_score": chosen_by["worst_group_accuracy"].best,
            "test": tested,
            **measured,
        }


TABLE = harness.Table(
    name="spurious_correlations",
    version=1,
    datasets=DATASETS,
    default_datasets=tuple(DATASETS),
    methods=methods.PAPER_METHODS,
    authors_settings=authors_settings,
    run=run,
    sizes=SIZES,
)

if __name__ == "__main__":
    harness.main(TABLE, __doc__)
