"""Table 1 of the paper, and its ablation: six image data sets, ViT-B/16.

python -m examples.paper.image_classification
python -m examples.paper.image_classification --dataset dtd \\
    --method fvae_lora --seed 1

With `--authors --dataset dtd_halves` and the like, the epoch is chosen on a
half of the test split, as in the authors' code; by default it is on a tenth of
what they train on. VAE2LAT and beta-VAE2LAT are the ablation.
"""

import contextlib
import dataclasses

import keras
import keras_hub

from examples.paper import harness
from examples.paper import images
from examples.paper import methods
from examples.paper import mock
from examples.paper import search
from examples.paper import training
from examples.paper.images import ImageDataset

PRESET = "vit_base_patch16_224_imagenet21k"
RANK = 16
# The paper's six. SVHN's halves would both be the whole test split: that is
# what the authors' code chooses the epoch by.
DATASETS = {
    "dtd": ImageDataset("dtd", "3.0.1", 47, train="train+validation"),
    "eurosat": ImageDataset(
        "eurosat/rgb",
        "2.0.0",
        10,
        train="train[:80%]",
        validation="train[80%:90%]",
        test="train[90%:]",
    ),
    "gtsrb": ImageDataset("paper_gtsrb", "1.0.0", 43),
    "resisc45": ImageDataset(
        "paper_resisc45", "1.0.0", 45, validation="validation"
    ),
    "sun397": ImageDataset("paper_sun397", "1.0.0", 397),
    "svhn": ImageDataset("svhn_cropped", "3.1.0", 10),
}
HALVES = {
    f"{name}_halves": dataclasses.replace(dataset, validation=None, halves=True)
    for name, dataset in DATASETS.items()
    if name != "svhn"
} | {"svhn_halves": dataclasses.replace(DATASETS["svhn"], validation="test")}
SMALL = {"num_examples": 1000, "epochs": 10}
FULL = {
    "side": 224,
    "batch_size": 64,
    "num_examples": None,
    "epochs": 50,
    "patience": 5,
    "is_tiny": False,
}
SIZES = {
    "full": harness.Size(6, harness.SEEDS, FULL),
    "small": harness.Size(6, harness.SEEDS, FULL | SMALL),
    "tiny": harness.Size(
        2,
        (1,),
        {
            "side": 16,
            "batch_size": 16,
            "num_examples": 32,
            "epochs": 2,
            "patience": 5,
            "is_tiny": True,
        },
    ),
}


def authors_settings(name):
    """As the authors' script trains a method; `protocols` in the README."""
    method = methods.METHODS[name]
    learning_rate = 1e-4 if method.trains_backbone else 5e-3
    options = {}
    if name in ("lora", "rslora", "ffa_lora"):
        options = {"dropout": 0.1}
    if method.elbo_choices:
        # Their scale of the update is 8 / 16.
        options = {"alpha": 8.0}
    return search.authors_settings(method, learning_rate, options)


def make_classifier(num_classes, settings):
    """A pretrained ViT with a new head, or a toy."""
    if settings["is_tiny"]:
        side = settings["side"]
        backbone = keras_hub.models.ViTBackbone(
            image_shape=(side, side, 3),
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
        )
        return keras_hub.models.ViTImageClassifier(
            backbone, num_classes=num_classes, preprocessor=None
        )
    with harness.required(f"The preset '{PRESET}'"):
        classifier = keras_hub.models.ViTImageClassifier.from_preset(
            PRESET, num_classes=num_classes
        )
    classifier.preprocessor = None
    return classifier


def adapted_classifier(dataset, method_name, settings, seed, size, num_steps):
    """A compiled classifier that a method has adapted.

    Returns:
        Pair: `keras.Model`, and the parameters that inference needs beside
        the base model and the head.
    """
    model = make_classifier(dataset.num_classes, size)
    inference_parameters = methods.adapt(
        method_name, model.backbone, RANK, settings, seed
    )
    model.compile(
        training.make_optimizer(settings, num_steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model, inference_parameters


def data_at_hand(dataset, size):
    """A context: at the size tiny, pictures that are made up stand in."""
    if size["is_tiny"]:
        return mock.pictures(dataset)
    return contextlib.nullcontext()


def run(dataset, method_name, settings, seed, size):
    """Fine-tunes on a data set; measures it at the epoch that was best.

    Args:
        dataset: `ImageDataset`.
        method_name: String, a key of `METHODS`.
        settings: Dict, what `search` gives.
        seed: Integer.
        size: Dict, the settings of a size.

    Returns:
        Dict of `validation_score`, `test` and what the run took.
    """
    with data_at_hand(dataset, size):
        train, validation, test = images.load_parts(dataset, seed, size)
        labels, _ = images.labels_and_groups(dataset, "test", seed, size)
        num_steps = size["epochs"] * int(train.cardinality())
        model, inference_parameters = adapted_classifier(
            dataset, method_name, settings, seed, size, num_steps
        )
        best = training.BestWeights("val_accuracy", size["patience"])
        measured = training.fit(
            model, train, validation, size["epochs"], [best], size["backup"]
        )
        best.restore()
        measured["cost"]["inference_parameters"] = inference_parameters
        return {
            "validation_score": best.best,
            "test": training.evaluate_classifier(
                model, images.without_labels(test), labels
            ),
            **measured,
        }


TABLE = harness.Table(
    name="image_classification",
    version=1,
    datasets=DATASETS | HALVES,
    default_datasets=tuple(DATASETS),
    authors_datasets=tuple(HALVES),
    methods=methods.PAPER_METHODS,
    authors_settings=authors_settings,
    run=run,
    sizes=SIZES,
)

if __name__ == "__main__":
    harness.main(TABLE, __doc__)
