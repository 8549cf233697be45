"""The paper's table of phoneme recognition: TIMIT, Wav2Vec2-Large.

python -m examples.paper.phoneme_recognition
python -m examples.paper.phoneme_recognition --dataset timit_lv60 --seed 1

39 phones, the core test set, CTC, greedy decoding. Which of the two Large
checkpoints the paper took is not known: `timit` is of the one that was
pre-trained on 960 hours, `timit_lv60` of that on 60,000. The convolutions
below the transformer do not train. TIMIT is licensed: see `builders/timit.py`.
"""

import contextlib
import dataclasses
import math

import keras
import numpy as np

from examples.paper import data
from examples.paper import harness
from examples.paper import methods
from examples.paper import mock
from examples.paper import search
from examples.paper import training
from examples.paper.builders.timit import PHONES
from examples.paper.builders.timit import SAMPLE_RATE
from examples.paper.wav2vec2 import audio
from examples.paper.wav2vec2 import converter
from examples.paper.wav2vec2 import ctc
from examples.paper.wav2vec2.backbone import Wav2Vec2Backbone

RANK = 16
TARGETS = ["query", "value"]
# The phones and, before them, the blank.
VOCABULARY_SIZE = 1 + len(PHONES.split())


@dataclasses.dataclass(frozen=True)
class SpeechDataset:
    """Utterances with their phones, and the model that they are for.

    Args:
        builder: String, the name of the builder.
        version: String.
        checkpoint: String, a Wav2Vec2 on the Hugging Face hub. The main
            branches of these have no safetensors.
    """

    builder: str
    version: str
    checkpoint: str


DATASETS = {
    "timit": SpeechDataset(
        "paper_timit", "1.0.0", "hf://facebook/wav2vec2-large@refs/pr/2"
    ),
    "timit_lv60": SpeechDataset(
        "paper_timit", "1.0.0", "hf://facebook/wav2vec2-large-lv60@refs/pr/1"
    ),
}
FULL = {
    "batch_size": 8,
    "epochs": 20,
    "num_examples": None,
    "is_tiny": False,
}
SMALL = {"num_examples": 400, "epochs": 10}
TINY = {
    "batch_size": 8,
    "epochs": 2,
    "num_examples": 16,
    "is_tiny": True,
}
SIZES = {
    "full": harness.Size(6, harness.SEEDS, FULL),
    "small": harness.Size(6, harness.SEEDS, FULL | SMALL),
    "tiny": harness.Size(2, (1,), TINY),
}


class Utterances(keras.utils.PyDataset):
    """Batches of utterances and labels.

    Each is padded to whole seconds of its longest utterance: padding counts in
    the first norm of some Wav2Vec2, and few lengths are compiled.

    Args:
        examples: List of dicts of `audio`, an array, and `phones`, integers.
        batch_size: Integer.
        max_phones: Integer, how many labels to pad to.
        min_samples: Integer, the least samples that make a frame.
        seed: Integer to shuffle by, anew in each epoch; `None` for the order
            of the examples.
    """

    def __init__(
        self, examples, batch_size, max_phones, min_samples, seed=None
    ):
        super().__init__()
        self.examples = examples
        self.batch_size = batch_size
        self.max_phones = max_phones
        self.min_samples = min_samples
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.order = np.arange(len(examples))
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.examples) / self.batch_size)

    def __getitem__(self, index):
        begin = index * self.batch_size
        chosen = self.order[begin : begin + self.batch_size]
        utterances = {i: self.examples[i]["audio"] for i in chosen}
        longest = max(map(len, utterances.values()))
        inputs = audio.pad_utterances(
            utterances,
            SAMPLE_RATE * math.ceil(longest / SAMPLE_RATE),
            self.min_samples,
        )
        labels = np.zeros((len(chosen), self.max_phones), "int32")
        for row, i in enumerate(chosen):
            phones = self.examples[i]["phones"]
            # 0 is the blank.
            labels[row, : len(phones)] = phones + 1
        return inputs, labels

    def on_epoch_end(self):
        if self.rng is not None:
            self.rng.shuffle(self.order)


def read(dataset, split, num_examples):
    """List of the examples of a split, with their audio as it was recorded."""
    examples = data.load(dataset.builder, dataset.version, split)
    if num_examples:
        examples = examples.take(num_examples)
    return [
        {"audio": example["audio"], "phones": example["phones"]}
        for example in examples.as_numpy_iterator()
    ]


def make_task(dataset, size):
    """A pretrained Wav2Vec2 with a new head, or a toy."""
    if not size["is_tiny"]:
        with harness.required(f"The checkpoint '{dataset.checkpoint}'"):
            return converter.load_ctc(dataset.checkpoint, VOCABULARY_SIZE)
    backbone = Wav2Vec2Backbone(
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        conv_filters=(8, 8, 8),
        conv_kernel_sizes=(10, 3, 2),
        conv_strides=(5, 2, 2),
        position_kernel_size=16,
        position_groups=2,
    )
    return ctc.Wav2Vec2CTC(backbone, VOCABULARY_SIZE)


def error_rate(task, utterances):
    """The phoneme error rate of greedy decoding."""
    references, predictions = [], []
    # Batch by batch, because they are of different lengths.
    for index in range(len(utterances)):
        inputs, labels = utterances[index]
        lengths = inputs["padding_mask"].sum(axis=1)
        predictions += ctc.greedy_decode(
            task.predict_on_batch(inputs), task.backbone.num_frames(lengths)
        )
        references += [row[row != ctc.BLANK].tolist() for row in labels]
    return ctc.phoneme_error_rate(references, predictions)


class ErrorRate(keras.callbacks.Callback):
    """Logs what of the phones of validation data is right, epoch by epoch.

    Args:
        utterances: `Utterances`.
    """

    def __init__(self, utterances):
        super().__init__()
        self.utterances = utterances

    def on_epoch_end(self, epoch, logs=None):
        rate = error_rate(self.model, self.utterances)
        logs["phoneme_error_rate"] = rate
        logs["score"] = -rate


def authors_settings(name):
    """Proposals, because the authors' are not known."""
    method = methods.METHODS[name]
    learning_rate = 1e-4 if method.trains_backbone else 1e-3
    return search.authors_settings(method, learning_rate, {})


def run(dataset, method_name, settings, seed, size):
    """Fine-tunes on speech; measures it at the epoch that was best.

    Args:
        dataset: `SpeechDataset`.
        method_name: String, a key of `METHODS`.
        settings: Dict, what `search` gives.
        seed: Integer.
        size: Dict, the settings of a size.

    Returns:
        Dict of `validation_score`, `test` and what the run took.
    """
    made_up = mock.speech() if size["is_tiny"] else contextlib.nullcontext()
    with made_up:
        examples = {
            split: read(dataset, split, size["num_examples"])
            for split in ("train", "validation", "test")
        }
    task = make_task(dataset, size)
    max_phones = max(
        len(example["phones"])
        for of_split in examples.values()
        for example in of_split
    )
    train, validation, test = (
        Utterances(
            examples[split],
            size["batch_size"],
            max_phones,
            task.backbone.receptive_field,
            split_seed,
        )
        for split, split_seed in (
            ("train", seed),
            ("validation", None),
            ("test", None),
        )
    )
    inference_parameters = methods.adapt(
        method_name, task.backbone, RANK, settings, seed, TARGETS
    )
    task.backbone.feature_encoder.trainable = False
    task.compile(training.make_optimizer(settings, size["epochs"] * len(train)))
    best = training.BestWeights("score")
    measured = training.fit(
        task,
        train,
        None,
        size["epochs"],
        [ErrorRate(validation), best],
        size["backup"],
    )
    best.restore()
    measured["cost"]["inference_parameters"] = inference_parameters
    return {
        "validation_score": best.best,
        "test": {"phoneme_error_rate": error_rate(task, test)},
        **measured,
    }


TABLE = harness.Table(
    name="phoneme_recognition",
    version=1,
    datasets=DATASETS,
    default_datasets=("timit",),
    methods=methods.PAPER_METHODS,
    authors_settings=authors_settings,
    run=run,
    sizes=SIZES,
)

if __name__ == "__main__":
    harness.main(TABLE, __doc__)
