"""GTSRB, the German Traffic Sign Recognition Benchmark."""

import tensorflow_datasets as tfds

from examples.paper.builders.parquet import ParquetImages
from examples.paper.builders.parquet import download_instructions

# In the order of the benchmark's class ids.
SIGNS = (
    "speed limit 20 km/h",
    "speed limit 30 km/h",
    "speed limit 50 km/h",
    "speed limit 60 km/h",
    "speed limit 70 km/h",
    "speed limit 80 km/h",
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no overtaking",
    "no overtaking by lorries",
    "right of way at the next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no lorries",
    "no entry",
    "danger",
    "bend to the left",
    "bend to the right",
    "double bend",
    "uneven road",
    "slippery road",
    "road narrows",
    "road works",
    "traffic lights",
    "pedestrians",
    "children",
    "cyclists",
    "ice or snow",
    "wild animals",
    "end of all restrictions",
    "turn right",
    "turn left",
    "go straight",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking by lorries",
)


class PaperGtsrb(ParquetImages):
    """Photos of traffic signs, 43 classes; in sizes of their own."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = download_instructions(
        "paper_gtsrb", "tanganke/gtsrb"
    )
    expected_counts = {"train": 26_640, "test": 12_630}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="The German Traffic Sign Recognition Benchmark.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=SIGNS),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://huggingface.co/datasets/tanganke/gtsrb",
        )
