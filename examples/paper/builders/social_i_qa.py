"""Social IQa, questions on how people act and feel."""

from examples.paper.builders.llm_adapters import LLMAdaptersTexts


class PaperSocialIQa(LLMAdaptersTexts):
    """Questions with three options; `test` is the public validation split."""

    files = {
        "train": "dataset/social_i_qa/train.json",
        "test": "dataset/social_i_qa/test.json",
    }
    expected_counts = {"train": 33_410, "test": 1_954}
