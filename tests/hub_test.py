"""KerasHub has our methods, whichever is imported first, and however often."""

import functools

import pytest
from helpers import run_python

pytestmark = pytest.mark.one_backend

# JAX takes the least time to import.
run_python = functools.partial(run_python, backend="jax")

ENABLE = """
import keras_hub
backbone = keras_hub.models.GPT2Backbone(
    vocabulary_size=9, num_layers=1, num_heads=1, hidden_dim=4,
    intermediate_dim=4, max_sequence_length=8,
)
print(len(backbone.enable_fvae_lora(rank=2).layer_paths))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import keras_hub, keras_fvae",
        "import keras_fvae, keras_hub",
        "import keras_fvae; from keras_hub.src.models.backbone import Backbone",
        "import keras_fvae, importlib\n"
        "importlib.import_module('keras_hub.models')",
    ],
)
def test_backbones_have_the_methods_in_any_order_of_imports(imports):
    assert run_python("-c", imports + ENABLE).stdout.split() == ["2"]


def test_modules_that_are_imported_anew():
    """As notebooks do it: reloaded, or forgotten and imported again."""
    code = f"""
import importlib, inspect, sys

def count_changes():
    model = sys.modules["keras_hub"].models.DFineObjectDetector
    chain = []
    inspect.unwrap(model.compute_loss, stop=chain.append)
    return len(chain)

def forget(name):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]

import keras_fvae, keras_hub
for change in (
    lambda: importlib.reload(keras_hub),
    lambda: importlib.reload(keras_fvae),
    lambda: importlib.reload(sys.modules["keras_fvae.integrations.keras_hub"]),
    lambda: importlib.reload(sys.modules["keras_fvae.backend.noise"]),
    lambda: forget("keras_hub"),
    lambda: forget("keras_fvae"),
):
    change()
    import keras_fvae, keras_hub
    exec({ENABLE!r})
    assert count_changes() == 1, count_changes()
"""
    # On PyTorch, which knows our operations by name.
    output = run_python("-c", code, backend="torch").stdout
    assert output.split() == ["2"] * 6


def test_kerashub_is_not_imported_before_it_is_needed():
    code = """
import sys, time
import keras
before = set(sys.modules)
begin = time.process_time()
import keras_fvae
print(time.process_time() - begin)
print({name.split(".")[0] for name in set(sys.modules) - before}
    - sys.stdlib_module_names)
"""
    seconds, new_modules = run_python("-c", code).stdout.splitlines()
    assert float(seconds) < 0.3
    assert new_modules in (
        "{'keras_fvae', 'safetensors'}",
        "{'safetensors', 'keras_fvae'}",
    )


def test_a_file_brings_kerashub_with_it(tmp_path):
    save = f"""
import keras_fvae
{ENABLE}
backbone.save({str(tmp_path / "backbone.keras")!r})
"""
    load = f"""
import sys
import keras
import keras_fvae
assert "keras_hub" not in sys.modules
backbone = keras.saving.load_model({str(tmp_path / "backbone.keras")!r})
print(len(backbone.trainable_weights))
"""
    run_python("-c", save)
    assert run_python("-c", load).stdout.split() == ["6"]


def test_works_without_kerashub():
    code = """
import sys
sys.modules["keras_hub"] = None  # What Python finds if it is not installed.
import keras
import keras_fvae
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="q")])
print(keras_fvae.enable_fvae_lora(model, 2, ["q"]))
"""
    output = run_python("-c", code).stdout
    assert "FVAE-LoRA of rank 2 on 1 layers" in output


def test_works_where_kerashub_cannot_be_imported(tmp_path):
    package = tmp_path / "keras_hub"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import keras_fvae
for _ in range(2):
    try:
        import keras_hub
    except ModuleNotFoundError as error:
        print(error.name)
# As once what was missing is installed.
sys.path.remove({str(tmp_path)!r})
{ENABLE}
"""
    output = run_python("-c", code).stdout
    assert output.split() == ["no_such_module", "no_such_module", "2"]
