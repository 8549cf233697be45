"""Adapters of the authors' PyTorch code, read and written."""

import importlib
import itertools
import json
import pathlib
import shutil
import time
import warnings

import keras_hub
import numpy as np
import pytest
import safetensors.torch
import small_models
import torch
from helpers import LONG_ON_ONE_BACKEND
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_fvae
from keras_fvae.integrations.hugging_face import architecture_of
from keras_fvae.integrations.hugging_face import modules_of
from keras_fvae.model.lookup import adapted_layers
from keras_fvae.model.tree import LayerTree

REFERENCE = pathlib.Path(__file__).parent / "reference"
ADAPTER = REFERENCE / "vit_adapter"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def read(directory):
    settings = json.loads((directory / CONFIG).read_text())
    return settings, load_file(directory / WEIGHTS)


def load_vit():
    return keras_hub.models.ViTImageClassifier.from_preset(
        str(REFERENCE / "vit"), num_classes=5
    )


@pytest.fixture
def vit():
    return load_vit()


@pytest.fixture
def adapter(tmp_path):
    """A copy of the authors' adapter, to be damaged."""
    return pathlib.Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))


@pytest.mark.one_backend
def test_an_adapter_of_the_authors_code(vit):
    expected = np.load(REFERENCE / "vit" / "expected.npz")
    images = expected["pixel_values"].transpose(0, 2, 3, 1)
    summary = keras_fvae.load_peft_adapter(vit, ADAPTER)
    assert len(summary.layer_paths) == 6
    logits = to_numpy(vit(images))
    np.testing.assert_allclose(logits, expected["logits_adapted"], atol=2e-3)
    # The head came along: it is not of the base model.
    assert np.abs(logits - expected["logits_base"]).max() > 1


def test_settings_of_the_authors_code(vit):
    keras_fvae.load_peft_adapter(vit, ADAPTER)
    config = vit.backbone.layers[-1].encoder_layers[0].mha.query_dense.config
    assert config == keras_fvae.FVAELoRAConfig(
        rank=8,
        alpha=8 * 8 / (8 + 1e-5),
        encoder_units=(8,),
        decoder_units=(16, 16, 16),
        dropout=0.0,
        gamma_weight=(0.25, 0.25),
        gamma_estimator="monte_carlo",
        elbo_weight=1e-3,
    )


def test_load_save_load_is_exact(vit, tmp_path):
    keras_fvae.load_peft_adapter(vit, ADAPTER)
    keras_fvae.save_peft_adapter(vit, tmp_path)
    settings, tensors = read(tmp_path)
    their_settings, their_tensors = read(ADAPTER)
    assert tensors.keys() == their_tensors.keys()
    for name, array in their_tensors.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    for name in settings.keys() & their_settings.keys():
        assert settings[name] == their_settings[name], name
    # What is left out are fields of PEFT that have nothing to say here.
    assert their_settings.keys() - settings.keys() <= {
        "auto_mapping",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "revision",
    }


class Recorder:
    """Notes by which names KerasHub's own converters know the weights."""

    def __init__(self):
        self.names = {}

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        self.names[id(keras_variable)] = hf_weight_key

    def get_tensor(self, name):
        return np.zeros((1, 1))  # Added to embeddings, by some.


SMALL = {"vocabulary_size": 20, "num_layers": 3, "intermediate_dim": 8}
ENCODER = {
    **SMALL,
    "num_heads": 2,
    "hidden_dim": 8,
    "max_sequence_length": 8,
}
DECODER = {
    **SMALL,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
}
VIT = {
    "image_shape": (16, 16, 3),
    "patch_size": 8,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 16,
}
ARCHITECTURES = [
    ("BertBackbone", ENCODER, "bert"),
    ("RobertaBackbone", ENCODER, "roberta"),
    ("XLMRobertaBackbone", ENCODER, "xlm_roberta"),
    ("DistilBertBackbone", ENCODER, "distilbert"),
    ("ViTBackbone", VIT, "vit"),
    ("Llama3Backbone", DECODER, "llama3"),
    ("MistralBackbone", DECODER, "mistral"),
    ("QwenBackbone", DECODER, "qwen"),
    ("Qwen3Backbone", {**DECODER, "head_dim": 4}, "qwen3"),
    ("GemmaBackbone", {**DECODER, "head_dim": 4}, "gemma"),
]


@pytest.mark.shared_out
@pytest.mark.parametrize("name, options, converter", ARCHITECTURES)
def test_names_are_those_of_the_converters(name, options, converter):
    backbone = getattr(keras_hub.models, name)(**options)
    module = importlib.import_module(
        f"keras_hub.src.utils.transformers.convert_{converter}"
    )
    recorder = Recorder()
    config = {"tie_word_embeddings": True, "model_type": converter}
    module.convert_weights(backbone, recorder, config)
    tree = LayerTree(backbone)
    modules = modules_of(tree, architecture_of(backbone))
    pooler = name == "BertBackbone"
    num_layers = 7 if "num_query_heads" in options else 6
    assert len(modules) == 3 * num_layers + pooler
    for module_name, (layer,) in modules.items():
        their_name = recorder.names[id(layer.kernel)].removesuffix(".weight")
        assert their_name.endswith(module_name)


@pytest.mark.shared_out
@pytest.mark.parametrize("name, options, converter", ARCHITECTURES)
def test_round_trip_of_a_backbone(name, options, converter, tmp_path, rng):
    make = getattr(keras_hub.models, name)
    backbone = make(**options)
    backbone.enable_fvae_lora(rank=2, decoder_units=(4,))
    move_adapters(backbone, rng)
    keras_fvae.save_peft_adapter(backbone, tmp_path)
    other = make(**options)
    keras_fvae.load_peft_adapter(other, tmp_path)
    for ours, theirs in zip(
        backbone.trainable_weights, other.trainable_weights
    ):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), atol=1e-7)
    settings, _ = read(tmp_path)
    expected = (
        ["query", "value"] if "num_heads" in options else ["q_proj", "v_proj"]
    )
    if converter == "distilbert":
        expected = ["q_lin", "v_lin"]
    assert settings["target_modules"] == expected


def test_heads_of_text_classifiers(tmp_path):
    model = small_models.make_text_classifier()
    model.backbone.enable_fvae_lora(rank=2, decoder_units=(4,))
    keras_fvae.save_peft_adapter(model, tmp_path)
    settings, tensors = read(tmp_path)
    assert settings["modules_to_save"] == ["classifier"]
    assert tensors["base_model.model.classifier.weight"].shape == (3, 8)
    prefix = "base_model.model.bert.encoder.layer.1.attention.self.query"
    assert tensors[f"{prefix}.lora_B"].shape == (8, 2)
    backbone = keras_hub.models.RobertaBackbone(**ENCODER)
    model = keras_hub.models.RobertaTextClassifier(
        backbone, num_classes=3, preprocessor=None
    )
    model.backbone.enable_fvae_lora(rank=2, decoder_units=(4,))
    keras_fvae.save_peft_adapter(model, tmp_path)
    _, tensors = read(tmp_path)
    assert tensors["base_model.model.classifier.dense.weight"].shape == (8, 8)
    assert tensors["base_model.model.classifier.out_proj.bias"].shape == (3,)


def test_some_layers_are_named_one_by_one(tmp_path):
    model = small_models.make_text_classifier()
    model.backbone.enable_fvae_lora(
        2,
        lambda layer: (
            layer.path == "transformer_layer_1/self_attention_layer/query"
        ),
    )
    keras_fvae.save_peft_adapter(model, tmp_path)
    settings, _ = read(tmp_path)
    name = "encoder.layer.1.attention.self.query"
    assert settings["target_modules"] == [name]
    other = small_models.make_text_classifier()
    assert len(keras_fvae.load_peft_adapter(other, tmp_path).layer_paths) == 1


def set_tensor(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def set_setting(directory, **changes):
    settings = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**settings, **changes}))


def set_numbers(directory, name, number):
    set_tensor(directory, lambda t: t.update({name: t[name] * 0 + number}))


def set_dtype(directory, name, dtype):
    set_tensor(directory, lambda t: t.update({name: t[name].astype(dtype)}))


LORA_B = "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_B"
SCALE = LORA_B.replace(
    "lora_B", "lora_A.views_conditionalGaussianDecoders.scale_tril"
)
DAMAGES = [
    (lambda d: (d / CONFIG).unlink(), CONFIG),
    (lambda d: (d / WEIGHTS).unlink(), WEIGHTS),
    (lambda d: (d / CONFIG).write_text("{"), "damaged"),
    (lambda d: (d / CONFIG).write_text("[]"), "no JSON object"),
    (
        lambda d: (d / WEIGHTS).write_bytes(
            (d / WEIGHTS).read_bytes()[: (d / WEIGHTS).stat().st_size // 2]
        ),
        "damaged",
    ),
    (lambda d: set_setting(d, peft_type="LOHA"), "peft_type='LOHA'"),
    (lambda d: set_setting(d, peft_type="LORA"), "should have .*'lora_A'"),
    (lambda d: set_setting(d, force_test_vae=True), "force_test_vae=True"),
    (lambda d: set_setting(d, latent_dim=4), "lora_B' must have shape"),
    (lambda d: set_setting(d, latent_dim=None), "not one of FVAE-LoRA"),
    (lambda d: set_setting(d, dec_num_of_layer=2), "Unknown weight"),
    (lambda d: set_setting(d, lambda_kl_z1=0.1), "kl_weight"),
    (lambda d: set_tensor(d, lambda t: t.pop(LORA_B)), "lora_B' must have"),
    (lambda d: set_tensor(d, lambda t: t.pop(SCALE)), "Missing weight"),
    (
        lambda d: set_tensor(
            d,
            lambda t: t.update(
                {LORA_B.replace("layer.0", "layer.7"): t[LORA_B]}
            ),
        ),
        "layer.7",
    ),
    (
        lambda d: set_tensor(
            d,
            lambda t: t.update(
                {"base_model.model.classifier.bias": np.zeros(7, "float32")}
            ),
        ),
        r"shape \(7,\)",
    ),
    (
        lambda d: set_tensor(
            d,
            lambda t: t.update({"base_model.model.x": np.zeros(1, "float32")}),
        ),
        "has 'x'",
    ),
    # One layer under two names.
    (
        lambda d: set_tensor(
            d,
            lambda t: t.update(
                {
                    name.replace("model.vit.", "model.x.vit."): array
                    for name, array in t.items()
                }
            ),
        ),
        "has two adapters for one layer",
    ),
    (lambda d: set_numbers(d, LORA_B, np.nan), "'.*lora_B'.*not finite"),
    (lambda d: set_numbers(d, SCALE, np.inf), "'.*scale_tril'.*not finite"),
    (lambda d: set_dtype(d, SCALE, "int32"), "'.*scale_tril'.*of dtype I32"),
    (lambda d: set_dtype(d, LORA_B, "bool"), "'.*lora_B'.*of dtype BOOL"),
    # Numbers that would take all memory.
    (lambda d: (d / CONFIG).write_text("[" * 100_000), "damaged"),
    (lambda d: (d / CONFIG).write_text('{"r": 1, "r": 2}'), "damaged.*twice"),
    (
        lambda d: set_setting(d, dec_num_of_layer=10**8),
        "dec_num_of_layer=10000",
    ),
    (lambda d: set_setting(d, enc_num_of_layer=1e300), "enc_num_of_layer=1e"),
    (lambda d: set_setting(d, latent_dim=10**9), "latent_dim=1000000000"),
    (lambda d: set_setting(d, dec_hidden_layer=10**8), "dec_hidden_layer=1000"),
    (lambda d: set_setting(d, latent_dim=-1), "`rank` must be|not one of"),
    (lambda d: set_setting(d, lora_alpha=10**400), "not one of FVAE-LoRA"),
    (lambda d: set_setting(d, z2_latent_std=1e308), "not one of FVAE-LoRA"),
    (lambda d: set_setting(d, lambda_downstream=0), "not one of FVAE-LoRA"),
    (lambda d: set_setting(d, latent_dim="4"), "not one of|must be"),
    (lambda d: set_setting(d, enc_num_of_layer=[1]), "not one of|must be"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_refusals_change_nothing(damage, message, adapter, vit):
    before = snapshot(vit)
    damage(adapter)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        keras_fvae.load_peft_adapter(vit, adapter)
    assert snapshot(vit) == before


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "number", [60, pytest.param(500, marks=LONG_ON_ONE_BACKEND)]
)
def test_no_settings_end_in_another_error(number, adapter, vit, rng):
    """Whatever they say, and however much it would take."""
    settings = json.loads((adapter / CONFIG).read_text())
    hostile = [None, True, -1, 0, 10**9, 10**400, 1e308, "", "a", [], [1], {}]
    pairs = [*itertools.product(settings, hostile)]
    rng.shuffle(pairs)
    before = snapshot(vit)
    for name, value in pairs[:number]:
        set_setting(adapter, **{**settings, name: value})
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                keras_fvae.load_peft_adapter(vit, adapter)
            except ValueError:
                assert snapshot(vit) == before
            else:
                vit = load_vit()
                before = snapshot(vit)
        assert time.process_time() - begin < 10


def test_adapters_in_half_precision(adapter):
    tensors = load_file(adapter / WEIGHTS)
    for dtype in (torch.bfloat16, torch.float16):
        halves = {n: torch.tensor(a).to(dtype) for n, a in tensors.items()}
        safetensors.torch.save_file(halves, adapter / WEIGHTS)
        vit = load_vit()
        keras_fvae.load_peft_adapter(vit, adapter)
        np.testing.assert_allclose(
            to_numpy(adapted_layers(vit)[0].adapter.kernel_b).T,
            halves[LORA_B].float(),
            rtol=1e-6,
        )


def test_a_head_needs_its_task(vit):
    with pytest.raises(ValueError, match="head"):
        keras_fvae.load_peft_adapter(vit.backbone, ADAPTER)


def test_settings_of_training_alone_are_told(vit, adapter):
    set_setting(adapter, lora_dropout=0.1, dec_dropout=0.2)
    with pytest.warns(UserWarning, match="lora_dropout.*dec_dropout"):
        keras_fvae.load_peft_adapter(vit, adapter)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoder_units": (8, 4)}, "one width"),
        ({"objective": "vae2lat"}, "objective"),
        ({"elbo_weight": 0.0}, "elbo_weight=0"),
    ],
)
def test_what_cannot_be_written(options, message, tmp_path):
    model = small_models.make_text_classifier()
    model.backbone.enable_fvae_lora(rank=2, **options)
    with pytest.raises(ValueError, match=message):
        keras_fvae.save_peft_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_models_without_an_adapter_or_a_known_architecture(
    attention_model, bert, tmp_path
):
    with pytest.raises(ValueError, match=r"`Functional`. Known are"):
        keras_fvae.load_peft_adapter(attention_model, ADAPTER)
    with pytest.raises(ValueError, match="no adapted layer"):
        keras_fvae.save_peft_adapter(bert, tmp_path)
    bert.backbone.enable_fvae_lora(rank=2)
    with pytest.raises(ValueError, match="adapted by FVAE-LoRA already"):
        keras_fvae.load_peft_adapter(bert, ADAPTER)
    keras_fvae.finalize_adapter(bert)
    with pytest.raises(ValueError, match="finalized"):
        keras_fvae.save_peft_adapter(bert, tmp_path)
