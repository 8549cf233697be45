"""RESISC45, scenes seen from above, in its published split."""

import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts

URL = (
    "https://huggingface.co/datasets/torchgeo/resisc45/resolve/"
    "a826b44d938a883185f11ebe3d512d38b464312f"
)
# As the lists of the split are named.
LISTS = {"train": "train", "validation": "val", "test": "test"}
SCENES = (
    "airplane",
    "airport",
    "baseball_diamond",
    "basketball_court",
    "beach",
    "bridge",
    "chaparral",
    "church",
    "circular_farmland",
    "cloud",
    "commercial_area",
    "dense_residential",
    "desert",
    "forest",
    "freeway",
    "golf_course",
    "ground_track_field",
    "harbor",
    "industrial_area",
    "intersection",
    "island",
    "lake",
    "meadow",
    "medium_residential",
    "mobile_home_park",
    "mountain",
    "overpass",
    "palace",
    "parking_lot",
    "railway",
    "railway_station",
    "rectangular_farmland",
    "river",
    "roundabout",
    "runway",
    "sea_ice",
    "ship",
    "snowberg",
    "sparse_residential",
    "stadium",
    "storage_tank",
    "tennis_court",
    "terrace",
    "thermal_power_station",
    "wetland",
)


class PaperResisc45(tfds.core.GeneratorBasedBuilder):
    """Images of 256 x 256 pixels from Google Earth, 45 classes.

    The split is that of [In-domain representation learning for remote sensing](
    https://arxiv.org/abs/1911.06721).
    """

    VERSION = tfds.core.Version("1.0.0")
    expected_counts = {"train": 18_900, "validation": 6_300, "test": 6_300}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="NWPU-RESISC45, in the split of arXiv 1911.06721.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(256, 256, 3)),
                    "label": tfds.features.ClassLabel(names=SCENES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://huggingface.co/datasets/torchgeo/resisc45",
        )

    def _split_generators(self, dl_manager):
        lists = dl_manager.download(
            {
                split: f"{URL}/resisc45-{name}.txt"
                for split, name in LISTS.items()
            }
        )
        filenames = {
            split: path.read_text().split() for split, path in lists.items()
        }
        check_counts(
            self, {split: len(names) for split, names in filenames.items()}
        )
        archive = dl_manager.download_and_extract(f"{URL}/NWPU-RESISC45.zip")
        folder = archive / "NWPU-RESISC45"
        return {
            split: self._generate_examples(folder, names)
            for split, names in filenames.items()
        }

    def _generate_examples(self, folder, filenames):
        for filename in filenames:
            # "sea_ice_001.jpg" is in the folder of its class, "sea_ice".
            scene, _ = filename.rsplit("_", 1)
            yield filename, {"image": folder / scene / filename, "label": scene}
