"""The paper's table of commonsense reasoning: seven tasks, Llama 3 8B.

python -m examples.paper.commonsense_reasoning
python -m examples.paper.commonsense_reasoning --preset qwen3_0.6b_en \\
    --size small --method lora fvae_lora

A run fine-tunes a language model once, on the questions of all tasks, and then
has it answer those of each. In the loss, the tokens of the answer count and the
end token after it. An answer is right if the first name of an option in it,
such as "answer2", is the right one. Results of different presets, targets,
samplers and numbers of tokens need folders of their own: `--output`.

The paper's own settings are not known. `--authors` takes those of its closest
relatives on the same data, `LEARNING_RATES` and `OPTIONS` below.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from keras import ops

from examples.paper import harness
from examples.paper import methods
from examples.paper import mock_questions
from examples.paper import questions
from examples.paper import search
from examples.paper import training

RANK = 16
NUM_BEAMS = 4
# Prompts are padded to a multiple of it, so that few lengths are compiled.
LENGTH_STEP = 64
TARGETS = {
    # The projections that DoRA and HiRA adapt; up and down are those of the
    # feedforward layers, whose gate is left as it is.
    "qkvud": (
        "query",
        "key",
        "value",
        "feedforward_intermediate_dense",
        "feedforward_output_dense",
    ),
    "qv": ("query", "value"),
}
# Of the runs on Llama 3 8B in the repositories of DoRA and HiRA. For methods
# that are in neither, LoRA's; for full fine-tuning, what is usual.
LEARNING_RATE = 3e-4
LEARNING_RATES = {"full_fine_tuning": 1e-5, "dora": 1e-4, "hira": 1e-3}
# There DoRA has LoRA's dropout, which the DoRA of this package has not.
OPTIONS = {
    "lora": {"alpha": 2.0 * RANK, "dropout": 0.05},
    "dora": {"alpha": 2.0 * RANK},
}
# A language model has no head to train alone.
METHOD_NAMES = tuple(
    name for name in methods.PAPER_METHODS if name != "head_only"
)
FULL = {
    "length": 256,
    "batch_size": 16,
    "epochs": 3,
    "warmup_steps": 100,
    "num_validation_questions": 120,
    "test_split": "test",
    "generation_batch_size": 32,
    "is_tiny": False,
}
SIZES = {
    "full": harness.Size(6, harness.SEEDS, FULL),
    "small": harness.Size(
        6, harness.SEEDS, FULL | {"test_split": "test[:500]"}
    ),
    "tiny": harness.Size(
        1,
        (1,),
        {
            # Most tokens are of one byte.
            "length": 224,
            "batch_size": 16,
            "epochs": 1,
            "warmup_steps": 2,
            "num_validation_questions": 8,
            "test_split": "test",
            "generation_batch_size": 8,
            "is_tiny": True,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A language model of KerasHub.

    Args:
        causal_lm_class: Its class.
        toy: Dict, what a toy of that class needs beside what all do.
    """

    causal_lm_class: type
    toy: dict


PRESETS = {
    "llama3_8b_en": Preset(keras_hub.models.Llama3CausalLM, {}),
    "qwen3_0.6b_en": Preset(keras_hub.models.Qwen3CausalLM, {"head_dim": 4}),
}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Questions to train on.

    Args:
        name: String, the config of their builder.
        version: String, with the options that tell results apart.
    """

    name: str
    version: str


MIXTURE_NAMES = ("commonsense_170k", "commonsense_15k")


def authors_settings(name):
    """As the closest relatives of the paper's runs train a method."""
    settings = search.authors_settings(
        methods.METHODS[name],
        LEARNING_RATES.get(name, LEARNING_RATE),
        OPTIONS.get(name, {}),
    )
    return settings | {"weight_decay": 0.0}


class FewNewTokens:
    """A mixin of KerasHub's samplers: ends after a number of tokens.

    They themselves go on until `max_length`, however short the prompt.
    """

    def __init__(self, new_tokens, **kwargs):
        super().__init__(**kwargs)
        self.new_tokens = new_tokens

    def run_loop(self, *args, maximum_iterations, **kwargs):
        return super().run_loop(
            *args,
            maximum_iterations=ops.minimum(maximum_iterations, self.new_tokens),
            **kwargs,
        )


class BeamSampler(FewNewTokens, keras_hub.samplers.BeamSampler):
    """Beam search. Unlike elsewhere, a beam that has ended is scored on."""


class GreedySampler(FewNewTokens, keras_hub.samplers.GreedySampler):
    """The likeliest token, one after the other."""


SAMPLERS = {
    "beam": functools.partial(BeamSampler, num_beams=NUM_BEAMS),
    "greedy": GreedySampler,
}


def generate(causal_lm, prompts, batch_size):
    """What a language model says to prompts.

    The prompts of a batch have the same number of tokens. Where one is still
    read while another is answered, KerasHub's beam search makes the beams of
    the first copies of each other.

    Args:
        causal_lm: Compiled `keras_hub.models.CausalLM`, with a sampler of this
            module.
        prompts: List of strings.
        batch_size: Integer.

    Returns:
        List of strings, without the prompts. Of one that has not ended, the
        padding after the new tokens is part.
    """
    tokens = causal_lm.preprocessor.tokenizer.tokenize(prompts)
    by_length = collections.defaultdict(list)
    for index, prompt_tokens in enumerate(tokens):
        by_length[len(prompt_tokens)].append(index)
    answers = {}
    for length, indices in by_length.items():
        # One more for the start token.
        needed = 1 + length + causal_lm.sampler.new_tokens
        for begin in range(0, len(indices), batch_size):
            batch = indices[begin : begin + batch_size]
            # Full, so that no other size is compiled.
            full = itertools.islice(itertools.cycle(batch), batch_size)
            texts = causal_lm.generate(
                [prompts[index] for index in full],
                max_length=LENGTH_STEP * -(-needed // LENGTH_STEP),
                strip_prompt=True,
            )
            answers.update(zip(batch, texts))
    return [answers[index] for index in range(len(prompts))]


def make_causal_lm(preset_name, dtype, is_tiny):
    """A pretrained language model, or a toy."""
    preset = PRESETS[preset_name]
    if is_tiny:
        return mock_questions.make_causal_lm(
            preset.causal_lm_class, dtype, **preset.toy
        )
    with harness.required(f"The preset '{preset_name}'"):
        return preset.causal_lm_class.from_preset(preset_name, dtype=dtype)


def log_likelihood(targets, logits):
    """The log probability of each target, in nats."""
    return -keras.losses.sparse_categorical_crossentropy(
        targets, ops.cast(logits, "float32"), from_logits=True
    )


def load(tokenizer, mixture, seed, size):
    """Batches of questions to train on, and to choose by.

    Args:
        tokenizer: KerasHub tokenizer.
        mixture: `Mixture`.
        seed: Integer, of the run: it chooses the validation data.
        size: Dict, the settings of a size.

    Returns:
        Pair of `tf.data.Dataset` of what `questions.pack` returns, and the
        number of questions that were too long.
    """
    rows = questions.read(f"{questions.MIXTURES}/{mixture.name}", "train")
    packed = questions.pack(tokenizer, rows, size["length"])
    num_examples = len(packed[1])
    order = np.random.default_rng(seed).permutation(num_examples)
    validation, train = np.split(order, [size["num_validation_questions"]])

    def examples(indices):
        chosen = keras.tree.map_structure(lambda array: array[indices], packed)
        return tf.data.Dataset.from_tensor_slices(chosen)

    return (
        examples(train)
        .shuffle(len(train), seed=seed)
        .batch(size["batch_size"], drop_remainder=True),
        examples(validation).batch(size["batch_size"]),
        len(rows) - num_examples,
    )


def evaluate(causal_lm, size):
    """Has the questions of each task answered.

    Args:
        causal_lm: Compiled `keras_hub.models.CausalLM`.
        size: Dict, the settings of a size.

    Returns:
        Dict of dicts by task: `test`, the accuracy, and `without_keyword`, the
        share of answers that name no option, and so are wrong.
    """
    asked = [
        (task, question)
        for task in questions.TASKS
        for question in questions.read(
            f"{questions.EVALUATION}/{task}", size["test_split"]
        )
    ]
    texts = generate(
        causal_lm,
        [question.prompt for _, question in asked],
        size["generation_batch_size"],
    )
    is_right = collections.defaultdict(list)
    is_none = collections.defaultdict(list)
    for (task, question), text in zip(asked, texts):
        keyword = questions.find_keyword(task, text)
        is_right[task].append(keyword == question.answer)
        is_none[task].append(keyword is None)

    def shares(flags):
        return {task: float(np.mean(flags[task])) for task in flags}

    return {"test": shares(is_right), "without_keyword": shares(is_none)}


def distribution_scope(causal_lm_class):
    """Spreads a model over the devices, where JAX has several.

    Its weights, as its backbone's layout map says, or else the data alone.
    """
    if keras.config.backend() != "jax":
        return contextlib.nullcontext()
    devices = keras.distribution.list_devices()
    if len(devices) == 1:
        return contextlib.nullcontext()
    backbone_class = causal_lm_class.backbone_cls
    if not hasattr(backbone_class, "get_layout_map"):
        return keras.distribution.DataParallel(devices=devices).scope()
    mesh = keras.distribution.DeviceMesh(
        (1, len(devices)), ("batch", "model"), devices
    )
    return keras.distribution.ModelParallel(
        layout_map=backbone_class.get_layout_map(mesh), batch_dim_name="batch"
    ).scope()


def compile_causal_lm(causal_lm, options, settings, num_steps, warmup_steps):
    """Compiles a language model, to be trained and to generate.

    The loss is a mean over the tokens that have a weight, not over all, so
    that it is as large beside an ELBO as in the other tables.

    Args:
        causal_lm: `keras_hub.models.CausalLM`.
        options: What `make_parser()` made of the command line.
        settings: Dict, what `search` gives.
        num_steps: Integer, the steps of all epochs.
        warmup_steps: Integer.
    """
    causal_lm.compile(
        training.make_optimizer(settings, num_steps, warmup_steps),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[
            keras.metrics.MeanMetricWrapper(
                log_likelihood, name="log_likelihood"
            )
        ],
        sampler=SAMPLERS[options.sampler](new_tokens=options.new_tokens),
    )


def fine_tune(causal_lm, train, validation, size):
    """Trains a compiled language model, and leaves it as at its best epoch.

    Returns:
        Pair: what `training.fit` returns, and the best `log_likelihood` of
        the validation data.
    """
    # The examples are tokenized already, which the model cannot know.
    preprocessor, causal_lm.preprocessor = causal_lm.preprocessor, None
    best = training.BestWeights("val_log_likelihood")
    measured = training.fit(
        causal_lm, train, validation, size["epochs"], [best], size["backup"]
    )
    best.restore()
    causal_lm.preprocessor = preprocessor
    return measured, float(best.best)


def run(options, mixture, method_name, settings, seed, size):
    """Fine-tunes on a mixture; measures each task at the epoch that was best.

    Args:
        options: What `make_parser()` made of the command line.
        mixture: `Mixture`.
        method_name: String, one of `METHOD_NAMES`.
        settings: Dict, what `search` gives.
        seed: Integer.
        size: Dict, the settings of a size.

    Returns:
        Dict of `validation_score`, minus the mean loss of an answer's token;
        what `evaluate` returns; and what the run took.
    """
    # The pretrained weights are of bfloat16. Where they train they need more,
    # or steps are rounded away: of 8 billion, 130 GB with Adam's moments.
    trains_all = methods.METHODS[method_name].trains_backbone
    dtype = "mixed_bfloat16" if trains_all else "bfloat16"
    with contextlib.ExitStack() as stack:
        if size["is_tiny"]:
            stack.enter_context(mock_questions.questions())
        stack.enter_context(
            distribution_scope(PRESETS[options.preset].causal_lm_class)
        )
        causal_lm = make_causal_lm(options.preset, dtype, size["is_tiny"])
        train, validation, num_too_long = load(
            causal_lm.preprocessor.tokenizer, mixture, seed, size
        )
        inference_parameters = methods.adapt(
            method_name,
            causal_lm.backbone,
            RANK,
            settings,
            seed,
            TARGETS[options.targets],
        )
        num_steps = size["epochs"] * int(train.cardinality())
        compile_causal_lm(
            causal_lm, options, settings, num_steps, size["warmup_steps"]
        )
        measured, validation_score = fine_tune(
            causal_lm, train, validation, size
        )
        measured["cost"]["inference_parameters"] = inference_parameters
        return {
            "validation_score": validation_score,
            # Of a trial nobody reads the answers, which take their time.
            **({} if size["is_trial"] else evaluate(causal_lm, size)),
            "questions_too_long": num_too_long,
            **measured,
        }


def make_parser():
    """The parser of what this table has beside what all have."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    # All have it; the default data set depends on it.
    parser.add_argument("--size", default="full", help=argparse.SUPPRESS)
    own = parser.add_argument_group("options of this table alone")
    own.add_argument(
        "--preset",
        choices=PRESETS,
        default="llama3_8b_en",
        help="of KerasHub (default: %(default)s)",
    )
    own.add_argument(
        "--targets",
        choices=TARGETS,
        default="qkvud",
        help="the adapted projections: query, key, value, up and down, or "
        "query and value (default: %(default)s)",
    )
    own.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="beam",
        help=f"{NUM_BEAMS} beams, or the likeliest token (default: beam)",
    )
    own.add_argument(
        "--new-tokens",
        type=int,
        choices=(16, 32),
        default=16,
        help="of an answer: HiRA's 16 or LLM-Adapters' 32 (default: 16)",
    )
    return parser


def make_table(options):
    """The table of one choice of options.

    Args:
        options: What `make_parser()` made of the command line.

    Returns:
        `harness.Table`. Its data sets' versions name the options, so that the
        results of others are not taken for its own.
    """
    version = (
        f"{questions.VERSION}, {options.preset}, {options.targets}, "
        f"{options.sampler}, {options.new_tokens} new tokens"
    )
    is_small = options.size == "small"
    return harness.Table(
        name="commonsense_reasoning",
        version=1,
        datasets={name: Mixture(name, version) for name in MIXTURE_NAMES},
        default_datasets=(
            "commonsense_15k" if is_small else "commonsense_170k",
        ),
        methods=METHOD_NAMES,
        authors_settings=authors_settings,
        run=functools.partial(run, options),
        sizes=SIZES,
    )


def main(arguments=None):
    """The command.

    Args:
        arguments: List of strings; `None` (default) for the command line's.
    """
    parser = make_parser()
    options, others = parser.parse_known_args(arguments)
    harness.main(
        make_table(options),
        f"{__doc__}\n{parser.format_help()}",
        ["--size", options.size, *others],
    )


if __name__ == "__main__":
    main()
