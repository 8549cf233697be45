"""KerasHub's tasks, one of each kind, from raw data through `fit` to use."""

import functools
import io
import typing

import keras
import numpy as np
import pytest
import sentencepiece
from backbones import BACKBONES
from backbones import data
from helpers import BACKEND
from helpers import move_adapters
from helpers import to_numpy
from keras_hub import layers
from keras_hub import models
from keras_hub import tokenizers

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

SMALL = {"rank": 2, "decoder_units": (4,)}
BATCH_SIZE = 2
LENGTH = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "jumped"]
TEXTS = ["the quick brown fox", "a lazy dog", "the dog", "a quick fox jumped"]
PROTEINS = ["A R N D", "C E Q", "G H I L K", "M F"]
LABELS = np.arange(4) % 2
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), "uint8")
# The size that the backbones take.
CONVERSION = {"image_size": (16, 16), "scale": 1 / 255}


class Case(typing.NamedTuple):
    """A task, what `fit` takes, and what `generate` takes, if it has that."""

    task: keras.Model
    x: typing.Any
    y: typing.Any = None
    prompts: typing.Any = None


def make_backbone(name, tokenizer):
    """A small backbone with an embedding for each token of a tokenizer.

    Its weights are so large that what it generates depends on its input.
    """
    config = BACKBONES[name]().get_config()
    config["vocabulary_size"] = tokenizer.vocabulary_size()
    backbone = getattr(models, name).from_config(config)
    rng = np.random.default_rng(0)
    for weight in backbone.weights:
        if weight.name in ("kernel", "embeddings"):
            weight.assign(rng.normal(size=weight.shape))
    return backbone


def make_bert_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tokenizers.BertTokenizer([*special, *WORDS])


def make_protein_tokenizer():
    special = ["<unk>", "<cls>", "<eos>", "<pad>", "<mask>"]
    return tokenizers.ESMTokenizer([*special, *"ARNDCEQGHILKMF"])


def make_byte_pair_tokenizer(tokenizer_class, tokens, **options):
    vocabulary = {token: index for index, token in enumerate([*tokens, "th"])}
    return tokenizer_class(vocabulary, ["t h"], **options)


@functools.cache
def train_sentence_pieces(start, end):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=40,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        bos_piece=start,
        eos_piece=end,
        minloglevel=2,
    )
    return model.getvalue()


def make_text_classifier():
    preprocessor = models.BertTextClassifierPreprocessor(
        make_bert_tokenizer(), sequence_length=LENGTH
    )
    task = models.BertTextClassifier(
        BACKBONES["BertBackbone"](), num_classes=2, preprocessor=preprocessor
    )
    return Case(task, TEXTS, LABELS)


def make_masked_lm():
    preprocessor = models.BertMaskedLMPreprocessor(
        make_bert_tokenizer(),
        sequence_length=LENGTH,
        mask_selection_rate=0.5,
        mask_selection_length=3,
    )
    task = models.BertMaskedLM(BACKBONES["BertBackbone"](), preprocessor)
    return Case(task, TEXTS)


def make_text_embedder():
    preprocessor = models.BertTextEmbedderPreprocessor(
        make_bert_tokenizer(), sequence_length=LENGTH
    )
    task = models.BertTextEmbedder(BACKBONES["BertBackbone"](), preprocessor)
    # It has no loss of its own.
    task.compile(loss="mse")
    return Case(task, TEXTS, np.eye(4, 8))


def make_causal_lm():
    # The token 0 pads, and must not be the one to end with.
    tokenizer = make_byte_pair_tokenizer(
        tokenizers.GPT2Tokenizer, ["!", "<|endoftext|>", "Ġ", *LETTERS]
    )
    preprocessor = models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=LENGTH
    )
    backbone = make_backbone("GPT2Backbone", tokenizer)
    task = models.GPT2CausalLM(backbone, preprocessor)
    return Case(task, TEXTS, prompts=WORDS)


def make_mixture_of_experts():
    tokenizer = tokenizers.MixtralTokenizer(
        train_sentence_pieces("<s>", "</s>")
    )
    preprocessor = models.MixtralCausalLMPreprocessor(
        tokenizer, sequence_length=LENGTH
    )
    backbone = make_backbone("MixtralBackbone", tokenizer)
    task = models.MixtralCausalLM(backbone, preprocessor)
    return Case(task, TEXTS, prompts=WORDS)


def make_seq_2_seq_lm():
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    tokenizer = make_byte_pair_tokenizer(
        tokenizers.BartTokenizer, [*special, "Ġ", *LETTERS]
    )
    preprocessor = models.BartSeq2SeqLMPreprocessor(
        tokenizer,
        encoder_sequence_length=LENGTH,
        decoder_sequence_length=LENGTH,
    )
    backbone = make_backbone("BartBackbone", tokenizer)
    task = models.BartSeq2SeqLM(backbone, preprocessor)
    x = {"encoder_text": TEXTS, "decoder_text": TEXTS[::-1]}
    return Case(task, x, prompts=TEXTS)


def make_protein_classifier():
    preprocessor = models.ESMProteinClassifierPreprocessor(
        make_protein_tokenizer(), sequence_length=LENGTH
    )
    task = models.ESMProteinClassifier(
        BACKBONES["ESMBackbone"](), num_classes=2, preprocessor=preprocessor
    )
    return Case(task, PROTEINS, LABELS)


def make_image_classifier():
    preprocessor = models.ViTImageClassifierPreprocessor(
        layers.ViTImageConverter(**CONVERSION)
    )
    task = models.ViTImageClassifier(
        BACKBONES["ViTBackbone"](), num_classes=2, preprocessor=preprocessor
    )
    return Case(task, IMAGES, LABELS)


def make_image_segmenter():
    preprocessor = models.SegFormerImageSegmenterPreprocessor(
        layers.SegFormerImageConverter(**CONVERSION), resize_output_mask=True
    )
    task = models.SegFormerImageSegmenter(
        BACKBONES["SegFormerBackbone"](),
        num_classes=2,
        preprocessor=preprocessor,
    )
    return Case(task, IMAGES, np.eye(2)[IMAGES[..., 0] // 128])


def make_depth_estimator():
    preprocessor = models.DepthAnythingDepthEstimatorPreprocessor(
        layers.DepthAnythingImageConverter(**CONVERSION)
    )
    task = models.DepthAnythingDepthEstimator(
        BACKBONES["DepthAnythingBackbone"](),
        depth_estimation_type="metric",
        max_depth=10.0,
        preprocessor=preprocessor,
    )
    # Weight decay would move what has no gradient.
    task.optimizer.weight_decay = None
    return Case(task, IMAGES, 1 + IMAGES[:, :16, :16, :1] / 32)


def make_object_detector():
    converter = layers.DFineImageConverter(
        bounding_box_format="yxyx", **CONVERSION
    )
    task = models.DFineObjectDetector(
        BACKBONES["DFineBackbone"](),
        num_classes=5,
        preprocessor=models.DFineObjectDetectorPreprocessor(converter),
        prediction_decoder=layers.NonMaxSuppression(
            "yxyx", from_logits=True, confidence_threshold=0.0
        ),
    )
    boxes = [[1.0, 2.0, 9.0, 12.0], [4.0, 4.0, 18.0, 18.0]]
    y = {"boxes": np.array([boxes] * 4), "labels": np.array([[0, 2]] * 4)}
    return Case(task, IMAGES, y)


def make_vision_language_model():
    tokenizer = tokenizers.PaliGemmaTokenizer(
        train_sentence_pieces("<bos>", "<eos>")
    )
    preprocessor = models.PaliGemmaCausalLMPreprocessor(
        tokenizer,
        layers.PaliGemmaImageConverter(**CONVERSION),
        sequence_length=LENGTH,
    )
    backbone = make_backbone("PaliGemmaBackbone", tokenizer)
    task = models.PaliGemmaCausalLM(preprocessor, backbone)
    prompts = {"images": IMAGES, "prompts": WORDS[:4]}
    return Case(task, {**prompts, "responses": WORDS[4:]}, prompts=prompts)


def make_text_recognizer():
    # `fit` goes through permutations of the letters, and each one by one.
    length = 2
    tokenizer = tokenizers.PARSeqTokenizer([*LETTERS], max_label_length=length)
    preprocessor = models.PARSeqCausalLMPreprocessor(
        layers.PARSeqImageConverter(**CONVERSION),
        tokenizer,
        sequence_length=length,
    )
    config = BACKBONES["PARSeqBackbone"]().get_config()
    config["vocabulary_size"] = tokenizer.vocabulary_size()
    config["max_label_length"] = length
    backbone = models.PARSeqBackbone.from_config(config)
    task = models.PARSeqCausalLM(preprocessor, backbone)
    return Case(
        task, {"images": IMAGES, "responses": WORDS[:4]}, prompts=IMAGES
    )


def make_audio_to_text():
    tokenizer = tokenizers.MoonshineTokenizer(
        train_sentence_pieces("<s>", "</s>")
    )
    preprocessor = models.MoonshineAudioToTextPreprocessor(
        layers.MoonshineAudioConverter(),
        tokenizer,
        decoder_sequence_length=LENGTH,
    )
    backbone = make_backbone("MoonshineBackbone", tokenizer)
    task = models.MoonshineAudioToText(backbone, preprocessor)
    # It takes long to compile.
    task.compile(run_eagerly=True)
    audio = np.random.default_rng(0).normal(size=(4, 2048)).astype("float32")
    return Case(task, {"audio": audio, "text": TEXTS}, prompts={"audio": audio})


def make_qwen_with_images():
    # Its preprocessor takes images for generation alone.
    task = models.Qwen3_5CausalLM(BACKBONES["Qwen3_5Backbone"](), None)
    # It reads the sizes of the images as Python integers.
    task.compile(run_eagerly=True)
    x = keras.tree.map_structure(
        lambda value: np.concatenate([value, value]), data(task.backbone)
    )
    return Case(task, x, np.roll(x["token_ids"], -1, axis=1))


TASKS = {
    "text_classifier": make_text_classifier,
    "masked_lm": make_masked_lm,
    "text_embedder": make_text_embedder,
    "causal_lm": make_causal_lm,
    "mixture_of_experts": make_mixture_of_experts,
    "seq_2_seq_lm": make_seq_2_seq_lm,
    "protein_classifier": make_protein_classifier,
    "image_classifier": make_image_classifier,
    "image_segmenter": make_image_segmenter,
    "depth_estimator": make_depth_estimator,
    "object_detector": make_object_detector,
    "vision_language_model": make_vision_language_model,
    "text_recognizer": make_text_recognizer,
    "audio_to_text": make_audio_to_text,
    "qwen_with_images": make_qwen_with_images,
}


def make_sam():
    preprocessor = models.SAMImageSegmenterPreprocessor(
        layers.SAMImageConverter(**CONVERSION)
    )
    task = models.SAMImageSegmenter(BACKBONES["SAMBackbone"](), preprocessor)
    x = {
        "images": IMAGES,
        "points": np.ones((4, 1, 2)),
        "labels": np.ones((4, 1)),
        "boxes": np.ones((4, 1, 2, 2)),
        "masks": np.ones((4, 1, 16, 16, 1)),
    }
    return Case(task, x)


def make_clip_tokens(ends):
    special = ["<|startoftext|>", "<|endoftext|>"]
    return [*special, *LETTERS, *[f"{letter}</w>" for letter in ends]]


def make_sam_3():
    tokenizer = make_byte_pair_tokenizer(
        models.SAM3Tokenizer, make_clip_tokens(ends="aegx")
    )
    preprocessor = models.SAM3PromptableConceptImageSegmenterPreprocessor(
        tokenizer,
        layers.SAM3ImageConverter(**CONVERSION),
        sequence_length=LENGTH,
    )
    backbone = BACKBONES["SAM3PromptableConceptBackbone"]()
    task = models.SAM3PromptableConceptImageSegmenter(backbone, preprocessor)
    # KerasHub 0.32 cannot take several images without boxes.
    return Case(task, {"images": IMAGES[:1], "prompts": ["the dog"]})


def make_text_to_image():
    tokenizer = make_byte_pair_tokenizer(
        tokenizers.CLIPTokenizer, make_clip_tokens(ends="aegx")
    )
    clip_preprocessor = models.CLIPPreprocessor(
        tokenizer, sequence_length=LENGTH
    )
    t5_preprocessor = models.T5Preprocessor(
        tokenizers.T5Tokenizer(train_sentence_pieces("<s>", "</s>")),
        sequence_length=LENGTH,
    )
    task = models.StableDiffusion3TextToImage(
        BACKBONES["StableDiffusion3Backbone"](),
        models.StableDiffusion3TextToImagePreprocessor(
            clip_preprocessor, clip_preprocessor, t5_preprocessor
        ),
    )
    return Case(task, TEXTS, prompts=["the dog", "a fox"])


# Those that KerasHub 0.32 cannot train. Its `FluxTextToImage` can neither be
# trained nor used: its backbone's steps raise `NotImplementedError`.
TASKS_FOR_INFERENCE = {
    "sam": make_sam,
    "sam_3": make_sam_3,
    "text_to_image": make_text_to_image,
}

# KerasHub can fit Moonshine from raw audio, Keras can fit Qwen with images,
# and KerasHub can make the T5 encoder of Stable Diffusion 3, on TensorFlow
# alone.
TENSORFLOW_ALONE = ["audio_to_text", "qwen_with_images", "text_to_image"]
# What takes long to compile runs where nothing is compiled.
SAMPLE = {
    "jax": ["text_classifier", "causal_lm", "text_recognizer", "sam"],
    "tensorflow": ["text_classifier", "causal_lm", *TENSORFLOW_ALONE],
    "torch": sorted({*TASKS, *TASKS_FOR_INFERENCE} - {*TENSORFLOW_ALONE}),
}[BACKEND]


def use(case):
    """What the task predicts or generates, as a list of arrays."""
    # Some preprocessors draw what they mask.
    keras.utils.set_random_seed(0)
    task, x, _, prompts = case
    if prompts is None:
        outputs = task.predict(x, batch_size=BATCH_SIZE, verbose=0)
    elif isinstance(task, models.TextToImage):
        outputs = task.generate(prompts, num_steps=2, seed=0)
    else:
        outputs = task.generate(prompts)
    return [np.asarray(output) for output in keras.tree.flatten(outputs)]


def assert_adapters_are_used(case, rng):
    move_adapters(case.task, rng, scale=1.0)
    adapted = use(case)
    with keras_fvae.adapter_disabled(case.task):
        base = use(case)
    assert not all(map(np.array_equal, adapted, base))


def weights_of_adapter(layer):
    """One that only the task's loss moves, and one that only the ELBO does."""
    reference = layer.adapter.fvae.get_reference_weights()
    name = "views_conditionalGaussianDecoders.output_layer.bias"
    return to_numpy(layer.adapter.kernel_b), reference[name]


# Of the others there are many of a kind, or they take long.
IN_SHORT = (
    "causal_lm",
    "image_classifier",
    "object_detector",
    "text_classifier",
)


def sample_of(tasks):
    """The parameters of a test that is to run on some tasks."""
    return [
        pytest.param(name, marks=[] if name in IN_SHORT else [pytest.mark.slow])
        for name in SAMPLE
        if name in tasks
    ]


@pytest.mark.shared_out
@pytest.mark.parametrize("name", sample_of(TASKS))
def test_fit_and_use(name, rng):
    case = TASKS[name]()
    task = case.task
    task.backbone.enable_fvae_lora(**SMALL)
    layers = adapted_layers(task)
    before = [weights_of_adapter(layer) for layer in layers]
    adapter_ids = {id(w) for layer in layers for w in layer.adapter.weights}
    backbone_ids = {id(weight) for weight in task.backbone.weights}
    values = [to_numpy(weight) for weight in task.weights]

    [loss] = task.fit(case.x, case.y, batch_size=BATCH_SIZE, verbose=0).history[
        "loss"
    ]
    assert np.isfinite(loss)
    for layer, old_weights in zip(layers, before):
        same = map(np.array_equal, weights_of_adapter(layer), old_weights)
        assert not any(same), layer.path
    for weight, value in zip(task.weights, values):
        if id(weight) not in adapter_ids:
            is_same = np.array_equal(to_numpy(weight), value)
            # The backbone stays, bit for bit; the task's own layers train.
            assert is_same == (id(weight) in backbone_ids), weight.path

    if case.prompts is not None:
        task.compile(sampler="greedy")
    assert_adapters_are_used(case, rng)


@pytest.mark.parametrize("name", sample_of(TASKS_FOR_INFERENCE))
def test_use_alone(name, rng):
    case = TASKS_FOR_INFERENCE[name]()
    case.task.backbone.enable_fvae_lora(**SMALL)
    with pytest.raises(NotImplementedError):
        case.task.fit(case.x)
    assert_adapters_are_used(case, rng)


@pytest.mark.one_backend
def test_a_backbone_with_a_loss_of_its_own():
    """It calls itself once more in that, and tells itself nothing."""
    model = BACKBONES["SigLIPBackbone"]()
    x = data(model)
    model.compile(run_eagerly=BACKEND == "tensorflow")
    expected = model.evaluate(x, verbose=0)
    model.enable_fvae_lora(**SMALL, elbo_weight=10.0)
    layers = adapted_layers(model)
    # A loss that there is in evaluation, too.
    layers[0].adapter.kernel_b.regularizer = keras.regularizers.L2(1e-6)
    # Without the ELBO and without noise.
    assert model.evaluate(x, verbose=0) == pytest.approx(expected, rel=1e-4)
    before = [weights_of_adapter(layer) for layer in layers]
    [loss] = model.fit(x, verbose=0).history["loss"]
    assert loss > expected + 10
    for layer, old_weights in zip(layers, before):
        same = map(np.array_equal, weights_of_adapter(layer), old_weights)
        assert not any(same), layer.path
