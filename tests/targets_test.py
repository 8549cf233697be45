"""Which layers are adapted, and how, by what people say."""

import re

import keras
import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from helpers import snapshot

import keras_fvae

pytestmark = pytest.mark.one_backend
LORA = keras_fvae.LoRAConfig(4, alpha=8)


def make_task():
    return keras_hub.models.BertTextClassifier(
        BACKBONES["BertBackbone"](), num_classes=3, preprocessor=None
    )


def make_model():
    return keras.Sequential(
        [
            keras.Input((5,)),
            *(keras.layers.Dense(6, name=name) for name in "abc"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def adapted(summary):
    return {layer.path.split("/")[-1]: layer.config for layer in summary.layers}


def test_all_linear_layers_but_the_head():
    task = make_task()
    names = {*adapted(keras_fvae.enable_adapter(task, LORA, "all-linear"))}
    assert "logits" not in names
    assert {"query", "key", "value", "attention_output"} <= names
    # What gives the outputs of a backbone is no head.
    backbone = BACKBONES["BertBackbone"]()
    names = {*adapted(backbone.enable_adapter(LORA, "all-linear"))}
    assert "pooled_dense" in names
    model = make_model()
    names = {*adapted(keras_fvae.enable_adapter(model, LORA, "all-linear"))}
    assert names == {"a", "b", "c"}
    x = np.ones((2, 5))
    model.compile("sgd", "mse")
    model.fit(x, np.ones((2, 3)), verbose=0)


@pytest.mark.parametrize(
    "exclude", ["b", ["b"], re.compile("/b$"), lambda layer: layer.name == "b"]
)
def test_some_are_excluded(exclude):
    summary = keras_fvae.enable_fvae_lora(
        make_model(),
        rank=2,
        target_layer_names="all-linear",
        exclude_layer_names=exclude,
    )
    assert {*adapted(summary)} == {"a", "c"}


def test_each_pattern_has_its_rank():
    summary = keras_fvae.enable_adapter(
        make_model(),
        LORA,
        {
            "a": 2,
            re.compile("/b$"): {"rank": 3, "alpha": 6},
            (lambda layer: layer.name == "c"): keras_fvae.DoRAConfig(5),
        },
    )
    configs = adapted(summary)
    assert (configs["a"].rank, configs["a"].alpha) == (2, 8)
    assert (configs["b"].rank, configs["b"].alpha) == (3, 6)
    assert type(configs["c"]) is keras_fvae.DoRAConfig
    text = str(summary)
    assert text.startswith("Adapters on 3 layers, as made:")
    assert "/a  (LoRA of rank 2, scale 4)" in text
    assert "/c  (DoRA of rank 5)" in text


def test_ranks_by_pattern_are_saved_and_trained(tmp_path, rng):
    model = make_model()
    keras_fvae.enable_fvae_lora(
        model, rank=4, target_layer_names={"a": 2, "b": 3}, decoder_units=(4,)
    )
    x = rng.normal(size=(4, 5)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, np.ones((4, 3)), epochs=2, verbose=0)
    keras_fvae.save_adapter(model, tmp_path / "task.safetensors")
    state = keras_fvae.read_adapter(tmp_path / "task.safetensors")
    assert "of rank 2 to 3 on 2 layers" in str(state)
    keras_fvae.remove_adapter(model)
    summary = keras_fvae.load_adapter(model, tmp_path / "task.safetensors")
    assert {n: c.rank for n, c in adapted(summary).items()} == {"a": 2, "b": 3}


def test_blocks_by_number():
    backbone = BACKBONES["BertBackbone"]()
    summary = backbone.enable_adapter(
        LORA, re.compile(r"transformer_layer_[1-9]/.*/(query|value)$")
    )
    assert summary.layers
    assert all("layer_0" not in path for path in summary.layer_paths)


@pytest.mark.parametrize(
    "targets, exclude, error, message",
    [
        (
            {"a": 2, re.compile("/a$"): 3},
            (),
            ValueError,
            "two patterns match.*'a'",
        ),
        ({"a": 2, "no_such": 3}, (), ValueError, "'no_such' matches no layer"),
        ({"a": 0}, (), ValueError, "`rank` must be"),
        ({"a": 2.5}, (), TypeError, "value of 'a' must be a rank"),
        ({"a": True}, (), TypeError, "value of 'a' must be a rank"),
        ({"a": {"ranks": 2}}, (), TypeError, "may have these.*'alpha'"),
        ({}, (), ValueError, "has nothing to adapt"),
        (
            {"a": keras_fvae.LoRAConfig},
            (),
            TypeError,
            "must be a rank, a config",
        ),
        (
            "all-linear",
            "no_such",
            ValueError,
            "`exclude_layer_names`.*'no_such'",
        ),
        ("a", "a", ValueError, "nothing to adapt.*exclude_layer_names='a'"),
        ("a", 3, TypeError, "`exclude_layer_names` must be"),
        ("d", (), ValueError, r"can name are: \['a', 'b', 'c', 'head'\]"),
    ],
)
def test_what_cannot_be_meant(targets, exclude, error, message):
    model = make_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        keras_fvae.enable_adapter(
            model, LORA, targets, exclude_layer_names=exclude
        )
    assert snapshot(model) == before


class Attention(keras.Model):
    def __init__(self):
        super().__init__()
        self.to_q = keras.layers.Dense(3, name="projection_of_queries")
        self.to_v = keras.layers.Dense(3)

    def call(self, x):
        return self.to_q(x) + self.to_v(x)


def test_errors_name_attributes():
    model = Attention()
    model(np.ones((1, 2)))
    with pytest.raises(ValueError) as caught:
        keras_fvae.enable_adapter(model, LORA, "q")
    assert "projection_of_queries (held as `to_q`)" in str(caught.value)
    assert "'to_v'" in str(caught.value)


def test_the_head_may_be_behind_other_layers():
    def names(layers, **options):
        model = keras.Sequential([keras.Input((5,)), *layers])
        summary = keras_fvae.enable_adapter(
            model, LORA, "all-linear", **options
        )
        return {*adapted(summary)}

    def dense(name):
        return keras.layers.Dense(4, name=name)

    last = [keras.layers.Dropout(0.1), keras.layers.Softmax()]
    assert names([dense("a"), dense("head"), *last]) == {"a"}
    nested = keras.Sequential([keras.Input((4,)), dense("b"), dense("head")])
    assert names([dense("a"), nested]) == {"a", "b"}
    # What trains is not adapted, whatever it is.
    found = names(
        [dense("a"), dense("b"), dense("head")], trainable_layer_names="b"
    )
    assert found == {"a"}


def test_a_subclass_does_not_say_what_its_head_is():
    model = Attention()
    model(np.ones((1, 2)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="is a subclass.*`exclude_layer_nam"):
        keras_fvae.enable_adapter(model, LORA, "all-linear")
    assert snapshot(model) == before
    summary = keras_fvae.enable_adapter(
        model, LORA, "all-linear", trainable_layer_names="to_v"
    )
    assert {*adapted(summary)} == {"projection_of_queries"}


def test_a_layer_is_no_name_of_one():
    model = make_model()
    for layers in (model.layers[0], [model.layers[0]]):
        with pytest.raises(TypeError, match="and no layers.*Pass its name"):
            keras_fvae.enable_adapter(model, LORA, layers)
    with pytest.raises(TypeError, match="value of 'a' may have these"):
        keras_fvae.enable_adapter(
            model, keras_fvae.HiRAConfig(2), {"a": {"alpha": 3}}
        )
