import pytest
from helpers import run_python

ENABLE = """
import keras_hub.models
backbone = keras_hub.models.GPT2Backbone(
    vocabulary_size=9, num_layers=1, num_heads=1, hidden_dim=4,
    intermediate_dim=4, max_sequence_length=8,
)
print(len(backbone.enable_fvae_lora(rank=2).layer_paths))
"""


@pytest.mark.parametrize(
    "imports",
    ["import keras_fvae, keras_hub", "import keras_hub, keras_fvae"],
)
def test_backbones_have_the_methods_in_either_order_of_import(imports):
    assert run_python("-c", imports + ENABLE).stdout.split() == ["2"]


def test_works_without_kerashub():
    code = """
import sys
sys.modules["keras_hub"] = None  # What Python finds if it is not installed.
import keras
before = set(sys.modules)
import keras_fvae
new = {name.split(".")[0] for name in set(sys.modules) - before}
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="q")])
print(keras_fvae.enable_fvae_lora(model, 2, ["q"]))
print(new - sys.stdlib_module_names)
"""
    output = run_python("-c", code).stdout
    assert "FVAE-LoRA of rank 2 on 1 layers" in output
    assert output.splitlines()[-1] == "{'keras_fvae'}"
