"""What stands in for questions and language models, at the size "tiny"."""

import tokenizers

from examples.paper import mock
from examples.paper.questions import TASKS

# Of each task, to learn from and to be asked.
NUM_TRAINING_QUESTIONS = 12
NUM_TEST_QUESTIONS = 4
# Those of Llama 3 and Qwen 3.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|endoftext|>",
)
WORDS = ("answer", "solution", "ending", "option", "correct")
# A mesh of eight devices divides the axes that are spread over it.
TOY = {
    "vocabulary_size": 320,
    "num_layers": 2,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}


def questions():
    """Has questions made up, inside a block.

    The instruction says which option is right, so that there is something to
    learn.
    """

    def make(builder, split):
        name = builder.builder_config.name
        # Those of the mixture are of all tasks.
        tasks = [name] if name in TASKS else list(TASKS)
        number = (
            NUM_TEST_QUESTIONS if split == "test" else NUM_TRAINING_QUESTIONS
        )
        rng = mock.generator_of(name)
        return [make_row(task, rng) for task in tasks for _ in range(number)]

    return mock.examples_from(make)


def make_row(task, rng):
    """A made-up row of a data set, in the form of the real ones."""
    word, highest = TASKS[task]
    names = [f"{word}{number}" for number in range(1, highest + 1)]
    number = rng.integers(highest)
    return {
        "instruction": (
            f"Please choose the correct {word}: it is {number + 1}.\n\n"
            f"Answer format: {'/'.join(names)}"
        ),
        "input": "",
        "output": f"the correct answer is {names[number]}",
        "answer": names[number],
    }


def make_causal_lm(causal_lm_class, dtype, **options):
    """A random language model of a few units, whose tokens are mostly bytes.

    Args:
        causal_lm_class: Class of KerasHub, such as `Llama3CausalLM`.
        dtype: String, the dtype policy.
        **options: Further arguments of its backbone.

    Returns:
        A `keras_hub.models.CausalLM`.
    """
    preprocessor_class = causal_lm_class.preprocessor_cls
    preprocessor = preprocessor_class(make_tokenizer(preprocessor_class))
    backbone = causal_lm_class.backbone_cls(**TOY, dtype=dtype, **options)
    return causal_lm_class(backbone, preprocessor)


def make_tokenizer(preprocessor_class):
    """A tokenizer of bytes, and of a few words that are put together."""
    merges = [
        f"{word[:length]} {word[length]}"
        for word in WORDS
        for length in range(1, len(word))
    ]
    tokens = [
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in merges),
        *SPECIAL_TOKENS,
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return preprocessor_class.tokenizer_cls(vocabulary, merges)
