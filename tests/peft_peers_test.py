"""What is written loads in PEFT itself, and predicts the same there.

In an environment of its own, with PEFT and transformers.
"""

import json
import subprocess

import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from helpers import LONG_ON_ONE_BACKEND
from helpers import ROOT
from helpers import move_adapters
from helpers import to_numpy
from peft_test import CONFIGS
from peft_test import PEFT
from peft_test import REFERENCE
from peft_test import load_llama
from peft_test import load_vit
from peft_test import pictures

import keras_fvae
from benchmarks.beside_peft import make_environment
from keras_fvae.integrations.hugging_face import architecture_of
from keras_fvae.integrations.hugging_face import modules_of
from keras_fvae.model.tree import LayerTree

pytestmark = LONG_ON_ONE_BACKEND
LINEAR = keras_fvae.FVAELoRAConfig(2, encoder_units=(), alpha=3)
# What runs there: a class of transformers, a folder of the base model or its
# config, the adapters, the inputs.
PROGRAM = """
import json, sys
import numpy as np, peft, torch, transformers

jobs = json.loads(sys.stdin.read())
for job in jobs:
    make = getattr(transformers, job["class"])
    model = make.from_pretrained(job["base"])
    model = peft.PeftModel.from_pretrained(model, job["adapter"])
    inputs = torch.tensor(np.load(job["inputs"]))
    with torch.no_grad():
        logits = model.eval()(inputs).logits
    np.save(job["adapter"] + "/logits.npy", logits.numpy())
"""


@pytest.fixture(scope="module")
def python():
    return make_environment(ROOT / ".venv-peft")


def run(python, jobs):
    """The logits of PEFT for each job."""
    subprocess.run(
        [python, "-c", PROGRAM], input=json.dumps(jobs), text=True, check=True
    )
    return [np.load(f"{job['adapter']}/logits.npy") for job in jobs]


def test_vit_with_each_method(python, tmp_path, rng):
    with np.load(REFERENCE / "vit" / "expected.npz") as expected:
        np.save(tmp_path / "x.npy", expected["pixel_values"])
    jobs, expected = [], []
    for name, config in {**CONFIGS, "linear": LINEAR}.items():
        vit = load_vit()
        vit.backbone.enable_adapter(config, "all-linear")
        move_adapters(vit, rng, scale=0.1)
        keras_fvae.save_peft_adapter(
            vit, tmp_path / name, as_lora=True, transformers_version=5
        )
        expected.append(to_numpy(vit(pictures(), training=False)))
        jobs.append(
            {
                "class": "ViTForImageClassification",
                "base": str(REFERENCE / "vit"),
                "adapter": str(tmp_path / name),
                "inputs": str(tmp_path / "x.npy"),
            }
        )
    for theirs, ours in zip(run(python, jobs), expected, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_llama_with_ranks_by_pattern(python, tmp_path, rng):
    llama = load_llama()
    llama.backbone.enable_adapter(
        keras_fvae.DoRAConfig(2, alpha=4),
        {"query": 2, "value": {"rank": 3, "alpha": 5}, "key": 2},
    )
    move_adapters(llama, rng, scale=0.1)
    keras_fvae.save_peft_adapter(llama, tmp_path / "it")
    tokens = rng.integers(3, 60, (2, 8))
    np.save(tmp_path / "x.npy", tokens)
    job = {
        "class": "LlamaForCausalLM",
        "base": str(PEFT / "llama"),
        "adapter": str(tmp_path / "it"),
        "inputs": str(tmp_path / "x.npy"),
    }
    ours = llama(
        {"token_ids": tokens, "padding_mask": np.ones_like(tokens)},
        training=False,
    )
    np.testing.assert_allclose(run(python, [job])[0], to_numpy(ours), atol=1e-4)


def test_modules_that_are_several_layers_here(python, tmp_path, rng):
    """GPT-2's, whose linear layers are transposed; base and all."""
    backbone = BACKBONES["GPT2Backbone"]()
    for weight in backbone.weights:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    gpt2 = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    gpt2.backbone.export_to_transformers(str(tmp_path / "base"))
    gpt2.backbone.enable_adapter(CONFIGS["lora"], ["query", "value"])
    move_adapters(gpt2, rng, scale=0.3)
    keras_fvae.save_peft_adapter(gpt2, tmp_path / "it")
    tokens = rng.integers(1, 20, (2, 6))
    np.save(tmp_path / "x.npy", tokens)
    job = {
        "class": "GPT2LMHeadModel",
        "base": str(tmp_path / "base"),
        "adapter": str(tmp_path / "it"),
        "inputs": str(tmp_path / "x.npy"),
    }
    ours = gpt2(
        {"token_ids": tokens, "padding_mask": np.ones_like(tokens)},
        training=False,
    )
    np.testing.assert_allclose(run(python, [job])[0], to_numpy(ours), atol=1e-3)


# By KerasHub's backbone, a class of transformers and its smallest config.
SMALL = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
}
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0}
PICTURES = {**SMALL, "image_size": 16, "patch_size": 8}
TOWERS = {"text_config": TEXT, "vision_config": PICTURES}
PEERS = {
    "BertBackbone": ("BertForSequenceClassification", TEXT),
    "CLIPBackbone": ("CLIPModel", TOWERS),
    "DINOV2Backbone": ("Dinov2ForImageClassification", PICTURES),
    "DebertaV3Backbone": ("DebertaV2ForSequenceClassification", TEXT),
    "DistilBertBackbone": (
        "DistilBertForSequenceClassification",
        {"dim": 8, "n_heads": 2, "n_layers": 2, "hidden_dim": 16},
    ),
    "GPT2Backbone": (
        "GPT2LMHeadModel",
        {"n_embd": 8, "n_head": 2, "n_layer": 2},
    ),
    "GemmaBackbone": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 4}),
    "LlamaBackbone": ("LlamaForCausalLM", DECODER),
    "MistralBackbone": ("MistralForCausalLM", DECODER),
    "Phi3Backbone": ("Phi3ForCausalLM", DECODER),
    "Qwen3Backbone": ("Qwen3ForCausalLM", DECODER),
    "QwenBackbone": ("Qwen2ForCausalLM", DECODER),
    "RobertaBackbone": ("RobertaForSequenceClassification", TEXT),
    "SigLIPBackbone": ("SiglipModel", TOWERS),
    "T5Backbone": (
        "T5ForConditionalGeneration",
        {
            "d_model": 8,
            "d_kv": 4,
            "num_heads": 2,
            "num_layers": 2,
            "d_ff": 16,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "ViTBackbone": ("ViTForImageClassification", PICTURES),
    "WhisperBackbone": (
        "WhisperForConditionalGeneration",
        {
            "d_model": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    ),
}
NAMES = """
import json, sys
import torch, transformers

names = {}
for backbone, (name, options) in json.loads(sys.stdin.read()).items():
    make = getattr(transformers, name)
    model = make(make.config_class(**options))
    names[backbone] = [
        module
        for module, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        or type(layer).__name__ == "Conv1D"
    ]
print(json.dumps(names))
"""


def test_names_are_those_of_transformers(python):
    result = subprocess.run(
        [python, "-c", NAMES],
        input=json.dumps(PEERS),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name, theirs in json.loads(result.stdout.splitlines()[-1]).items():
        backbone = BACKBONES[name]()
        architecture = architecture_of(backbone)
        ours = modules_of(LayerTree(backbone), architecture, newer=True)
        assert ours
        missing = [
            f"{architecture.roots[0]}{module}"
            for module in ours
            if f"{architecture.roots[0]}{module}" not in theirs
        ]
        assert not missing, name
