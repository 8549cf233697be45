"""Data sets that TensorFlow Datasets lacks, or has otherwise.

Importing this package registers them, so that `tfds.load("paper_gtsrb")` finds
them. Every name starts with `paper_`, because TensorFlow Datasets itself has a
`resisc45` and a `sun397`, with other splits or from a host that is gone. What
the sources call "val" or "dev" is the split `validation`, as elsewhere in
TensorFlow Datasets.
"""

from examples.paper.builders.commonsense import PaperCommonsense
from examples.paper.builders.commonsense import PaperCommonsenseEvaluation
from examples.paper.builders.emoji import PaperEmoji
from examples.paper.builders.gtsrb import PaperGtsrb
from examples.paper.builders.resisc45 import PaperResisc45
from examples.paper.builders.social_i_qa import PaperSocialIQa
from examples.paper.builders.spuco_animals import PaperSpucoAnimals
from examples.paper.builders.sun397 import PaperSun397
from examples.paper.builders.timit import PaperTimit
from examples.paper.builders.waterbirds import PaperWaterbirds
from examples.paper.builders.wordnet_glosses import PaperWordnetGlosses

__all__ = [
    "PaperCommonsense",
    "PaperCommonsenseEvaluation",
    "PaperEmoji",
    "PaperGtsrb",
    "PaperResisc45",
    "PaperSocialIQa",
    "PaperSpucoAnimals",
    "PaperSun397",
    "PaperTimit",
    "PaperWaterbirds",
    "PaperWordnetGlosses",
]
