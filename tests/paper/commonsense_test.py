"""The table of commonsense reasoning: its texts, its model, its command."""

import dataclasses
import json

import keras
import keras_hub
import numpy as np
import pytest
from helpers import BACKEND
from helpers import dtype_of
from helpers import to_numpy

from examples.paper import commonsense_reasoning as table
from examples.paper import methods
from examples.paper import mock_questions
from examples.paper import questions
from examples.paper.questions import Question

QUESTION = Question(
    "Which is a fish?\n\nAnswer1: a cod Answer2: a cow\n\n"
    "Answer format: answer1/answer2",
    "the correct answer is answer1",
    "answer1",
)
SETTINGS = {
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "global_clipnorm": 1.0,
    "epsilon": 1e-8,
}


def make_options(*arguments):
    return table.make_parser().parse_args(arguments)


def make_causal_lm(kind, *arguments, num_steps=1):
    """A toy, compiled. Its dtype makes sums the same in batches of any size."""
    causal_lm = table.make_causal_lm(kind, "float32", is_tiny=True)
    options = make_options("--preset", kind, *arguments)
    table.compile_causal_lm(causal_lm, options, SETTINGS, num_steps, 1)
    return causal_lm


def tokenizer_of(kind):
    preset = table.PRESETS[kind]
    return mock_questions.make_tokenizer(
        preset.causal_lm_class.preprocessor_cls
    )


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("task", "text", "keyword"),
    [
        ("piqa", "the correct answer is solution2", "solution2"),
        ("ARC-Easy", "answer3, not answer1", "answer3"),
        ("ARC-Challenge", "not this: answer5answer2", "answer5"),
        ("hellaswag", "ending4!!!!", "ending4"),
        ("winogrande", "the correct answer is", None),
        ("winogrande", "", None),
        # The keywords of another task, and no option of this one.
        ("winogrande", "the correct answer is solution1", None),
        ("social_i_qa", "answer4", None),
        # The labels of the options in a prompt are in upper case.
        ("openbookqa", "Answer1: a cod", None),
        ("openbookqa", "ANSWER1", None),
        ("openbookqa", "answer10", None),
        ("openbookqa", "answer10 or answer1", "answer1"),
        ("openbookqa", "answer 1", None),
    ],
)
def test_the_first_keyword_of_an_answer(task, text, keyword):
    assert questions.find_keyword(task, text) == keyword


@pytest.mark.one_backend
def test_a_task_that_there_is_not():
    with pytest.raises(ValueError, match="'boolq'.*piqa, social_i_qa, ARC-"):
        questions.find_keyword("boolq", "true")


@pytest.mark.one_backend
def test_the_prompt_is_not_indented():
    lines = QUESTION.prompt.split("\n")
    assert lines[0].startswith("Below is an instruction")
    assert lines[2] == "### Instruction:"
    assert lines[3] == "Which is a fish?"
    assert lines[-2:] == ["### Response:", ""]
    assert not [line for line in lines if line.startswith(" ")]


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", table.PRESETS)
def test_the_prompt_of_training_is_that_of_generation(kind):
    causal_lm = make_causal_lm(kind)
    tokenizer = causal_lm.preprocessor.tokenizer
    given = keras.tree.map_structure(
        to_numpy,
        causal_lm.preprocessor.generate_preprocess(
            [QUESTION.prompt], sequence_length=300
        ),
    )
    num_tokens = np.sum(given["padding_mask"])
    inputs, _, weights = questions.pack(tokenizer, [QUESTION], 300)
    np.testing.assert_array_equal(
        inputs["token_ids"][0, :num_tokens], given["token_ids"][0][:num_tokens]
    )
    # The last of its tokens is the first to be followed by one that counts.
    assert np.flatnonzero(weights)[0] == num_tokens - 1


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", table.PRESETS)
def test_only_the_answer_and_its_end_count(kind):
    tokenizer = tokenizer_of(kind)
    other = Question("Which is a cow?", "the correct answer is answer2", "")
    inputs, targets, weights = questions.pack(tokenizer, [QUESTION, other], 300)
    for row, question in enumerate([QUESTION, other]):
        *answer, end = targets[row][weights[row] == 1]
        assert tokenizer.detokenize([answer]) == [question.output]
        assert end == tokenizer.end_token_id
        assert set(weights[row]) == {0, 1}
        # What a token is followed by is its target, wherever it counts.
        where = np.flatnonzero(weights[row])
        token_ids = inputs["token_ids"][row]
        np.testing.assert_array_equal(targets[row, where], token_ids[where + 1])
        padding_mask = inputs["padding_mask"][row]
        assert np.sum(padding_mask) == where[-1] + 2
        assert np.all(token_ids[padding_mask == 0] == tokenizer.pad_token_id)


@pytest.mark.one_backend
def test_what_does_not_fit_with_its_answer_is_left_out():
    tokenizer = tokenizer_of("llama3_8b_en")
    [(prompt, output)] = questions.tokenize(tokenizer, [QUESTION])
    needed = len(prompt) + len(output)
    fills_all = dataclasses.replace(QUESTION, instruction="a" * 300)
    asked = [QUESTION, fills_all]
    inputs, targets, weights = questions.pack(tokenizer, asked, needed)
    assert inputs["token_ids"].shape == targets.shape == (1, needed)
    assert np.sum(weights) == len(output)
    assert inputs["padding_mask"].all()
    for length in (needed - 1, len(prompt)):
        assert len(questions.pack(tokenizer, asked, length)[1]) == 0


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", table.PRESETS)
def test_the_loss_is_a_mean_over_the_tokens_that_count(kind):
    causal_lm = make_causal_lm(kind)
    # Answers of unequal lengths, in batches of unequal sizes.
    outputs = ["answer1", "the correct answer is answer1", "a"]
    asked = [dataclasses.replace(QUESTION, output=text) for text in outputs]
    inputs, targets, weights = questions.pack(
        causal_lm.preprocessor.tokenizer, asked, 300
    )
    logits = to_numpy(causal_lm(inputs)).astype("float64")
    log_probabilities = logits - np.log(
        np.sum(np.exp(logits), axis=-1, keepdims=True)
    )
    chosen = np.take_along_axis(log_probabilities, targets[..., None], -1)
    expected = np.sum(chosen[..., 0] * weights) / np.sum(weights)
    causal_lm.preprocessor = None
    for batch_size in (1, 3):
        measured = causal_lm.evaluate(
            inputs,
            targets,
            sample_weight=weights,
            batch_size=batch_size,
            return_dict=True,
            verbose=0,
        )
        np.testing.assert_allclose(
            measured["log_likelihood"], expected, rtol=1e-5
        )
    np.testing.assert_allclose(measured["loss"], -expected, rtol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "sampler", ["beam", pytest.param("greedy", marks=pytest.mark.slow)]
)
def test_prompts_have_no_effect_on_each_other(sampler):
    causal_lm = make_causal_lm("qwen3_0.6b_en", "--sampler", sampler)
    rng = np.random.default_rng(0)
    for weight in causal_lm.trainable_weights:
        # Random weights say the same to everything.
        noise = rng.normal(scale=0.3, size=weight.shape)
        weight.assign(to_numpy(weight) + noise)
    prompts = ["a", "bc", "a", "d", "e"]
    answers = table.generate(causal_lm, prompts, batch_size=2)
    # KerasHub itself, with room for the new tokens alone.
    tokenizer = causal_lm.preprocessor.tokenizer
    causal_lm.compile(
        sampler={
            "beam": keras_hub.samplers.BeamSampler(num_beams=4),
            "greedy": keras_hub.samplers.GreedySampler(),
        }[sampler]
    )
    assert answers == [
        causal_lm.generate(
            prompt,
            max_length=len(tokenizer.tokenize(prompt)) + 16,
            strip_prompt=True,
        )
        for prompt in prompts
    ]
    assert len(set(answers)) > 1


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("kind", table.PRESETS)
def test_a_model_says_what_it_was_taught(kind):
    size = table.SIZES["tiny"].settings
    causal_lm = make_causal_lm(kind, "--sampler", "greedy", num_steps=60)
    with mock_questions.questions():
        mixture = questions.read("paper_commonsense/commonsense_15k", "train")
        asked = {
            task: questions.read(f"paper_commonsense_evaluation/{task}", "test")
            for task in questions.TASKS
        }
        taught = [
            dataclasses.replace(question, output="answer2")
            for question in mixture[::3]
        ]
        inputs, targets, weights = questions.pack(
            causal_lm.preprocessor.tokenizer, taught, size["length"]
        )
        preprocessor, causal_lm.preprocessor = causal_lm.preprocessor, None
        causal_lm.fit(
            inputs,
            targets,
            sample_weight=weights,
            batch_size=7,
            epochs=15,
            verbose=0,
        )
        causal_lm.preprocessor = preprocessor
        measured = table.evaluate(causal_lm, size)
    # It has learnt to end, too.
    assert table.generate(causal_lm, [taught[0].prompt], 1) == ["answer2"]
    assert measured["test"] == {
        task: np.mean([question.answer == "answer2" for question in of_task])
        for task, of_task in asked.items()
    }
    assert 0 < measured["test"]["ARC-Easy"] < 1
    assert measured["without_keyword"] == {
        task: float(word != "answer")
        for task, (word, _) in questions.TASKS.items()
    }


@pytest.mark.one_backend
def test_the_seed_chooses_the_validation_data():
    size = table.SIZES["tiny"].settings
    tokenizer = tokenizer_of("llama3_8b_en")
    mixture = table.Mixture("commonsense_15k", "")

    def token_ids(seed):
        with mock_questions.questions():
            *parts, num_too_long = table.load(tokenizer, mixture, seed, size)
        assert num_too_long == 0
        return [
            {
                tuple(row)
                for inputs, _, _ in part.as_numpy_iterator()
                for row in inputs["token_ids"]
            }
            for part in parts
        ]

    train, validation = token_ids(seed=1)
    assert validation != token_ids(seed=2)[1]
    assert validation == token_ids(seed=1)[1]
    assert len(train) > len(validation)


@pytest.mark.one_backend
def test_settings_of_the_relatives():
    lora = table.authors_settings("lora")
    assert lora["learning_rate"] == 3e-4
    assert lora["options"] == {"alpha": 32.0, "dropout": 0.05}
    assert table.authors_settings("hira")["learning_rate"] == 1e-3
    for name in table.METHOD_NAMES:
        settings = table.authors_settings(name)
        assert settings["weight_decay"] == 0.0
        make_config = methods.METHODS[name].make_config
        if make_config is not None:
            make_config(table.RANK, **settings["options"])
    assert table.authors_settings("fvae_lora")["global_clipnorm"] == 1e-3


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", table.PRESETS)
def test_a_preset_is_loaded_in_bfloat16(kind, tmp_path, monkeypatch):
    toy = table.make_causal_lm(kind, "float32", is_tiny=True)
    toy.save_to_preset(tmp_path)
    name = str(tmp_path)
    monkeypatch.setitem(table.PRESETS, name, table.PRESETS[kind])
    causal_lm = table.make_causal_lm(name, "bfloat16", is_tiny=False)
    methods.adapt(
        "fvae_lora",
        causal_lm.backbone,
        table.RANK,
        {"options": {}},
        seed=0,
        target_layer_names=table.TARGETS["qkvud"],
    )
    trainable = causal_lm.trainable_weights
    assert {dtype_of(weight) for weight in trainable} == {"float32"}
    trainable_ids = {id(weight) for weight in trainable}
    assert {
        dtype_of(weight)
        for weight in causal_lm.weights
        if id(weight) not in trainable_ids
    } == {"bfloat16"}
    tokenizer = causal_lm.preprocessor.tokenizer
    assert questions.tokenize(tokenizer, [QUESTION]) == questions.tokenize(
        toy.preprocessor.tokenizer, [QUESTION]
    )


def read_results(folder):
    return {
        path.stem: json.loads(path.read_text())
        for path in folder.rglob("*.json")
    }


@pytest.mark.one_backend
def test_the_command(tmp_path, capsys):
    arguments = ["--size", "tiny", "--output", str(tmp_path)]
    table.main(["--method", "lora", *arguments])
    results = read_results(tmp_path)
    assert set(results) == {"lora_trial_0", "lora_searched_1"}
    for result in results.values():
        assert result["status"] == "done"
        assert result["run"]["dataset"] == "commonsense_170k"
        if not result["run"]["is_trial"]:
            assert set(result["test"]) == set(questions.TASKS)
        assert result["validation_score"] < 0
    # 16 * (inputs + outputs) of five layers, in two blocks.
    features = [(32, 32), (32, 16), (32, 16), (32, 64), (64, 32)]
    expected = 2 * 16 * np.sum(features)
    cost = results["lora_searched_1"]["cost"]
    assert cost["trainable_parameters"] == expected
    assert cost["inference_parameters"] == expected
    # A second time there is nothing to do, whatever is left at its default.
    table.main(["--method", "lora", "--sampler", "beam", *arguments])
    assert "2 runs, of which 2 have a result." in capsys.readouterr().out
    for option in (
        ["--preset", "qwen3_0.6b_en"],
        ["--targets", "qv"],
        ["--sampler", "greedy"],
        ["--new-tokens", "32"],
    ):
        with pytest.raises(SystemExit, match="not mixed"):
            table.main(["--method", "lora", *arguments, *option])
    assert read_results(tmp_path) == results


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, method",
    [
        ("qwen3_0.6b_en", "fvae_lora"),
        *(
            pytest.param(
                "llama3_8b_en", method, marks=pytest.mark.always_one_backend
            )
            for method in table.METHOD_NAMES
        ),
    ],
)
def test_every_method_and_every_kind(kind, method, tmp_path):
    table.main(
        [
            *("--size", "tiny", "--preset", kind, "--method", method),
            *("--sampler", "greedy", "--targets", "qv", "--authors"),
            *("--output", str(tmp_path)),
        ]
    )
    [result] = read_results(tmp_path).values()
    assert result["status"] == "done", result["traceback"]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--preset", ["llama3_8b_en", "qwen3_0.6b_en"]),
        ("--targets", ["qkvud", "qv"]),
        ("--sampler", ["beam", "greedy"]),
        ("--new-tokens", ["16", "32"]),
        ("--dataset", ["commonsense_170k", "commonsense_15k"]),
        ("--method", ["lora", "fvae_lora"]),
        ("--size", ["full", "small", "tiny"]),
    ],
)
def test_what_there_is_not(option, choices, capsys):
    with pytest.raises(SystemExit):
        table.main([option, "7"])
    error = capsys.readouterr().err
    assert option in error
    assert all(choice in error for choice in choices)


@pytest.mark.one_backend
def test_the_options_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        table.main(["--help"])
    text = capsys.readouterr().out
    assert all(
        option in text
        for option in ("--preset", "--targets", "--sampler", "--new-tokens")
    )


@pytest.mark.one_backend
def test_the_size_chooses_the_mixture():
    for size, mixture in (("full", "170k"), ("small", "15k"), ("tiny", "170k")):
        made = table.make_table(make_options("--size", size))
        assert made.default_datasets == (f"commonsense_{mixture}",)


@pytest.mark.parametrize("kind", table.PRESETS)
def test_jax_uses_all_its_devices(kind):
    with table.distribution_scope(table.PRESETS[kind].causal_lm_class):
        distribution = keras.distribution.distribution()
    assert type(distribution).__name__ == {
        ("jax", "llama3_8b_en"): "ModelParallel",
        ("jax", "qwen3_0.6b_en"): "DataParallel",
    }.get((BACKEND, kind), "NoneType")
    assert keras.distribution.distribution() is None
