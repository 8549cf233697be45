"""What is released: built, checked, and used where nothing else is."""

import subprocess
import sys
import venv
import zipfile

import pytest
from helpers import LONG_ON_ONE_BACKEND
from helpers import ROOT

import keras_fvae

pytestmark = LONG_ON_ONE_BACKEND

USE = """
import importlib.util
import sys

import keras
import numpy as np

import keras_fvae


def make_model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, name="query"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *layers])


x = np.random.default_rng(0).normal(size=(16, 4))
model = make_model()
keras_fvae.enable_fvae_lora(model, rank=2)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
model.fit(x, np.arange(16) % 3, epochs=2, verbose=0)
keras_fvae.save_adapter(model, "task.safetensors")
loaded = make_model()
before = loaded.predict(x, verbose=0)
keras_fvae.load_adapter(loaded, "task.safetensors")
after = loaded.predict(x, verbose=0)
np.testing.assert_allclose(after, model.predict(x, verbose=0), atol=1e-6)
assert np.abs(after - before).max() > 1e-4
assert keras.config.backend() == "jax"
for name in ("keras_hub", "tensorflow", "torch", "matplotlib", "sklearn"):
    assert importlib.util.find_spec(name) is None, name
print(keras_fvae.__version__, keras_fvae.__file__.startswith(sys.prefix))
"""


def run(*command, **kwargs):
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder of the source distribution, and of the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture
def wheel(dist):
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_the_index_would_take_them(dist):
    files = sorted(dist.iterdir())
    name = f"keras_fvae-{keras_fvae.__version__}"
    assert [file.name for file in files] == [
        f"{name}-py3-none-any.whl",
        f"{name}.tar.gz",
    ]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "keras_fvae").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_works_on_jax_alone(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    pip = [python, "-I", "-m", "pip"]
    run(*pip, "install", "--constraint", constraints, wheel, "jax")
    run(*pip, "check")
    environment = {"PATH": "/usr/bin:/bin", "KERAS_BACKEND": "jax"}
    output = run(
        python, "-I", "-c", USE, cwd=tmp_path, env=environment
    ).splitlines()[-1]
    assert output == f"{keras_fvae.__version__} True"
