"""Multiple-choice questions, as texts for a language model.

The rows are those of LLM-Adapters: an instruction that ends in the names of
the options, and what is to be said, such as "the correct answer is answer2".
"""

import dataclasses
import re

import numpy as np
import tensorflow_datasets as tfds

from examples.paper import data

# Of the data sets below.
VERSION = "1.0.0"
MIXTURES = "paper_commonsense"
EVALUATION = "paper_commonsense_evaluation"
# What a task calls its options, and the highest number of one.
TASKS = {
    "piqa": ("solution", 2),
    "social_i_qa": ("answer", 3),
    "ARC-Challenge": ("answer", 5),
    "ARC-Easy": ("answer", 5),
    "openbookqa": ("answer", 5),
    "hellaswag": ("ending", 4),
    "winogrande": ("option", 2),
}
# Alpaca's, for an instruction without an input. LLM-Adapters indents it by 16
# blanks, which say nothing.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
    "### Response:\n"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Args:
        instruction: String, the question and its options.
        output: String, what is to be said.
        answer: String, the name of the right option.
    """

    instruction: str
    output: str
    answer: str

    @property
    def prompt(self):
        """String, what a model is given, in training and after it."""
        return PROMPT.format(instruction=self.instruction)


def read(name, split):
    """The questions of a data set, in a fixed order.

    Args:
        name: String, the name of a builder, with its config.
        split: String.

    Returns:
        List of `Question`.
    """
    fields = [field.name for field in dataclasses.fields(Question)]
    return [
        Question(*(row[field].decode() for field in fields))
        for row in tfds.as_numpy(data.load(name, VERSION, split))
    ]


def find_keyword(task, text):
    """The first name of an option in a text, or `None` if there is none.

    As LLM-Adapters has it, the case counts. Unlike there, "answer10" is no
    "answer1".

    Args:
        task: String, a key of `TASKS`.
        text: String, what a model has said, without its prompt.

    Returns:
        String, such as "answer2", or `None`.

    Raises:
        ValueError: If there is no such task.
    """
    if task not in TASKS:
        raise ValueError(
            f"There is no task {task!r}. The tasks are: {', '.join(TASKS)}."
        )
    word, highest = TASKS[task]
    match = re.search(f"{word}[1-{highest}](?![0-9])", text)
    return match and match.group()


def pack(tokenizer, questions, length):
    """What `fit` takes, to teach a model what is to be said.

    Only the tokens of the output and the end token after it count in the
    loss. A question that does not fit with all of them is left out: cut off,
    it would teach little or nothing.

    Args:
        tokenizer: KerasHub tokenizer.
        questions: List of `Question`.
        length: Integer, the tokens of an example, padding included.

    Returns:
        Triple: inputs of a `CausalLM`, targets and sample weights, arrays of
        shape `(examples, length)`.
    """
    examples = [
        (prompt, output)
        for prompt, output in tokenize(tokenizer, questions)
        if len(prompt) + len(output) <= length
    ]
    shape = (len(examples), length)
    token_ids = np.full(shape, tokenizer.pad_token_id, "int32")
    padding_mask = np.zeros(shape, "int32")
    weights = np.zeros(shape, "float32")
    for row, (prompt, output) in enumerate(examples):
        begin, end = len(prompt), len(prompt) + len(output)
        token_ids[row, :end] = prompt + output
        padding_mask[row, :end] = 1
        weights[row, begin:end] = 1.0
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
    # The target of a token is the next one. That of the last is the first,
    # which has no weight.
    return inputs, np.roll(token_ids, -1, 1), np.roll(weights, -1, 1)


def tokenize(tokenizer, questions):
    """Pairs of lists of token ids: the prompt, and what is to be said.

    The prompt begins with a start token, if the model has one, as it does
    where KerasHub generates. The output ends with an end token.
    """
    start_id = tokenizer.start_token_id
    start = [] if start_id is None else [start_id]
    prompts = tokenizer.tokenize([question.prompt for question in questions])
    outputs = tokenizer.tokenize([question.output for question in questions])
    return [
        ([*start, *prompt], [*output, tokenizer.end_token_id])
        for prompt, output in zip(prompts, outputs)
    ]
