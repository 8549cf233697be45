"""The commonsense mixtures of LLM-Adapters, and what they are evaluated on."""

import tensorflow_datasets as tfds

from examples.paper.builders.llm_adapters import LLMAdaptersTexts

# How many questions the evaluation files have.
TASKS = {
    "boolq": 3_270,
    "piqa": 1_838,
    "social_i_qa": 1_954,
    "hellaswag": 10_042,
    "winogrande": 1_267,
    "ARC-Easy": 2_376,
    "ARC-Challenge": 1_172,
    "openbookqa": 500,
}


class PaperCommonsense(LLMAdaptersTexts):
    """The training questions of all eight tasks, or a sample of them."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="commonsense_170k"),
        tfds.core.BuilderConfig(name="commonsense_15k"),
    ]

    @property
    def files(self):
        return {"train": f"ft-training_set/{self.builder_config.name}.json"}

    @property
    def expected_counts(self):
        # How many the sample has is not known here.
        is_whole = self.builder_config.name == "commonsense_170k"
        return {"train": 170_420} if is_whole else {}


class PaperCommonsenseEvaluation(LLMAdaptersTexts):
    """The questions of one task.

    They are the public test split of ARC and OpenBookQA, and the public
    validation split of the others. The paper's table leaves BoolQ out.
    """

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=task) for task in TASKS]

    @property
    def files(self):
        return {"test": f"dataset/{self.builder_config.name}/test.json"}

    @property
    def expected_counts(self):
        return {"test": TASKS[self.builder_config.name]}
