"""Instructions and answers in JSON files of LLM-Adapters."""

import json

import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts

URL = (
    "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/"
    "816657208af4db747803f87ba40a4c71383fed7a"
)
FIELDS = ("instruction", "input", "output", "answer")


class LLMAdaptersTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads `files`, a dict from a split to its JSON file in the repository.

    The instruction names the options and how to name one: "the correct answer
    is answer3" is the output, "answer3" the answer. The input is empty.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Multiple-choice questions as instructions.",
            features=tfds.features.FeaturesDict(
                {field: tfds.features.Text() for field in FIELDS}
            ),
            supervised_keys=("instruction", "output"),
            homepage="https://github.com/AGI-Edgerunners/LLM-Adapters",
            license="ODC-By (DATA_LICENSE of the repository)",
        )

    def _split_generators(self, dl_manager):
        paths = dl_manager.download(
            {split: f"{URL}/{file}" for split, file in self.files.items()}
        )
        rows = {
            split: json.loads(path.read_text(encoding="utf-8"))
            for split, path in paths.items()
        }
        check_counts(self, {split: len(rows[split]) for split in rows})
        return {split: self._generate_examples(rows[split]) for split in rows}

    def _generate_examples(self, rows):
        for index, row in enumerate(rows):
            yield index, {field: row[field] for field in FIELDS}
