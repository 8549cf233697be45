import subprocess
import sys

import keras
import matplotlib
import numpy as np
import pytest
import sklearn.decomposition
from helpers import run_python
from helpers import to_numpy

import keras_fvae
from keras_fvae.analysis import plots
from keras_fvae.analysis.probes import LayerLatents
from keras_fvae.analysis.probes import Probe
from keras_fvae.methods.fvae import objective

pytestmark = pytest.mark.always_one_backend


@pytest.fixture
def latents(rng):
    def layer():
        mask = np.arange(6) < rng.integers(3, 7, 20)[:, None]
        return LayerLatents(*rng.normal(size=(4, 20, 6, 3)), mask=mask)

    return {f"encoder/layer_{i}/query": layer() for i in range(2)}


def check(figure, path):
    """It can be written as a file, and no window belongs to it."""
    figure.savefig(path / "figure.png", dpi=50)
    assert (path / "figure.png").stat().st_size > 3000
    assert "matplotlib.pyplot" not in sys.modules or not (
        matplotlib.pyplot.get_fignums()
    )


def test_latents_in_two_dimensions(latents, tmp_path):
    layer = latents["encoder/layer_0/query"]
    labels = np.array(["ant", "bee"])[np.arange(20) % 2]
    figure = plots.plot_latents(layer, labels, "a layer")
    for axis, means in zip(figure.axes, (layer.z1_mean, layer.z2_mean)):
        rows = [m[k].mean(axis=0) for m, k in zip(means, layer.mask)]
        pca = sklearn.decomposition.PCA(2)
        expected = pca.fit_transform(rows)
        for label, dots in zip(["ant", "bee"], axis.collections):
            points = np.abs(np.asarray(dots.get_offsets()))
            np.testing.assert_allclose(
                points, np.abs(expected[labels == label]), atol=1e-6
            )
        share = pca.explained_variance_ratio_[0]
        assert f"{share:.0%}" in axis.get_xlabel()
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["ant", "bee"]
    check(figure, tmp_path)
    with pytest.raises(ValueError, match="one value for each of the 20"):
        plots.plot_latents(layer, labels[:19])


def test_statistics_of_each_layer(latents, tmp_path):
    figure = plots.plot_layers(latents)
    kl, wasserstein, active = (
        [bar.get_width() for bar in axis.patches] for axis in figure.axes
    )
    for index, layer in enumerate(latents.values()):
        q1 = layer.z1_mean[layer.mask], layer.z1_log_variance[layer.mask]
        q2 = layer.z2_mean[layer.mask], layer.z2_log_variance[layer.mask]
        distance = objective.squared_distance(*q1)
        expected = to_numpy(objective.kl_divergence(distance, q1[1])).mean()
        assert kl[index] == pytest.approx(expected, rel=1e-5)
        expected = to_numpy(objective.wasserstein(*q1, *q2)).mean()
        assert wasserstein[index] == pytest.approx(expected, rel=1e-5)
    assert active == [3, 3, 3, 3]
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == ["layer_0/query", "layer_1/query"]
    check(figure, tmp_path)
    with pytest.raises(ValueError, match="one layer at least"):
        plots.plot_layers({})


def test_terms_over_training(tmp_path):
    logs = {"loss": [3.0, 2.0], "val_loss": [3.5, 2.5], "kl_z1": [0.0, 1.0]}
    figure = plots.plot_training(logs)
    loss, kl = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines] == [
        logs["loss"],
        logs["val_loss"],
    ]
    assert kl.get_title() == "kl_z1"
    assert list(kl.lines[0].get_ydata()) == logs["kl_z1"]
    check(figure, tmp_path)
    with pytest.raises(ValueError, match="FVAELoRAMonitor"):
        plots.plot_training({"loss": [1.0]})


def test_ranks_of_each_layer(tmp_path):
    history = [{"a/query": 4, "a/value": 4}, {"a/query": 1, "a/value": 3}]
    figure = plots.plot_ranks(history)
    [image] = figure.axes[0].images
    assert image.get_array().tolist() == [[4, 1], [4, 3]]
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == ["query", "value"]
    check(figure, tmp_path)
    with pytest.raises(ValueError, match="AdaLoRAAllocator"):
        plots.plot_ranks([])
    for wrong in (3, keras.callbacks.History(), [4, 1], {"a": 1}):
        with pytest.raises(TypeError, match="`history` must be a list"):
            plots.plot_ranks(wrong)
    # Of an allocator that was used again when a layer was frozen.
    figure = plots.plot_ranks([{"a": 4, "b": 4}, {"b": 3}])
    [image] = figure.axes[0].images
    assert image.get_array().tolist() == [[4, None], [4, 3]]
    check(figure, tmp_path)


def test_probes(tmp_path):
    probes = [
        Probe(layer, latent, attribute, 0.8, 0.7, 0.85, 0.5)
        for layer in ("layer_0", "layer_1")
        for latent in ("z1", "z2")
        for attribute in ("label", "color")
    ]
    figure = plots.plot_probes(probes)
    assert [axis.get_title() for axis in figure.axes] == ["label", "color"]
    for axis in figure.axes:
        segments = axis.collections[0].get_segments()
        assert [(s[0][0], s[1][0]) for s in segments] == [
            (pytest.approx(0.7), pytest.approx(0.85))
        ] * 2
    [legend] = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {"z1", "z2", "chance"}
    check(figure, tmp_path)
    with pytest.raises(ValueError, match="one probe at least"):
        plots.plot_probes([])


def test_matplotlib_is_loaded_only_for_plots():
    code = """
import sys
import keras_fvae
assert not {"matplotlib", "sklearn", "scipy"} & {*sys.modules} - before
keras_fvae.plots.plot_training
assert "matplotlib" in sys.modules
"""
    # What a backend loads by itself is none of ours.
    code = "import sys, keras, keras_hub; before = {*sys.modules}" + code
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(keras_fvae, "plot")


@pytest.mark.parametrize(
    "use, package",
    [
        ("keras_fvae.plots", "matplotlib"),
        ("keras_fvae.probe_latents(model, x, y)", "scipy"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(use, package):
    code = f"""
import sys
import numpy as np
import keras
import keras_fvae
sys.modules["{package}"] = None
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="q")])
keras_fvae.enable_fvae_lora(model, 2, "q")
x, y = np.ones((12, 4)), np.arange(12) % 2
try:
    {use}
except ImportError as error:
    print(error)
"""
    output = run_python("-c", code, backend="jax").stdout
    assert f"takes the package '{package}" in output
    assert 'pip install "keras-fvae[analysis]"' in output
