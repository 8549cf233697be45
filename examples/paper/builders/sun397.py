"""SUN397, the scenes of the Scene UNderstanding database."""

import tensorflow_datasets as tfds

from examples.paper.builders.parquet import ParquetImages
from examples.paper.builders.parquet import download_instructions


class PaperSun397(ParquetImages):
    """Photos of scenes, 397 classes: the first of the published partitions.

    The labels are numbers, because the order of the names is not known here.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = download_instructions(
        "paper_sun397", "tanganke/sun397"
    )
    expected_counts = {"train": 19_850, "test": 19_850}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="SUN397, partition 1: Training_01 and Testing_01.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(num_classes=397),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://huggingface.co/datasets/tanganke/sun397",
        )
