"""Pretrains the networks that are adapted to digits, without colour.

python -m examples.paper.digit_pretraining

What it writes is kept in the repository, because the same pretraining comes
out otherwise on one core than on two, and with it what an adapter gains.
"""

import argparse
import pathlib

import keras
from keras import ops

from examples.paper import local_digits
from examples.paper import local_resnet

EPOCHS = 60


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--output", type=pathlib.Path, default=local_digits.WEIGHTS
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for make_classifier, enlarge, file in (
        (local_digits.make_vit_classifier, as_it_is, local_digits.VIT_WEIGHTS),
        (
            local_resnet.make_resnet_classifier,
            local_resnet.enlarge,
            local_resnet.RESNET_WEIGHTS,
        ),
    ):
        model = pretrain(make_classifier, enlarge, options.epochs)
        model.backbone.save_weights(options.output / file.name)
        print(f"{file.name}: {accuracy(model, enlarge):.3f} of other digits")


def as_it_is(pictures):
    return pictures


def pretrain(make_classifier, enlarge, num_epochs):
    """A classifier that has learned all ten digits.

    Args:
        make_classifier: Function that returns a KerasHub classifier of ten
            classes.
        enlarge: Function that makes of pictures of the digits' size what the
            classifier takes.
        num_epochs: Integer.

    Returns:
        KerasHub classifier.
    """
    (pictures, digits), _ = local_digits.read_digits()
    keras.utils.set_random_seed(0)
    model = make_classifier()
    model.compile(
        keras.optimizers.AdamW(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    shift = keras.layers.RandomTranslation(0.125, 0.125, fill_mode="constant")
    for _ in range(num_epochs):
        shifted = ops.convert_to_numpy(
            shift(local_digits.to_rgb(pictures), training=True)
        )
        # Of `keras.Model`, because KerasHub's own makes batches once more.
        keras.Model.fit(
            model, enlarge(shifted), digits, batch_size=32, verbose=0
        )
    return model


def accuracy(model, enlarge):
    """Float, of the digits that it was not pretrained on, upright."""
    _, (pictures, digits) = local_digits.read_digits()
    pictures = enlarge(local_digits.to_rgb(pictures))
    found = keras.Model.evaluate(
        model, pictures, digits, verbose=0, return_dict=True
    )
    return found["accuracy"]


if __name__ == "__main__":
    main()
