"""The examples as a user runs them: from the shell, in a fresh process."""

import csv
import re

import keras_hub
import pytest
from helpers import BACKEND
from helpers import ROOT
from helpers import run_python

import keras_fvae
from examples import demo

QUICKSTART = ROOT / "examples" / "quickstart.py"
DEFAULT = ["LoRA", "FVAE-LoRA"]
WORDS = ["sun", "sea", "sand", "snow", "ice", "frost"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A text classifier of a few units, saved as a preset."""
    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    )
    classifier = keras_hub.models.BertTextClassifier(
        backbone=keras_hub.models.BertBackbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
            max_sequence_length=24,
        ),
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=24
        ),
        num_classes=2,
    )
    path = tmp_path_factory.mktemp("preset")
    classifier.save_to_preset(path)
    return path


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "texts.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "words", "season"])
        for i in range(24):
            season = i % 2
            words = WORDS[3 * season :][:3]
            text = f"{words[i % 3]}, {words[i % 2]}"
            writer.writerow([i, text, ["summer", "winter"][season]])
    return path


def quickstart(*arguments, check=True):
    return run_python(QUICKSTART, *arguments, check=check)


def check_output(output, folder, methods):
    """The table has a row for each run, and the files are there."""
    _, table = output.split("On the test texts")
    rows = table.splitlines()[2 : 2 + len(methods)]
    assert [re.split(r" {2,}", row)[0] for row in rows] == methods
    for row in rows:
        accuracy, loss, calibration = map(float, row.split()[-6:-3])
        assert 0 <= accuracy <= 1 and 0 <= calibration <= 1 and loss > 0
    assert (folder / "quickstart.png").stat().st_size > 10_000
    assert (folder / "quickstart.safetensors").is_file()


@pytest.mark.always_one_backend
def test_the_demo(tmp_path, capsys):
    """Each situation, of a toy size, with the comparison's best settings."""
    for dataset in demo.SITUATIONS:
        for method in demo.COMPARED:
            settings = demo.best_settings(dataset, method)
            assert settings["learning_rate"] > 0
    situations = ("digits", "spurious_digits")
    demo.compare(tmp_path, situations, (1, 2), "tiny")
    output = capsys.readouterr().out
    table = output.partition("difference")[2]
    for situation in situations:
        rows = table.partition(demo.SITUATIONS[situation])[2].splitlines()
        for row, measure in zip(rows[1:4], demo.MEASURES.values()):
            assert row.startswith(f"  {measure} ")
            lora, fvae_lora, difference = map(float, row.split()[-3:])
            assert fvae_lora - lora == pytest.approx(difference, abs=0.11)
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_the_demo_as_it_is(tmp_path):
    output = run_python("-m", "examples.demo", "--output", tmp_path).stdout
    assert output.count("FVAE-LoRA, seed") == 9
    assert (tmp_path / "demo.png").is_file()


@pytest.mark.one_backend
def test_quickstart_with_a_csv_and_a_preset(preset, csv_file, tmp_path):
    output = quickstart(
        "--preset", preset,
        "--csv", csv_file,
        "--text-column", "words",
        "--label-column", "season",
        "--backend", BACKEND,
        "--rank", 2,
        "--epochs", 2,
        "--output", tmp_path / "out",
    ).stdout  # fmt: skip
    assert "in 2 classes: summer, winter." in output
    check_output(output, tmp_path / "out", DEFAULT)
    classifier = keras_hub.models.TextClassifier.from_preset(
        str(preset), num_classes=2
    )
    keras_fvae.load_adapter(
        classifier, tmp_path / "out" / "quickstart.safetensors"
    )


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_quickstart_with_all_methods(preset, csv_file, tmp_path):
    output = quickstart(
        "--preset", preset,
        "--csv", csv_file,
        "--text-column", "words",
        "--label-column", "season",
        "--backend", BACKEND,
        "--methods", "all",
        "--rank", 2,
        "--epochs", 1,
        "--output", tmp_path,
    ).stdout  # fmt: skip
    others = ["rsLoRA", "FFA-LoRA", "PiSSA", "OLoRA", "SRLoRA", "DoRA"]
    others += ["HiRA", "AdaLoRA", "BeamLoRA", "DropLoRA", "MoE-LoRA"]
    others += ["Flat-LoRA", "FVAE-LoRA"]
    methods = ["head only", "KerasHub's LoRA", "LoRA", *others]
    check_output(output, tmp_path, methods)


@pytest.mark.slow
@pytest.mark.always_one_backend
def test_quickstart_as_it_is(tmp_path):
    output = quickstart("--epochs", 1, "--output", tmp_path).stdout
    assert "960 texts to train on and 320 to test on, in 16 classes" in output
    check_output(output, tmp_path, DEFAULT)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "no_such_preset"], "Cannot load the preset 'no_such"),
        (["--methods", "BORA"], "invalid choice: 'BORA' (choose from 'head"),
        (["--csv", "missing.csv"], "Cannot read missing.csv"),
        (["--csv", "README.md"], "README.md has no column 'text'"),
        (["--csv", "CSV", "--text-column", "words"], "no column 'label'"),
        (
            ["--csv", "CSV", "--text-column", "words", "--label-column", "id"],
            "each at least four texts",
        ),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments, message, csv_file):
    arguments = [str(csv_file) if a == "CSV" else a for a in arguments]
    result = quickstart(*arguments, check=False)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert message in last_line
    assert "Traceback" not in result.stderr
