"""Adapters of Hugging Face's PEFT, read and written."""

import itertools
import json
import pathlib
import shutil
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from helpers import LONG_ON_ONE_BACKEND
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_fvae
from keras_fvae.integrations.hugging_face import ARCHITECTURES
from keras_fvae.integrations.hugging_face import architecture_of
from keras_fvae.integrations.hugging_face import modules_of
from keras_fvae.model.lookup import adapted_layers
from keras_fvae.model.tree import LayerTree

REFERENCE = pathlib.Path(__file__).parent / "reference"
PEFT = REFERENCE / "peft"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VIT_ADAPTERS = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "hira": "HiRA",
    "adalora": "LoRA",
    "lora_patterns": "LoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "pissa_converted": "LoRA",
    "olora_converted": "LoRA",
    "lora_transformers5": "LoRA",
}


def load_vit():
    vit = keras_hub.models.ViTImageClassifier.from_preset(
        str(REFERENCE / "vit"), num_classes=5
    )
    # As Hugging Face's. KerasHub's own makes a difference of 2e-3 in logits.
    for layer in vit._flatten_layers():
        if isinstance(layer, keras.layers.LayerNormalization):
            layer.epsilon = 1e-12
    return vit


def load_llama():
    return keras_hub.models.Llama3CausalLM.from_preset(
        str(PEFT / "llama"), preprocessor=None
    )


def pictures():
    with np.load(REFERENCE / "vit" / "expected.npz") as expected:
        return expected["pixel_values"].transpose(0, 2, 3, 1)


def read(directory):
    settings = json.loads((directory / CONFIG).read_text())
    return settings, load_file(directory / WEIGHTS)


def predict(model, x):
    return to_numpy(model(x, training=False))


def edit(directory, **changes):
    settings = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**settings, **changes}))


@pytest.mark.shared_out
@pytest.mark.parametrize("name", VIT_ADAPTERS)
def test_adapters_of_vit(name):
    vit = load_vit()
    summary = keras_fvae.load_peft_adapter(vit, PEFT / name)
    methods = {layer.config.method_name for layer in summary.layers}
    assert methods == {VIT_ADAPTERS[name]}
    # Of AdaLoRA's, three have no rank left.
    assert len(summary.layers) == (3 if name == "adalora" else 6)
    with np.load(PEFT / name / "expected.npz") as expected:
        np.testing.assert_allclose(
            predict(vit, pictures()), expected["logits_adapted"], atol=2e-5
        )


def test_ranks_and_alphas_by_pattern():
    vit = load_vit()
    summary = keras_fvae.load_peft_adapter(vit, PEFT / "lora_patterns")
    ranks = [layer.config.rank for layer in summary.layers]
    alphas = [layer.config.alpha for layer in summary.layers]
    assert sorted(ranks) == [2, 4, 4, 4, 4, 4]
    assert sorted(alphas) == [6, 6, 6, 6, 6, 12]


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "name, num_layers",
    [
        ("llama_lora_all_linear", 14),
        ("llama_dora", 10),
        ("llama_lora_layers", 2),
    ],
)
def test_adapters_of_llama(name, num_layers):
    llama = load_llama()
    summary = keras_fvae.load_peft_adapter(llama, PEFT / name)
    assert len(summary.layers) == num_layers
    with np.load(PEFT / "llama" / "expected.npz") as base:
        tokens = base["token_ids"]
    with np.load(PEFT / name / "expected.npz") as expected:
        expected = dict(expected)
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    np.testing.assert_allclose(
        predict(llama, x), expected["logits_adapted"], atol=1e-4
    )
    np.testing.assert_allclose(
        predict(llama.backbone, x), expected["hidden_adapted"], atol=1e-4
    )
    greedy = expected["greedy_tokens"].reshape(1, -1)
    llama.compile(sampler="greedy")
    prompt = np.zeros_like(greedy)
    prompt[:, :4] = greedy[:, :4]
    generated = llama.generate(
        {
            "token_ids": prompt,
            "padding_mask": (np.arange(greedy.shape[1]) < 4)[None],
        },
        stop_token_ids=None,
    )
    np.testing.assert_array_equal(to_numpy(generated["token_ids"]), greedy)


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "name", ["lora", "rslora", "dora", "hira", "lora_patterns"]
)
def test_load_save_load_is_exact(name, tmp_path):
    vit = load_vit()
    keras_fvae.load_peft_adapter(vit, PEFT / name)
    keras_fvae.save_peft_adapter(vit, tmp_path)
    settings, tensors = read(tmp_path)
    their_settings, their_tensors = read(PEFT / name)
    assert tensors.keys() == their_tensors.keys()
    for key, array in their_tensors.items():
        np.testing.assert_array_equal(tensors[key], array, err_msg=key)
    for key in ("r", "lora_alpha", "use_dora", "use_rslora", "peft_type"):
        assert settings.get(key) == their_settings.get(key)
    assert {*settings["target_modules"]} == {*their_settings["target_modules"]}
    again = load_vit()
    keras_fvae.load_peft_adapter(again, tmp_path)
    np.testing.assert_array_equal(
        predict(again, pictures()), predict(vit, pictures())
    )


CONFIGS = {
    "lora": keras_fvae.LoRAConfig(2, alpha=3),
    "rslora": keras_fvae.RSLoRAConfig(2, alpha=3),
    "ffa_lora": keras_fvae.FFALoRAConfig(2),
    "drop_lora": keras_fvae.DropLoRAConfig(2),
    "beam_lora": keras_fvae.BeamLoRAConfig(2, alpha=3),
    "ada_lora": keras_fvae.AdaLoRAConfig(2, alpha=3),
    "flat_lora": keras_fvae.FlatLoRAConfig(2),
    "op_lora": keras_fvae.OPLoRAConfig(2),
    "pissa": keras_fvae.PiSSAConfig(2, alpha=3),
    "sr_lora": keras_fvae.SRLoRAConfig(2, alpha=3, num_fused=1),
    "olora": keras_fvae.OLoRAConfig(2),
    "dora": keras_fvae.DoRAConfig(2, alpha=3),
    "hira": keras_fvae.HiRAConfig(2),
}


@pytest.mark.shared_out
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_written_predicts_the_same(method, finalized, tmp_path, rng):
    vit = load_vit()
    vit.backbone.enable_adapter(CONFIGS[method], "all-linear")
    move_adapters(vit, rng, scale=0.1)
    if finalized:
        keras_fvae.finalize_adapter(vit.backbone)
    keras_fvae.save_peft_adapter(vit, tmp_path)
    other = load_vit()
    keras_fvae.load_peft_adapter(other, tmp_path)
    expected = predict(vit, pictures())
    np.testing.assert_allclose(
        predict(other, pictures()), expected, atol=2e-5 * np.abs(expected).max()
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("finalized", [False, True])
def test_linear_fvae_lora_as_lora(finalized, tmp_path, rng):
    vit = load_vit()
    vit.backbone.enable_fvae_lora(rank=2, encoder_units=(), alpha=3)
    move_adapters(vit, rng, scale=0.1)
    if finalized:
        keras_fvae.finalize_adapter(vit.backbone)
    expected = predict(vit, pictures())
    keras_fvae.save_peft_adapter(vit, tmp_path, as_lora=True)
    settings, tensors = read(tmp_path)
    assert settings["lora_bias"] is True
    # What serves it: a base model, A and B, and a bias.
    other = load_vit()
    for ours, theirs in zip(vit.layers[-1].weights, other.layers[-1].weights):
        theirs.assign(ours)
    modules = modules_of(
        LayerTree(other.backbone), architecture_of(other.backbone)
    )
    for module, (layer,) in modules.items():
        prefix = f"base_model.model.vit.{module}.lora"
        if f"{prefix}_A.weight" not in tensors:
            continue
        scale = settings["lora_alpha"] / settings["r"]
        a, b = (tensors[f"{prefix}_{name}.weight"] for name in "AB")
        kernel = to_numpy(layer.kernel)
        update = scale * (b @ a).T
        layer.kernel.assign(kernel + update.reshape(kernel.shape))
        bias = tensors[f"{prefix}_B.bias"]
        layer.bias.assign(
            to_numpy(layer.bias) + scale * bias.reshape(layer.bias.shape)
        )
    np.testing.assert_allclose(
        predict(other, pictures()), expected, atol=2e-5 * np.abs(expected).max()
    )


@pytest.mark.one_backend
def test_other_fvae_lora_is_no_lora(tmp_path):
    vit = load_vit()
    vit.backbone.enable_fvae_lora(rank=2)
    with pytest.raises(
        ValueError, match="have hidden layers.*encoder_units=()"
    ):
        keras_fvae.save_peft_adapter(vit, tmp_path / "new", as_lora=True)
    assert not (tmp_path / "new").exists()


def test_ranks_by_pattern_are_written(tmp_path, rng):
    vit = load_vit()
    vit.backbone.enable_adapter(
        keras_fvae.LoRAConfig(4, alpha=8),
        {"query": 4, "value": {"rank": 2, "alpha": 8}, "key": 4},
    )
    move_adapters(vit, rng, scale=0.1)
    keras_fvae.save_peft_adapter(vit, tmp_path)
    settings, _ = read(tmp_path)
    assert settings["r"] == 4 and {*settings["rank_pattern"].values()} == {2}
    other = load_vit()
    keras_fvae.load_peft_adapter(other, tmp_path)
    np.testing.assert_allclose(
        predict(other, pictures()), predict(vit, pictures()), atol=1e-4
    )


BACKBONE_NAMES = [name for name in ARCHITECTURES if name in BACKBONES]


def test_architectures_are_all_tested():
    abstract = {"LlamaBackbone", "XLMRobertaBackbone"}
    assert {*ARCHITECTURES} - {*BACKBONE_NAMES} <= abstract


@pytest.mark.one_backend
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_round_trip_of_each_architecture(name, method, tmp_path, rng):
    backbone, other = BACKBONES[name](), BACKBONES[name]()
    other.set_weights(backbone.get_weights())
    architecture = architecture_of(backbone)
    modules = modules_of(LayerTree(backbone), architecture)
    named_ids = {id(la) for layers in modules.values() for la in layers}
    backbone.enable_adapter(CONFIGS[method], lambda la: id(la) in named_ids)
    move_adapters(backbone, rng)
    keras_fvae.save_peft_adapter(backbone, tmp_path)
    settings, tensors = read(tmp_path)
    assert len(modules) == sum("lora_A" in name for name in tensors)
    assert settings.get("fan_in_fan_out", False) == architecture.is_transposed
    keras_fvae.load_peft_adapter(other, tmp_path)
    for ours, theirs in zip(
        adapted_layers(backbone), adapted_layers(other), strict=True
    ):
        arrays, others = ours.adapter.get_arrays(), theirs.adapter.get_arrays()
        scale, their_scale = ours.config.scale, theirs.config.scale
        np.testing.assert_allclose(
            their_scale * others["kernel_a"] @ others["kernel_b"],
            scale * arrays["kernel_a"] @ arrays["kernel_b"],
            atol=1e-5,
        )
        if method == "dora":
            np.testing.assert_allclose(others["magnitude"], arrays["magnitude"])


@pytest.mark.one_backend
def test_a_part_of_a_fused_module(tmp_path, rng):
    """GPT-2 has one module for query, key and value."""
    backbone, other = BACKBONES["GPT2Backbone"](), BACKBONES["GPT2Backbone"]()
    other.set_weights(backbone.get_weights())
    backbone.enable_adapter(CONFIGS["dora"], ["query", "value"])
    move_adapters(backbone, rng)
    keras_fvae.save_peft_adapter(backbone, tmp_path)
    settings, _ = read(tmp_path)
    assert settings["target_modules"] == ["c_attn"]
    keras_fvae.load_peft_adapter(other, tmp_path)
    x = {
        "token_ids": rng.integers(1, 20, (2, 6)),
        "padding_mask": np.ones((2, 6), "int32"),
    }
    np.testing.assert_allclose(
        predict(other, x), predict(backbone, x), atol=1e-4
    )


@pytest.fixture
def adapter(tmp_path):
    """A copy of an adapter, to be damaged."""
    return pathlib.Path(shutil.copytree(PEFT / "lora", tmp_path / "adapter"))


def change(directory, function):
    tensors = load_file(directory / WEIGHTS)
    function(tensors)
    save_file(tensors, directory / WEIGHTS)


def first(tensors, part):
    return next(name for name in tensors if part in name)


REFUSALS = [
    (lambda d: edit(d, peft_type="LOHA"), "peft_type='LOHA'.*'LORA'"),
    (lambda d: edit(d, bias="all"), "bias='all'"),
    (lambda d: edit(d, lora_bias=True), "lora_bias=True"),
    (lambda d: edit(d, init_lora_weights="corda"), "was changed.*conversion"),
    (
        lambda d: edit(d, init_lora_weights="pissa_niter_4"),
        "cannot be repeated",
    ),
    (lambda d: edit(d, use_dora=True), r"should have.*lora_magnitude_vector"),
    (lambda d: edit(d, lora_alpha=-1), "lora_alpha=-1"),
    (lambda d: edit(d, lora_alpha=None), "lora_alpha=None"),
    (lambda d: edit(d, peft_type=["LORA"]), r"peft_type=\['LORA'\]"),
    (lambda d: edit(d, init_lora_weights=["x"]), "init_lora_weights"),
    (lambda d: edit(d, alpha_pattern={"(": 3}), "no regular expression"),
    *(
        (
            lambda d, pattern=pattern: edit(d, alpha_pattern={pattern: 3}),
            "may take for ever.*several patterns",
        )
        for pattern in (
            "(e+)+!",
            r"(\w*|\.){1,99}!",
            "(.|.)" * 40 + "!",
            "e?" * 40 + "!",
            ".*" * 9 + "!",
            f"({'.|' * 200}.)!",
        )
    ),
    (lambda d: edit(d, alpha_pattern=["a"]), "must be an object"),
    (lambda d: edit(d, alpha_pattern={"value": "3"}), "no positive number"),
    (lambda d: edit(d, use_rslora="no"), "must be true or false"),
    (lambda d: edit(d, peft_type="ADALORA"), "init_r=None"),
    (
        lambda d: change(
            d, lambda t: t.pop("base_model.model.classifier.bias")
        ),
        r"lacks \['classifier.bias'\]",
    ),
    (
        lambda d: change(
            d,
            lambda t: [t.pop(n) for n in [*t] if "classifier" in n],
        ),
        r"lacks \['classifier'\]",
    ),
    (lambda d: edit(d, trainable_token_indices=[1]), "trainable_token_indices"),
    (
        lambda d: change(d, lambda t: t.pop(first(t, "lora_A"))),
        r"should have \['lora_A', 'lora_B'\]",
    ),
    (
        lambda d: change(
            d, lambda t: t.update({first(t, "lora_A"): np.ones((4, 31), "f4")})
        ),
        r"A of shape \(rank, 32\).*\(4, 31\)",
    ),
    (
        lambda d: change(
            d,
            lambda t: t.update(
                {"base_model.model.vit.pooler.lora_A.weight": np.ones((4, 32))}
            ),
        ),
        "'vit.pooler', which the model does not have",
    ),
    (
        lambda d: change(
            d, lambda t: t.update({"base_model.model.score.weight": np.ones(3)})
        ),
        "'score.weight', for which the model has no place",
    ),
]


@pytest.mark.one_backend
@pytest.mark.parametrize("damage, message", REFUSALS)
def test_refusals_change_nothing(damage, message, adapter):
    vit = load_vit()
    before = snapshot(vit)
    damage(adapter)
    with pytest.raises(ValueError, match=message):
        keras_fvae.load_peft_adapter(vit, adapter)
    assert snapshot(vit) == before


@pytest.mark.one_backend
def test_several_methods_are_no_adapter_of_peft(tmp_path):
    vit = load_vit()
    vit.backbone.enable_adapter(
        CONFIGS["lora"], {"query": 2, "value": CONFIGS["dora"]}
    )
    with pytest.raises(ValueError, match=r"\['dora', 'lora'\]"):
        keras_fvae.save_peft_adapter(vit, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.one_backend
def test_a_dropout_that_a_method_has_not_is_told(tmp_path):
    directory = pathlib.Path(shutil.copytree(PEFT / "dora", tmp_path / "it"))
    edit(directory, lora_dropout=0.2)
    with pytest.warns(UserWarning, match="lora_dropout=0.2.*training alone"):
        keras_fvae.load_peft_adapter(load_vit(), directory)
    directory = pathlib.Path(shutil.copytree(PEFT / "lora", tmp_path / "lora"))
    edit(directory, lora_dropout=0.2)
    summary = keras_fvae.load_peft_adapter(load_vit(), directory)
    assert {layer.config.dropout for layer in summary.layers} == {0.2}


def test_what_is_loaded_trains_on():
    vit = load_vit()
    keras_fvae.load_peft_adapter(vit, PEFT / "lora")
    x, before = pictures(), predict(vit, pictures())
    vit.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    vit.fit(x, np.arange(len(x)) % 5, verbose=0)
    assert np.abs(predict(vit, x) - before).max() > 1e-3


@pytest.mark.one_backend
def test_layers_of_another_tower_are_no_layers_of_this(tmp_path):
    """Pictures' in a file for a model that has none, such as Gemma 3's."""
    directory = pathlib.Path(
        shutil.copytree(PEFT / "llama_lora_layers", tmp_path / "it")
    )
    change(
        directory,
        lambda t: t.update(
            {
                n.replace(
                    "model.layers", "vision_tower.vision_model.encoder.layers"
                ): a
                for n, a in [*t.items()]
            }
        ),
    )
    with pytest.raises(ValueError, match="vision_tower.*does not have"):
        keras_fvae.load_peft_adapter(load_llama(), directory)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name, part, shape",
    [("adalora", "lora_E", (7, 1)), ("adalora", "lora_E", (1, 1)),
     ("dora", "magnitude", (31,))],
)  # fmt: skip
def test_vectors_of_another_length(name, part, shape, tmp_path):
    directory = pathlib.Path(shutil.copytree(PEFT / name, tmp_path / "it"))

    def damage(tensors):
        key = next(n for n in tensors if part in n and tensors[n].size)
        tensors[key] = np.ones(shape, "float32")

    change(directory, damage)
    vit = load_vit()
    before = snapshot(vit)
    with pytest.raises(ValueError, match=f"{part}.*must have shape"):
        keras_fvae.load_peft_adapter(vit, directory)
    assert snapshot(vit) == before


def test_what_is_trained_and_not_written_is_refused(tmp_path):
    def refuse(model, message):
        with pytest.raises(ValueError, match=message):
            keras_fvae.save_peft_adapter(model, tmp_path / "it")
        assert not (tmp_path / "it").exists()

    bert = make_bert()
    keras_fvae.enable_adapter(bert, CONFIGS["lora"], ["query", "logits"])
    refuse(bert, "has trained .*'.*logits'")
    bert = make_bert()
    keras_fvae.enable_adapter(
        bert, CONFIGS["lora"], "query",
        trainable_layer_names=["logits", "embeddings_layer_norm"],
    )  # fmt: skip
    refuse(bert, "embeddings_layer_norm/gamma")
    model = keras_hub.models.BertMaskedLM(
        BACKBONES["BertBackbone"](), preprocessor=None
    )
    model.backbone.enable_adapter(CONFIGS["lora"])
    refuse(model, "mlm_head")


def make_bert():
    return keras_hub.models.BertTextClassifier(
        BACKBONES["BertBackbone"](), num_classes=3, preprocessor=None
    )


@pytest.mark.one_backend
def test_quantized_heads(tmp_path, rng):
    bert = make_bert()
    kernel = rng.normal(size=bert.get_layer("logits").kernel.shape)
    bert.get_layer("logits").kernel.assign(kernel)
    bert.quantize("int8")
    bert.backbone.enable_adapter(CONFIGS["lora"])
    keras_fvae.save_peft_adapter(bert, tmp_path)
    _, tensors = read(tmp_path)
    np.testing.assert_allclose(
        tensors["base_model.model.classifier.weight"].T, kernel, atol=0.05
    )
    for mode in ("int8", "int4"):
        other = make_bert()
        other.quantize(mode)
        before = snapshot(other)
        with pytest.raises(ValueError, match="'logits' is quantized"):
            keras_fvae.load_peft_adapter(other, tmp_path)
        assert snapshot(other) == before


def test_a_frozen_head_that_was_loaded_is_saved():
    vit = load_vit()
    vit.get_layer("predictions").trainable = False
    keras_fvae.load_peft_adapter(vit, PEFT / "lora")
    state, expected = keras_fvae.get_adapter(vit), predict(vit, pictures())
    other = load_vit()
    keras_fvae.set_adapter(other, state)
    np.testing.assert_allclose(predict(other, pictures()), expected, atol=1e-5)


@pytest.mark.one_backend
def test_names_of_gemma_3_with_pictures():
    backbone = BACKBONES["Gemma3Backbone"]()
    assert backbone.vision_encoder is not None
    names = {
        newer: [*modules_of(
            LayerTree(backbone), architecture_of(backbone), newer
        )]
        for newer in (False, True)
    }  # fmt: skip
    for found in names.values():
        assert "language_model.layers.0.self_attn.q_proj" in found
    tower = "vision_tower{}.encoder.layers.0.self_attn.q_proj"
    assert tower.format(".vision_model") in names[False]
    assert tower.format("") in names[True]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "number", [20, pytest.param(150, marks=LONG_ON_ONE_BACKEND)]
)
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "hira"])
def test_no_settings_end_in_another_error(name, number, tmp_path, rng):
    directory = pathlib.Path(shutil.copytree(PEFT / name, tmp_path / "it"))
    settings = json.loads((directory / CONFIG).read_text())
    hostile = [
        None,
        True,
        -1,
        0,
        10**400,
        1e308,
        "",
        "a",
        [],
        [1],
        {},
        {"a": 1},
    ]
    pairs = [*itertools.product(settings, hostile)]
    rng.shuffle(pairs)
    vit = load_vit()
    before = snapshot(vit)
    for key, value in pairs[:number]:
        edit(directory, **{**settings, key: value})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                keras_fvae.load_peft_adapter(vit, directory)
            except ValueError:
                assert snapshot(vit) == before, (key, value)
            else:
                vit = load_vit()
                before = snapshot(vit)
