"""Emoji, each as two designers have drawn it."""

import json

import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts
from examples.paper.builders.checks import find_manual_files

DESIGNERS = ("google", "twitter")
# The groups of Unicode, but for "Component", the tones of skin.
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


class PaperEmoji(tfds.core.GeneratorBasedBuilder):
    """Emoji of Google's Noto Emoji and of Twitter's Twemoji, in nine groups.

    The pictures have four channels, the last of which is how opaque they are.
    Variants in other tones of skin are left out. It has one split.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
The folder MANUAL_DIR/paper_emoji must hold emoji.json, img/google/64 and
img/twitter/64 of the npm packages emoji-datasource-google (its pictures: Noto
Emoji, Apache License 2.0) and emoji-datasource-twitter (Twemoji, CC BY 4.0),
both with a licence of their own (MIT); they may be deeper inside:

mkdir -p MANUAL_DIR/paper_emoji && cd MANUAL_DIR/paper_emoji
npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
for file in *.tgz; do tar xzf $file; done

MANUAL_DIR is the `manual_dir` of `tfds.download.DownloadConfig`, by default
~/tensorflow_datasets/downloads/manual.
"""
    expected_counts = {"train": 1_906}

    def _info(self):
        picture = tfds.features.Image(shape=(64, 64, 4))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji as Google and Twitter have drawn them.",
            features=tfds.features.FeaturesDict(
                {
                    **dict.fromkeys(DESIGNERS, picture),
                    # As in "1F468-200D-1F33E".
                    "code_points": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=GROUPS),
                }
            ),
            homepage="https://github.com/iamcal/emoji-data",
            license="Noto Emoji: Apache License 2.0; Twemoji: CC BY 4.0",
        )

    def _split_generators(self, dl_manager):
        path, *_ = find_manual_files(self, dl_manager, "**/emoji.json")
        emoji = [
            entry
            for entry in json.loads(path.read_text(encoding="utf-8"))
            if entry["category"] in GROUPS
            and all(picture_path(path, entry, d).exists() for d in DESIGNERS)
        ]
        check_counts(self, {"train": len(emoji)})
        return {"train": self._generate_examples(path, emoji)}

    def _generate_examples(self, path, emoji):
        for entry in emoji:
            yield (
                entry["unified"],
                {
                    **{d: picture_path(path, entry, d) for d in DESIGNERS},
                    "code_points": entry["unified"],
                    "label": entry["category"],
                },
            )


def picture_path(path, entry, designer):
    """Path of a picture, beside emoji.json.

    Args:
        path: Path of emoji.json.
        entry: Dict, of an emoji there.
        designer: String, one of `DESIGNERS`.
    """
    return path.parent / "img" / designer / "64" / entry["image"]
