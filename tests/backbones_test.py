import inspect
import pathlib
import re

import keras
import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from backbones import data
from backbones import table
from helpers import BACKEND
from helpers import ROOT
from helpers import move_adapters
from helpers import to_numpy

import keras_fvae
from keras_fvae.model import lookup

DOCUMENT = pathlib.Path(ROOT, "docs/supported_backbones.md").read_text()
SMALL = {"rank": 2, "decoder_units": (4,), "dropout": 0.0}


class WithLoss(keras.Model):
    """A model to train, whatever the outputs of the one inside it are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x, training=None):
        outputs = keras.tree.flatten(self.inner(x, training=training))
        for output in outputs:
            if keras.backend.is_float_dtype(output.dtype):
                self.add_loss(keras.ops.mean(keras.ops.square(output - 1)))
        return outputs[0]


def make(name):
    keras.utils.set_random_seed(0)
    return BACKBONES[name]()


def predict(model, x):
    return [to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


def fit_a_step(model, x):
    trainer = WithLoss(model)
    trainer.compile(
        keras.optimizers.SGD(0.1),
        jit_compile=BACKEND == "jax",
        # It reads the sizes of images as Python integers.
        run_eagerly=type(model).__name__.startswith("Qwen3_5"),
    )
    [loss] = trainer.fit(x, batch_size=2, verbose=0).history["loss"]
    assert np.isfinite(loss)


def enable_what_the_error_says(model, error):
    """Adapts what FVAE-LoRA fits, or all convolutions, by another method."""
    config = keras_fvae.FVAELoRAConfig()
    layers = lookup.adaptable_layers(model)
    fitting = [la for la in layers if config.why_not(la) is None]
    names = [layer.name for layer in fitting]
    # Those that Keras made up are listed by their attributes.
    named = [name for name in names if not name.startswith("conv2d")]
    assert all(name in str(error) for name in named)
    if len(fitting) < len(layers):
        assert "FVAE-LoRA does not fit '" in str(error)
    elif table.convolutions(model):
        assert "target_layer_names='all-conv'" in str(error)
    if fitting:
        model.enable_fvae_lora(**SMALL, target_layer_names=names)
    else:
        model.enable_adapter(keras_fvae.LoRAConfig(2), "all-conv")


# What takes long to run on all of them runs where it is quickest.
LONG_TAIL = {
    "torch": sorted({*BACKBONES} - {*table.SAMPLE} - {*table.TENSORFLOW_ALONE}),
    "tensorflow": table.TENSORFLOW_ALONE,
    "jax": [],
}[BACKEND]


on_backbones = pytest.mark.parametrize(
    "name",
    [
        *table.SAMPLE,
        *[pytest.param(name, marks=pytest.mark.slow) for name in LONG_TAIL],
    ],
)


@pytest.mark.shared_out
@on_backbones
def test_backbone(name, tmp_path):
    model = make(name)
    x = data(model)
    before = predict(model, x)
    # Some draw at random in inference, too.
    repeated = [
        np.array_equal(*pair) for pair in zip(before, predict(model, x))
    ]
    try:
        model.enable_fvae_lora(**SMALL)
    except ValueError as error:
        assert table.row(name, model) in DOCUMENT
        enable_what_the_error_says(model, error)
    else:
        assert table.row(name, model) in DOCUMENT

    def assert_same(predictions, others):
        for one, other, is_repeated in zip(predictions, others, repeated):
            if is_repeated:
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

    assert any(repeated)
    assert_same(predict(model, x), before)

    weights = {id(w): to_numpy(w) for w in model.weights}
    fit_a_step(model, x)
    adapted = lookup.adapted_layers(model)
    adapter_ids = {id(w) for a in adapted for w in a.adapter.weights}
    for weight in model.weights:
        if id(weight) not in adapter_ids:
            np.testing.assert_array_equal(weight, weights[id(weight)])
    for layer in adapted:
        if (name, layer.name) in table.NOT_CALLED:
            continue
        assert any(
            not np.array_equal(to_numpy(weight), weights[id(weight)])
            for weight in layer.adapter.trainable_weights
        ), layer.path

    path = tmp_path / "adapters.safetensors"
    model.save_adapter(path)
    loaded = make(name)
    loaded.load_adapter(path)
    assert_same(predict(loaded, x), predict(model, x))


@pytest.mark.one_backend
@on_backbones
# Some put their name before those of their layers.
@pytest.mark.parametrize(
    "is_named", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_file_and_a_preset_bring_a_backbone_back(
    name, is_named, tmp_path, rng
):
    model = make(name)
    if is_named:
        config = {**model.get_config(), "name": "some_name"}
        model = type(model).from_config(config)
    try:
        model.enable_fvae_lora(**SMALL)
    except ValueError as error:
        enable_what_the_error_says(model, error)
    move_adapters(model, rng, scale=0.1)
    x = data(model)
    expected = predict(model, x)
    repeated = map(np.array_equal, expected, predict(model, x))
    repeated = [*repeated]
    model.save(tmp_path / "model.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    # So that no name that Keras makes up is what it was.
    keras.layers.Dense(1), keras.layers.MultiHeadAttention(1, 1)
    make(name)
    for loaded in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset")),
    ):
        for one, other, is_repeated in zip(
            predict(loaded, x), expected, repeated
        ):
            if is_repeated:
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert [tuple(w.shape) for w in loaded.trainable_weights] == [
            tuple(w.shape) for w in model.trainable_weights
        ]


def test_every_backbone_is_in_the_table():
    backbone_class = keras_hub.models.Backbone
    classes = {
        cls
        for _, cls in inspect.getmembers(keras_hub.models, inspect.isclass)
        if issubclass(cls, backbone_class)
    }
    # The base classes.
    classes -= {backbone_class, keras_hub.models.FeaturePyramidBackbone}
    assert {getattr(keras_hub.models, name) for name in BACKBONES} == classes
    rows = re.findall(r"^\| `(\w+)`", DOCUMENT, re.MULTILINE)
    assert sorted(rows) == sorted(BACKBONES)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="takes long to build elsewhere")
def test_what_the_table_says_of_gemma_4s_audio_encoder():
    summary = make("Gemma4Backbone").enable_fvae_lora(
        target_layer_names=re.compile("attn_[qv]_proj")
    )
    assert len(summary.layer_paths) == 4


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="takes long to build elsewhere")
def test_what_the_table_says_of_sams_mask_decoder():
    task = keras_hub.models.SAMImageSegmenter(
        make("SAMBackbone"), preprocessor=None
    )
    summary = keras_fvae.enable_fvae_lora(task)
    in_decoder = [p for p in summary.layer_paths if "mask_decoder" in p]
    assert (len(in_decoder), len(summary.layer_paths)) == (14, 16)


def test_a_dense_layer_of_a_convolutional_model_can_be_named():
    model = keras_hub.models.ResNetImageClassifier(
        make("ResNetBackbone"), num_classes=3, preprocessor=None
    )
    with pytest.raises(ValueError, match="can name are: .*'predictions"):
        keras_fvae.enable_fvae_lora(model)
    summary = keras_fvae.enable_fvae_lora(
        model, target_layer_names="predictions"
    )
    assert len(summary.layer_paths) == 1
    with pytest.raises(ValueError, match="target_layer_names='all-conv'"):
        model.backbone.enable_adapter(keras_fvae.LoRAConfig())
