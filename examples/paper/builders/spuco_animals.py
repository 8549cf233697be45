"""SpuCoAnimals: birds and dogs before backgrounds that mislead."""

import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts

URLS = {
    "spuco_birds": (
        "https://ucla.box.com/shared/static/zrsx09ik7lqad1e389w06f1c4nbajo9z"
    ),
    "spuco_dogs": (
        "https://ucla.box.com/shared/static/u3dkllvq7a2py4x443pqul295wwd549e"
    ),
}
# As the folders are named.
SPLITS = {"train": "train", "validation": "val", "test": "test"}
ANIMALS = ("landbirds", "waterbirds", "small_dogs", "big_dogs")
BACKGROUNDS = ("land", "water", "indoor", "outdoor")
# The archive of each group.
GROUPS = {
    "landbirds/land": "spuco_birds",
    "landbirds/water": "spuco_birds",
    "waterbirds/land": "spuco_birds",
    "waterbirds/water": "spuco_birds",
    "small_dogs/indoor": "spuco_dogs",
    "small_dogs/outdoor": "spuco_dogs",
    "big_dogs/indoor": "spuco_dogs",
    "big_dogs/outdoor": "spuco_dogs",
}


class PaperSpucoAnimals(tfds.core.GeneratorBasedBuilder):
    """Birds of land or water, dogs small or big, on two backgrounds each.

    Reference: [Towards Mitigating Spurious Correlations in the Wild](
    https://arxiv.org/abs/2306.11957).
    """

    VERSION = tfds.core.Version("1.0.0")
    expected_counts = {
        "train": (10_000, 500, 500, 10_000) * 2,
        "validation": (500, 25, 25, 500) * 2,
        "test": (500, 500, 500, 500) * 2,
    }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Animals of ImageNet, on backgrounds of two kinds.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=ANIMALS),
                    "background": tfds.features.ClassLabel(names=BACKGROUNDS),
                    "group": tfds.features.ClassLabel(names=list(GROUPS)),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/BigML-CS-UCLA/SpuCo",
            license="The images are ImageNet's, whose terms apply.",
        )

    def _split_generators(self, dl_manager):
        # The URLs do not say what they are of.
        folders = dl_manager.download_and_extract(
            {
                archive: tfds.download.Resource(
                    url=url, extract_method=tfds.download.ExtractMethod.TAR_GZ
                )
                for archive, url in URLS.items()
            }
        )
        paths = {
            split: {
                group: sorted(
                    (folders[archive] / archive / name / group).glob("*")
                )
                for group, archive in GROUPS.items()
            }
            for split, name in SPLITS.items()
        }
        check_counts(
            self,
            {split: tuple(map(len, paths[split].values())) for split in paths},
        )
        return {split: self._generate_examples(paths[split]) for split in paths}

    def _generate_examples(self, paths):
        for group in paths:
            label, background = group.split("/")
            for path in paths[group]:
                yield (
                    f"{group}/{path.name}",
                    {
                        "image": path,
                        "label": label,
                        "background": background,
                        "group": group,
                    },
                )
