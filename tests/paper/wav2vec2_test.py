"""Wav2Vec2 against transformers, and CTC against its definition."""

import functools
import itertools
import json
import shutil

import huggingface_hub
import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import BACKEND
from helpers import JIT_COMPILE
from helpers import ROOT
from helpers import to_numpy
from helpers import value_and_gradients
from keras import ops

import keras_fvae
from examples.paper.wav2vec2 import audio
from examples.paper.wav2vec2 import converter
from examples.paper.wav2vec2 import ctc
from examples.paper.wav2vec2 import layers
from examples.paper.wav2vec2.backbone import VARIANTS
from examples.paper.wav2vec2.backbone import Wav2Vec2Backbone
from examples.paper.wav2vec2.ctc import CTCLoss
from examples.paper.wav2vec2.ctc import Wav2Vec2CTC

# What transformers computes: see the README there.
REFERENCE = ROOT / "tests" / "reference" / "wav2vec2"
VARIANT = pytest.mark.parametrize("variant", ["group", "layer"])
NO_DROPOUT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "mask_prob": 0.0,
}
SMALL = {
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 32,
    "conv_filters": (16, 16, 16),
    "conv_kernel_sizes": (10, 3, 2),
    "conv_strides": (5, 2, 2),
    "position_kernel_size": 8,
    "position_groups": 4,
    "mask_length": 3,
}


@functools.cache
def expected(variant):
    with np.load(REFERENCE / variant / "expected.npz") as file:
        return dict(file)


def make_inputs(variant, masked):
    lengths = expected(variant)["lengths"]
    samples = expected(variant)["input_values"]
    mask = np.arange(samples.shape[1]) < lengths[:, None]
    if not masked:
        mask = np.ones_like(mask)
    return {"audio": samples, "padding_mask": mask.astype("int32")}


def count_frames(task, inputs):
    return task.backbone.num_frames(inputs["padding_mask"].sum(axis=1))


def with_hidden_states(task):
    """A model of all that the reference has figures of."""
    backbone = task.backbone
    blocks = backbone.transformer_layers
    convolved = backbone.feature_encoder.output
    return keras.Model(
        task.inputs,
        {
            "convolution_only": ops.transpose(convolved, (0, 2, 1)),
            "features": backbone.feature_projection.layer_norm(convolved),
            "hidden_states_0": blocks[0].input[0],
            "hidden_states_1": blocks[0].output,
            "hidden_states_2": blocks[1].output,
            "hidden": backbone.output,
            "logits": task.output_dense(backbone.output),
        },
    )


@VARIANT
def test_agrees_with_transformers(variant):
    task = converter.load_ctc(REFERENCE / variant, use_padding_mask=True)
    model, reference = with_hidden_states(task), expected(variant)
    for suffix in ("masked", "unmasked"):
        inputs = make_inputs(variant, suffix == "masked")
        outputs = model.predict(inputs, verbose=0)
        convolved = outputs.pop("convolution_only")
        np.testing.assert_allclose(
            convolved, reference["convolution_only"], atol=1e-4
        )
        for name, value in outputs.items():
            np.testing.assert_allclose(
                value, reference[f"{name}_{suffix}"], atol=1e-4, err_msg=name
            )
        num_frames = count_frames(task, inputs)
        assert num_frames.tolist() == reference[f"frames_{suffix}"].tolist()
        losses = ctc.ctc_losses(
            reference["labels"], outputs["logits"], num_frames
        )
        np.testing.assert_allclose(
            to_numpy(losses).sum(),
            reference[f"ctc_loss_sum_{suffix}"],
            rtol=1e-5,
        )


@pytest.mark.one_backend
def test_group_variant_takes_padding_for_silence():
    """Its encoder does; its loss counts the real frames."""
    task = converter.load_ctc(REFERENCE / "group")
    inputs, reference = make_inputs("group", True), expected("group")
    logits = task.predict(inputs, verbose=0)
    np.testing.assert_allclose(logits, reference["logits_unmasked"], atol=1e-4)
    losses = ctc.ctc_losses(
        reference["labels"], logits, reference["frames_masked"]
    )
    task.compile(loss=CTCLoss("sum"))
    np.testing.assert_allclose(
        task.evaluate(inputs, reference["labels"], verbose=0),
        to_numpy(losses).sum(),
        rtol=1e-5,
    )


@pytest.mark.one_backend
@VARIANT
def test_frames_of_lengths(variant):
    backbone = converter.load_backbone(REFERENCE / variant)
    num_samples, num_frames = expected(variant)["frames_of_lengths"].T
    assert backbone.num_frames(num_samples).tolist() == num_frames.tolist()
    assert backbone.receptive_field == num_samples[0]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "num_samples, num_frames", [(399, 0), (400, 1), (719, 1), (720, 2)]
)
def test_frames_of_the_published_convolutions(num_samples, num_frames):
    backbone = Wav2Vec2Backbone(1, 1, 4, 4, (4,) * 7, position_groups=1)
    assert backbone.receptive_field == 400
    assert backbone.num_frames(num_samples) == num_frames
    shape = backbone.feature_encoder.compute_output_shape((1, num_samples))
    assert shape == (1, num_frames, 4)
    mask = np.arange(16_000) < [[num_samples]]
    frames = to_numpy(backbone.frame_padding_mask(mask))
    assert frames.shape == (1, 49)
    assert frames.sum() == num_frames


@pytest.mark.one_backend
@pytest.mark.parametrize("kernel_size, right", [(4, 1), (3, 1)])
def test_positional_convolution_looks_left_if_even(kernel_size, right):
    layer = layers.PositionalConvolution(kernel_size, groups=1)
    inputs = np.zeros((1, 9, 1), "float32")
    inputs[:, 5] = 1
    layer.build(inputs.shape)
    layer.convolution.kernel.assign(np.ones((kernel_size, 1, 1)))
    moved = np.flatnonzero(to_numpy(layer(inputs)))
    # Frames that see the fifth: those from `right` frames before it on.
    assert moved.tolist() == [*range(5 - right, 5 - right + kernel_size)]


@pytest.mark.one_backend
def test_padding_does_not_leak():
    """An utterance alone, and in a batch with noise in place of padding."""
    task = converter.load_ctc(REFERENCE / "layer")
    batch = make_inputs("layer", True)
    length = batch["padding_mask"][2].sum()
    alone = {name: array[2:, :length] for name, array in batch.items()}
    noise = np.random.default_rng(0).normal(size=batch["audio"].shape)
    batch["audio"] = np.where(batch["padding_mask"], batch["audio"], noise)
    logits = task.predict(alone, verbose=0)
    np.testing.assert_allclose(
        task.predict(batch, verbose=0)[2:, : logits.shape[1]],
        logits,
        atol=1e-5,
    )


@pytest.mark.one_backend
@VARIANT
def test_adapters_do_not_count_padding(variant):
    """Whether or not attention does."""
    task = converter.load_ctc(REFERENCE / variant)
    keras_fvae.enable_fvae_lora(task, 2, trainable_layer_names=["logits"])
    inputs = make_inputs(variant, True)
    num_frames = count_frames(task, inputs)
    latents = keras_fvae.latents(task, inputs)
    assert len(latents) == 4
    for layer_latents in latents.values():
        mask = layer_latents.mask
        assert mask.sum(axis=1).tolist() == num_frames.tolist()


def every_path(num_frames, num_classes):
    return itertools.product(range(num_classes), repeat=num_frames)


def spell(path):
    """What the classes of a path spell: the definition."""
    merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
    return [c for c in merged if c != ctc.BLANK]


def loss_by_enumeration(labels, logits):
    """-log of the sum over all paths that spell the labels."""
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total = sum(
        np.prod(probabilities[np.arange(len(path)), path])
        for path in every_path(*logits.shape)
        if spell(path) == labels
    )
    return -np.log(total)


@pytest.mark.one_backend
def test_ctc_losses_by_enumeration(rng):
    """Labels that repeat, none at all, too many for the frames."""
    cases = [([1, 2], 5), ([1, 1], 3), ([], 4), ([2], 1), ([2, 2], 2)]
    labels = np.zeros((5, 2), "int32")
    for row, (row_labels, _) in zip(labels, cases):
        row[: len(row_labels)] = row_labels
    num_frames = np.array([length for _, length in cases])
    logits = rng.normal(size=(5, 5, 3)).astype("float32")
    losses = to_numpy(ctc.ctc_losses(labels, logits, num_frames))
    for case, row, loss in zip(cases[:-1], logits, losses):
        np.testing.assert_allclose(
            loss, loss_by_enumeration(case[0], row[: case[1]]), rtol=1e-5
        )
    assert losses[-1] == 0

    def total(logits):
        return ops.sum(ctc.ctc_losses(labels, logits, num_frames))

    *_, (gradient,) = value_and_gradients(total, [], [logits])
    is_real = np.arange(5) < num_frames[:, None]
    is_real[-1] = False
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=2) > 0).tolist() == is_real.tolist()


@pytest.mark.one_backend
def test_loss_of_a_task_is_the_mean_over_utterances():
    """Each with its weight."""
    task, reference = converter.load_ctc(REFERENCE / "layer"), expected("layer")
    labels = reference["labels"]
    losses = ctc.ctc_losses(
        labels, reference["logits_masked"], reference["frames_masked"]
    )
    weights = np.array([1.0, 0.0, 0.5], "float32")
    loss = task.evaluate(
        make_inputs("layer", True), labels, sample_weight=weights, verbose=0
    )
    np.testing.assert_allclose(loss, to_numpy(losses) @ weights / 3, rtol=1e-5)


@pytest.mark.one_backend
def test_greedy_decode():
    classes = np.array(
        [[1, 1, 0, 1, 2, 2, 0], [0, 0, 3, 3, 3, 1, 1], [0, 0, 0, 2, 2, 2, 2]]
    )
    logits = np.eye(4)[classes]
    assert ctc.greedy_decode(logits, [7, 5, 3]) == [[1, 1, 2], [3], []]


@pytest.mark.one_backend
def test_greedy_decode_of_every_path():
    paths = np.array([*every_path(4, 3)])
    decoded = ctc.greedy_decode(np.eye(3)[paths], [4] * len(paths))
    assert decoded == [spell(path) for path in paths]


def distance_by_definition(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        distance_by_definition(a[1:], b[1:]) + (a[0] != b[0]),
        distance_by_definition(a[1:], b) + 1,
        distance_by_definition(a, b[1:]) + 1,
    )


@pytest.mark.one_backend
def test_edit_distance_by_definition(rng):
    for _ in range(50):
        a, b = (
            rng.integers(3, size=rng.integers(6)).tolist() for _ in range(2)
        )
        assert ctc.edit_distance(a, b) == distance_by_definition(a, b)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "references, predictions, rate",
    [
        ([[1, 2, 3]], [[1, 2, 3]], 0.0),
        ([[1, 2, 3], [4]], [[1, 3], [4]], 1 / 4),
        # Of the whole set: not the mean of 1 and of 0.
        ([[1], [1, 2, 3]], [[2], [1, 2, 3]], 1 / 4),
        ([[1]], [[2, 2, 2]], 3.0),
        ([[], [1]], [[1], [1]], 1.0),
    ],
)
def test_phoneme_error_rate(references, predictions, rate):
    assert ctc.phoneme_error_rate(references, predictions) == rate


@pytest.mark.one_backend
def test_phoneme_error_rate_refuses_what_has_none():
    with pytest.raises(ValueError, match="2 references, 1 predictions"):
        ctc.phoneme_error_rate([[1], [2]], [[1]])
    with pytest.raises(ValueError, match="no labels"):
        ctc.phoneme_error_rate([[]], [[1]])


@pytest.mark.one_backend
def test_pad_utterances(rng):
    utterances = {
        "a": rng.normal(3, 2, size=50),
        "b": rng.integers(-(2**15), 2**15, size=80, dtype="int16"),
        "silence": np.zeros(60),
    }
    batch = audio.pad_utterances(utterances, num_samples=100, min_samples=50)
    assert batch["audio"].dtype == "float32"
    assert batch["padding_mask"].sum(axis=1).tolist() == [50, 80, 60]
    assert not batch["audio"][batch["padding_mask"] == 0].any()
    for row, (name, utterance) in zip(batch["audio"], utterances.items()):
        real = row[: len(utterance)]
        np.testing.assert_allclose(real.mean(), 0, atol=1e-6)
        assert abs(real.std() - (name != "silence")) < 1e-5


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "shape, problem",
    [
        ((49,), "'FDHC0/SI1559' has 49 samples, too few .* which sees 50"),
        ((101,), "'FDHC0/SI1559' has 101 samples, more than the 100"),
        ((60, 2), "'FDHC0/SI1559' has shape (60, 2)"),
    ],
)
def test_utterances_are_refused_by_name(shape, problem):
    utterances = {"good": np.ones(60), "FDHC0/SI1559": np.ones(shape)}
    problem = problem.replace("(", "\\(").replace(")", "\\)")
    with pytest.raises(ValueError, match=problem):
        audio.pad_utterances(utterances, num_samples=100, min_samples=50)


def draw_masks(lengths, max_length, times, mask_prob, mask_length):
    """Masks of several draws, `(times, batch, frames)`."""
    padding_mask = np.arange(max_length) < np.array(lengths)[:, None]
    seed = keras.random.SeedGenerator(0)
    return np.array(
        [
            to_numpy(
                layers.draw_time_mask(
                    padding_mask, mask_prob, mask_length, 2, seed
                )
            )
            for _ in range(times)
        ]
    )


@pytest.mark.one_backend
def test_number_of_masked_spans():
    """With spans of one frame, what is masked counts them."""
    masks = draw_masks([25, 25, 20, 5, 1], 25, 60, 0.3, 1)
    counts = masks.sum(axis=2)
    # 7.5 is rounded up or down, for the whole batch.
    assert {*counts[:, 0]} == {7, 8}
    assert counts[:, 0].tolist() == counts[:, 1].tolist()
    assert abs(counts[:, 0].mean() - 7.5) < 0.25
    # 6 exactly; at least 2; as many as there are frames.
    assert (counts[:, 2:] == [6, 2, 1]).all()
    assert not np.array_equal(masks[:, 0], masks[:, 1])
    # Each real frame as often as any other, and none of padding.
    rates = masks[:, :2].mean(axis=(0, 1))
    assert rates.min() > 0.1 and rates.max() < 0.5
    assert not masks[:, 2, 20:].any()


@pytest.mark.one_backend
def test_masked_spans():
    masks = draw_masks([20, 12, 4, 3], 20, 40, 0.2, 4)
    for mask in masks.reshape(-1, 20):
        runs = [len([*run]) for is_in, run in itertools.groupby(mask) if is_in]
        assert all(length >= 4 for length in runs)
    # Spans fit into the real frames, reach the last of them, and overlap.
    assert masks[:, 0].any(axis=0).all()
    assert masks[:, 1].any(axis=0).tolist() == [True] * 12 + [False] * 8
    assert masks[:, 1].sum(axis=1).min() < 8
    # One start is left, then none.
    assert (masks[:, 2:].sum(axis=2) == [4, 0]).all()


@pytest.mark.one_backend
def test_masking_is_of_training():
    layer = layers.TimeMasking(mask_prob=0.5, mask_length=2, min_masks=2)
    inputs = np.zeros((2, 10, 3), "float32")
    mask = np.arange(10) < np.array([[10], [6]])
    assert not to_numpy(layer(inputs, mask)).any()
    vector = to_numpy(layer.mask_vector)
    outputs = to_numpy(layer(inputs, mask, training=True))
    is_masked = outputs.any(axis=2)
    assert 0 < is_masked[0].sum() < 10 and not is_masked[1, 6:].any()
    np.testing.assert_array_equal(
        outputs, np.where(is_masked[..., None], vector, inputs)
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("variant", VARIANTS)
def test_config_comes_back(variant):
    backbone = Wav2Vec2Backbone.from_variant(
        variant, **{**SMALL, "dtype": "mixed_bfloat16", "name": "speech"}
    )
    config = backbone.get_config()
    back = Wav2Vec2Backbone.from_config(config)
    assert back.get_config() == config
    for name, value in {**VARIANTS[variant], **SMALL}.items():
        assert config[name] == value
    paths = [(w.path, tuple(w.shape)) for w in backbone.weights]
    assert [(w.path, tuple(w.shape)) for w in back.weights] == paths
    for layer in backbone.layers:
        copy = keras.layers.deserialize(keras.layers.serialize(layer))
        assert copy.get_config() == layer.get_config()


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "options, problem",
    [
        ({"num_heads": 3}, "`num_heads` must divide `hidden_dim`, which is 32"),
        ({"position_groups": 5}, "`position_groups` must divide"),
        ({"feature_norm": "batch"}, "`feature_norm` must be one of"),
        ({"conv_strides": (5, 2)}, "one number for each convolution"),
    ],
)
def test_backbone_refuses(options, problem):
    with pytest.raises(ValueError, match=problem):
        Wav2Vec2Backbone(**{**SMALL, **options})


@pytest.mark.one_backend
def test_unknown_variant():
    with pytest.raises(ValueError, match="'wav2vec2-large-lv60'"):
        Wav2Vec2Backbone.from_variant("wav2vec2-base")


@pytest.mark.slow
@pytest.mark.one_backend
def test_parameters_of_the_large_variant():
    backbone = Wav2Vec2Backbone.from_variant("wav2vec2-large", num_layers=1)
    block = backbone.transformer_layers[0].count_params()
    assert block == 12_596_224
    # The original has the 128 norms of the positional kernel beside it.
    assert backbone.count_params() + 23 * block == 315_428_992 - 128


@pytest.mark.one_backend
def test_saved_task_comes_back(tmp_path):
    task = converter.load_ctc(REFERENCE / "group")
    task.compile(keras.optimizers.SGD(0.25), loss=CTCLoss("sum"))
    inputs = make_inputs("group", True)
    predictions = task.predict(inputs, verbose=0)
    task.save(tmp_path / "task.keras")
    back = keras.saving.load_model(tmp_path / "task.keras")
    assert isinstance(back, Wav2Vec2CTC)
    assert back.get_config() == task.get_config()
    assert back.get_compile_config() == task.get_compile_config()
    np.testing.assert_array_equal(back.predict(inputs, verbose=0), predictions)


@pytest.mark.one_backend
def test_logits_are_float32():
    task = converter.load_ctc(REFERENCE / "layer", dtype="mixed_bfloat16")
    assert task.backbone.output.dtype == "bfloat16"
    logits = task.predict(make_inputs("layer", True), verbose=0)
    assert logits.dtype == "float32"
    assert np.abs(logits - expected("layer")["logits_masked"]).max() < 0.1


def make_tones(rng):
    """Utterances of three tones that swell, out of three, of many lengths."""
    labels = rng.integers(1, 4, (16, 3))
    utterances = {}
    for index, tones in enumerate(labels):
        times = np.arange(rng.integers(150, 250))
        periods = np.array([5.0, 9.0, 16.0])[tones - 1]
        waves = np.sin(2 * np.pi * times / periods[:, None])
        waves *= np.sin(np.pi * times / len(times))
        noise = rng.normal(scale=0.1, size=waves.size)
        utterances[f"tones {index}"] = waves.ravel() + noise
    return audio.pad_utterances(utterances, 800, 30), labels


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "adapted", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "jit_compile",
    JIT_COMPILE
    if BACKEND != "tensorflow"
    # Where XLA takes long.
    else [False, pytest.param(True, marks=pytest.mark.slow)],
)
def test_training_lowers_the_loss(jit_compile, adapted, rng):
    task = Wav2Vec2CTC(Wav2Vec2Backbone(**SMALL), vocabulary_size=4)
    if adapted:
        keras_fvae.enable_fvae_lora(
            task,
            rank=2,
            decoder_units=(4,),
            target_layer_names=["query", "value"],
            trainable_layer_names=["logits"],
        )
    task.compile(keras.optimizers.Adam(2e-2), jit_compile=jit_compile)
    inputs, labels = make_tones(rng)
    losses = task.fit(inputs, labels, epochs=30, verbose=0).history["loss"]
    # Of CTC: what the adapters add to it is below 0.1.
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
@VARIANT
def test_phonemes_are_learned(variant, rng):
    """From the waveform to labels that are right."""
    task = Wav2Vec2CTC(
        Wav2Vec2Backbone(
            **{**SMALL, **NO_DROPOUT},
            feature_norm=variant,
            normalize_first=variant == "layer",
        ),
        vocabulary_size=4,
    )
    task.compile(keras.optimizers.Adam(3e-3))
    inputs, labels = make_tones(rng)
    task.fit(inputs, labels, epochs=200, verbose=0)
    predictions = ctc.greedy_decode(
        task.predict(inputs, verbose=0), count_frames(task, inputs)
    )
    assert ctc.phoneme_error_rate(labels.tolist(), predictions) < 0.2


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the checkpoint with layer norms."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(REFERENCE / "layer", folder)
    return folder


def read_tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write_tensors(folder, tensors, name="model.safetensors"):
    safetensors.numpy.save_file(tensors, folder / name)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def assert_same_weights(model, other):
    assert len(model.weights) == len(other.weights)
    for weight, expected_weight in zip(model.weights, other.weights):
        np.testing.assert_array_equal(
            to_numpy(weight), to_numpy(expected_weight), err_msg=weight.path
        )


@pytest.mark.one_backend
def test_old_names_without_a_prefix(checkpoint):
    new = "parametrizations.weight.original"
    tensors = {
        name.removeprefix("wav2vec2.")
        .replace(f"{new}0", "weight_g")
        .replace(f"{new}1", "weight_v"): array
        for name, array in read_tensors(checkpoint).items()
        if not name.startswith("lm_head.")
    }
    assert "encoder.pos_conv_embed.conv.weight_g" in tensors
    write_tensors(checkpoint, tensors)
    assert_same_weights(
        converter.load_backbone(checkpoint),
        converter.load_backbone(REFERENCE / "layer"),
    )


@pytest.mark.one_backend
def test_several_files(checkpoint):
    names = ["model-00001-of-00002.safetensors", "model-00002.safetensors"]
    tensors = read_tensors(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        write_tensors(checkpoint, part, name)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(
        converter.load_ctc(checkpoint), converter.load_ctc(REFERENCE / "layer")
    )
    (checkpoint / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=names[1]):
        converter.load_ctc(checkpoint)


@pytest.mark.one_backend
def test_checkpoint_of_pre_training_takes_a_new_head(checkpoint):
    tensors = {
        name: array
        for name, array in read_tensors(checkpoint).items()
        if not name.startswith("lm_head.")
    }
    for name in ("quantizer.codevectors", "project_q.bias", "project_hid.bias"):
        tensors[name] = np.zeros(3, "float32")
    write_tensors(checkpoint, tensors)
    with pytest.raises(ValueError, match="no head. Pass `vocabulary_size`"):
        converter.load_ctc(checkpoint)
    task = converter.load_ctc(checkpoint, vocabulary_size=5)
    assert task.output.shape[-1] == 5
    assert_same_weights(
        task.backbone, converter.load_backbone(REFERENCE / "layer")
    )


@pytest.mark.one_backend
def test_new_head_in_the_place_of_the_old():
    task = converter.load_ctc(REFERENCE / "layer", vocabulary_size=12)
    old = read_tensors(REFERENCE / "layer")["lm_head.weight"].T
    assert not np.allclose(to_numpy(task.output_dense.kernel), old)


@pytest.mark.one_backend
def test_blank_must_be_the_first_class(checkpoint):
    change_config(checkpoint, pad_token_id=11)
    with pytest.raises(ValueError, match="`pad_token_id` 11. It must be 0"):
        converter.load_ctc(checkpoint)
    converter.load_ctc(checkpoint, vocabulary_size=12)


@pytest.mark.one_backend
def test_settings_come_from_the_config_and_the_options(checkpoint):
    change_config(checkpoint, mask_time_prob=0.3, hidden_dropout=0.2)
    backbone = converter.load_backbone(checkpoint, attention_dropout=0.4)
    assert backbone.mask_prob == 0.3
    assert backbone.dropout == 0.2
    assert backbone.attention_dropout == 0.4
    assert backbone.use_padding_mask
    assert not converter.load_backbone(REFERENCE / "group").use_padding_mask
    change_config(checkpoint, apply_spec_augment=False)
    assert converter.load_backbone(checkpoint).time_masking is None


@pytest.mark.one_backend
def test_checkpoint_with_an_unknown_tensor(checkpoint):
    name = "encoder.layers.0.adapter_layer.norm.weight"
    tensors = {**read_tensors(checkpoint), f"wav2vec2.{name}": np.zeros(3)}
    write_tensors(checkpoint, tensors)
    with pytest.raises(ValueError, match=rf"no place for: \['{name}'\]"):
        converter.load_backbone(checkpoint)


@pytest.mark.one_backend
def test_checkpoint_without_a_tensor(checkpoint):
    tensors = read_tensors(checkpoint)
    del tensors["wav2vec2.encoder.layer_norm.bias"]
    write_tensors(checkpoint, tensors)
    with pytest.raises(ValueError, match="lacks.*'encoder.layer_norm.bias'"):
        converter.load_backbone(checkpoint)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name, shape, needed",
    [
        ("encoder.layers.1.attention.q_proj.weight", (32, 31), "(32, 32)"),
        (
            "feature_extractor.conv_layers.0.conv.weight",
            (16, 10),
            "(16, 1, 10)",
        ),
        (
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            (1, 1, 15),
            "(1, 1, 16)",
        ),
    ],
)
def test_checkpoint_with_a_wrong_shape(checkpoint, name, shape, needed):
    tensors = read_tensors(checkpoint)
    tensors[f"wav2vec2.{name}"] = np.zeros(shape, "float32")
    write_tensors(checkpoint, tensors)
    with pytest.raises(ValueError) as error:
        converter.load_backbone(checkpoint)
    assert f"'{name}' has shape {shape}" in str(error.value)
    assert f"it must have {needed}" in str(error.value)


@pytest.mark.one_backend
@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_checkpoint_without_a_file(checkpoint, missing):
    (checkpoint / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        converter.load_ctc(checkpoint)


@pytest.mark.one_backend
def test_checkpoint_of_pytorch_alone(checkpoint):
    file = checkpoint / "model.safetensors"
    file.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="`pytorch_model.bin` alone"):
        converter.load_ctc(checkpoint)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name, value",
    [("model_type", "hubert"), ("hidden_act", "relu"), ("add_adapter", True)],
)
def test_checkpoint_of_another_model(checkpoint, name, value):
    change_config(checkpoint, **{name: value})
    with pytest.raises(ValueError, match=f"has {name}={value!r}"):
        converter.load_ctc(checkpoint)


@pytest.mark.one_backend
def test_config_that_lacks_what_is_needed(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ValueError, match="lacks .*'num_hidden_layers'"):
        converter.load_ctc(checkpoint)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "handle, revision",
    [("hf://owner/name", None), ("hf://owner/name@refs/pr/2", "refs/pr/2")],
)
def test_handles_are_downloaded(handle, revision, monkeypatch):
    """What is asked for, because no test goes to the network."""
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(REFERENCE / "layer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_weights(
        converter.load_backbone(handle),
        converter.load_backbone(REFERENCE / "layer"),
    )
    assert asked == [("owner/name", revision)]
