"""What Keras's own summary and graph of a model show of its adapters."""

import re

import keras
import numpy as np
import pytest
import small_models
from helpers import to_numpy

import keras_fvae

pytestmark = pytest.mark.one_backend


@pytest.fixture(autouse=True)
def wide_console(monkeypatch):
    """Each row in a line."""
    monkeypatch.setenv("COLUMNS", "400")


def shown(model, **kwargs):
    """Dict of a layer's name to what the summary says it is."""
    lines = []
    model.summary(line_length=390, print_fn=lines.append, **kwargs)
    rows = re.findall(r"│[ └]+(\w+) \(([^()]+)\) ", "\n".join(lines))
    return dict(rows)


def test_of_a_sequential_model():
    model = small_models.make_sequential()
    plain = shown(model)
    assert plain == {"query": "Dense", "head": "Dense"}
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    assert shown(model) == {"query": "Dense, LoRA", "head": "Dense"}
    keras_fvae.remove_adapter(model)
    assert shown(model) == plain


def test_of_a_functional_model_with_another_inside():
    inner = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8, name="value")], name="inner"
    )
    inputs = keras.Input((8,))
    x = inner(keras.layers.Dense(8, name="query")(inputs))
    # Called twice, and there once.
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(inner(x)))
    keras_fvae.enable_adapter(
        model,
        keras_fvae.LoRAConfig(2),
        {"query": 2, "value": keras_fvae.DoRAConfig(2)},
    )
    expected = {
        "query": "Dense, LoRA",
        "inner": "Sequential, DoRA inside",
        "value": "Dense, DoRA",
        "head": "Dense",
    }
    found = shown(model, expand_nested=True)
    assert {name: found[name] for name in expected} == expected
    del expected["value"]
    found = shown(model)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "name, layer, kind",
    [
        ("subclassed", "encoder", "Encoder"),
        ("text_classifier", "bert_backbone", "BertBackbone"),
        ("text_classifier", "transformer_layer_0", "TransformerEncoder"),
        ("backbone", "transformer_layer_0", "LlamaTransformerDecoder"),
    ],
)
def test_of_layers_inside_layers(name, layer, kind):
    model = small_models.MODELS[name]()
    keras_fvae.enable_fvae_lora(model, rank=2)
    found = shown(model, expand_nested=True)
    assert found[layer] == f"{kind}, FVAE-LoRA inside"


def test_of_a_layer_that_was_made_adapted():
    layer = keras_fvae.FVAELoRADense(3, rank=2, name="adapted")
    model = keras.Sequential([keras.Input((4,)), layer])
    model(np.ones((1, 4)))
    assert shown(model) == {"adapted": "Dense, FVAE-LoRA"}


def test_that_a_summary_changes_nothing(tmp_path):
    model = small_models.make_functional()
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    classes = [type(layer) for layer in model._flatten_layers()]
    shown(model, expand_nested=True)
    with pytest.raises(ValueError, match="layer_range"):
        model.summary(layer_range=["query"])
    assert [type(layer) for layer in model._flatten_layers()] == classes
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.ones((2, 4), "int32")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
    assert shown(loaded)["query"] == "Dense, LoRA"


def test_that_the_graph_shows_which_layers_train():
    """It shows the classes' own names, by which Keras finds the weights."""
    model = small_models.make_sequential()
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2))
    graph = keras.utils.model_to_dot(
        model, show_trainable=True, show_layer_names=True
    )
    labels = {
        re.search(r"<b>(\w+)</b>", label)[1]: label
        for label in (node.get_label() for node in graph.get_nodes())
        if label
    }
    assert "<b>Trainable</b>" in labels["query"]
    assert "<b>Non-trainable</b>" in labels["head"]
