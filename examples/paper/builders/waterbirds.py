"""Waterbirds: birds cut out and put before places that mislead."""

import collections
import csv

import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts

FOLDER = "waterbird_complete95_forest2water2"
URL = f"https://nlp.stanford.edu/data/dro/{FOLDER}.tar.gz"
# By their numbers in metadata.csv.
SPLITS = ("train", "validation", "test")
BIRDS = ("landbird", "waterbird")
PLACES = ("land", "water")
GROUPS = tuple(f"{bird} on {place}" for bird in BIRDS for place in PLACES)


class PaperWaterbirds(tfds.core.GeneratorBasedBuilder):
    """Birds of land or water, on a background of land or water.

    In the training split 95 % of the birds are where they belong. The group is
    `2 * label + place`.

    Reference: [Distributionally Robust Neural Networks for Group Shifts](
    https://arxiv.org/abs/1911.08731).
    """

    VERSION = tfds.core.Version("1.0.0")
    expected_counts = {
        "train": (3_498, 184, 56, 1_057),
        "validation": (467, 466, 133, 133),
        "test": (2_255, 2_255, 642, 642),
    }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Birds cut out of CUB-200-2011, on images of Places.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=BIRDS),
                    "place": tfds.features.ClassLabel(names=PLACES),
                    "group": tfds.features.ClassLabel(names=GROUPS),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/kohpangwei/group_DRO",
        )

    def _split_generators(self, dl_manager):
        folder = dl_manager.download_and_extract(URL) / FOLDER
        with open(folder / "metadata.csv", newline="") as file:
            rows = [
                {
                    "split": SPLITS[int(row["split"])],
                    "filename": row["img_filename"],
                    "label": int(row["y"]),
                    "place": int(row["place"]),
                    "group": 2 * int(row["y"]) + int(row["place"]),
                }
                for row in csv.DictReader(file)
            ]
        counts = collections.Counter(
            (row["split"], row["group"]) for row in rows
        )
        check_counts(
            self,
            {
                split: tuple(counts[split, group] for group in range(4))
                for split in SPLITS
            },
        )
        return {
            split: self._generate_examples(
                folder, [row for row in rows if row["split"] == split]
            )
            for split in SPLITS
        }

    def _generate_examples(self, folder, rows):
        for row in rows:
            yield (
                row["filename"],
                {
                    "image": folder / row["filename"],
                    "label": row["label"],
                    "place": row["place"],
                    "group": row["group"],
                },
            )
