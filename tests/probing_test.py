import json

import keras
import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from backbones import data
from helpers import BACKEND
from helpers import move_adapters
from helpers import text_inputs
from helpers import to_numpy

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

SMALL = {"rank": 2, "decoder_units": (4,), "dropout": 0.0}


@pytest.fixture
def model(rng):
    inputs = keras.Input((3, 5))
    x = keras.layers.Dense(6, activation="tanh", name="query")(inputs)
    x = keras.layers.Dense(6, name="value")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_fvae.enable_fvae_lora(model, **SMALL)
    move_adapters(model, rng)
    return model


@pytest.fixture
def x(rng):
    return rng.normal(size=(10, 3, 5)).astype("float32")


def paths(model):
    return [layer.path for layer in adapted_layers(model)]


def test_latents_are_the_posteriors(model, x):
    found = keras_fvae.latents(model, x, batch_size=4)
    query, value = adapted_layers(model)
    assert [*found] == [query.path, value.path]
    for layer, inputs in [(query, x), (value, to_numpy(query(x)))]:
        out = layer.adapter.fvae(inputs)
        for name in ("z1_mean", "z1_log_variance", "z2_mean"):
            np.testing.assert_allclose(
                getattr(found[layer.path], name),
                to_numpy(getattr(out, name)),
                rtol=1e-4,
                atol=1e-5,
            )
        assert found[layer.path].mask.tolist() == [[True] * 3] * 10


class Batches(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.x[3 * index : 3 * index + 3], np.zeros(3)[: 10 - 3 * index]


def torch_loader(x):
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.tensor(x), torch.zeros(10))
    return torch.utils.data.DataLoader(dataset, batch_size=3)


def tf_dataset(x):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, np.zeros(10))).batch(3)


@pytest.mark.parametrize("make", [Batches, torch_loader, tf_dataset])
def test_any_data_that_predict_takes(make, model, x):
    expected = keras_fvae.latents(model, x)
    for path, layer in keras_fvae.latents(model, make(x)).items():
        for one, other in zip(layer, expected[path]):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_model_predicts_as_before(model, x):
    before = model.predict(x, verbose=0)
    model_class = type(model)
    keras_fvae.latents(model, x)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    with pytest.raises(Exception, match="."):
        keras_fvae.latents(model, x[:, :, :4])
    assert type(model) is model_class
    assert model.predict_function is None


def test_padding_is_masked_and_left_out_of_the_average(bert, rng):
    bert.backbone.enable_fvae_lora(**SMALL)
    move_adapters(bert, rng)
    inputs = text_inputs(rng, (4, 6))
    inputs["padding_mask"][1::2, 4:] = 0
    # The head is a classifier's, around the adapted backbone.
    tokens = keras_fvae.latents(bert, inputs)
    means = keras_fvae.latents(bert, inputs, average_tokens=True)
    assert len(tokens) == 4
    for path, layer in tokens.items():
        np.testing.assert_array_equal(layer.mask, inputs["padding_mask"] == 1)
        expected = [
            row[mask].mean(axis=0)
            for row, mask in zip(layer.z2_mean, layer.mask)
        ]
        np.testing.assert_allclose(
            means[path].z2_mean, expected, rtol=1e-4, atol=1e-5
        )
        assert means[path].mask.tolist() == [True] * 4


def test_a_task_takes_raw_data(rng):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sun", "snow"]
    backbone = BACKBONES["BertBackbone"]()
    task = keras_hub.models.BertTextClassifier(
        backbone,
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.models.BertTokenizer(vocabulary), sequence_length=5
        ),
    )
    backbone.enable_fvae_lora(**SMALL)
    found = keras_fvae.latents(task, ["sun", "snow sun"])
    first = found[paths(backbone)[0]]
    # Each text has a beginning and an end besides.
    assert first.mask.sum(axis=1).tolist() == [3, 4]


@pytest.mark.skipif(BACKEND != "torch", reason="takes long to build elsewhere")
@pytest.mark.parametrize("name", ["AlbertBackbone", "SwinTransformerBackbone"])
def test_layers_called_twice_and_windows(name):
    backbone = BACKBONES[name]()
    backbone.enable_fvae_lora(**SMALL)
    x = data(backbone, batch_size=12)
    found = keras_fvae.latents(backbone, x)
    num_calls = 2 if name == "AlbertBackbone" else 1
    expected = {p + n for p in paths(backbone) for n in ("", ":2")[:num_calls]}
    assert {*found} == expected
    probes = keras_fvae.probe_latents(backbone, x, np.arange(12) % 2)
    assert len(probes) == 2 * len(expected)


def test_what_has_no_latents_is_refused(model, x):
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="no adapted layer"):
        keras_fvae.latents(plain, x)
    with pytest.raises(TypeError, match="must be a `keras.Model`"):
        keras_fvae.latents(adapted_layers(model)[0], x)
    with pytest.raises(TypeError, match="must be a dict"):
        keras_fvae.probe_latents(model, x, np.arange(10) % 2, [[1] * 10])
    with (
        keras_fvae.adapter_disabled(model),
        pytest.raises(ValueError, match="Leave the `adapter_disabled`"),
    ):
        keras_fvae.latents(model, x)
    with pytest.raises(ValueError, match="`average_tokens` must be a boolean"):
        keras_fvae.latents(model, x, average_tokens="no")
    keras_fvae.finalize_adapter(model)
    with pytest.raises(ValueError, match="finalized"):
        keras_fvae.latents(model, x)


@pytest.fixture
def factorized():
    """A model whose z1 is the first two features, and whose z2 the others."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_fvae_lora(model, encoder_units=(), **SMALL)
    fvae = model.layers[0].adapter.fvae
    weights = fvae.get_reference_weights()
    for index in (0, 1):
        name = f"views_conditionalGaussianEncoders_list.{index}.mean.weight"
        weights[name] = np.eye(4)[2 * index : 2 * index + 2]
    fvae.set_reference_weights(weights)
    return model


def wilson(share, n, z=1.959964):
    """The ends of Wilson's interval, by its formula."""
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = (
        z
        / (1 + z**2 / n)
        * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    )
    return center - half, center + half


def test_probes_read_what_each_latent_holds(factorized, rng):
    labels = np.arange(200) % 4 // 3
    colors = np.array(["red", "green"])[rng.integers(0, 2, 200)]
    x = rng.normal(size=(200, 4))
    x[:, 0] += 4 * labels
    x[:, 2] += 4 * (colors == "red")
    probes = keras_fvae.probe_latents(factorized, x, labels, {"color": colors})
    by_name = {(probe.attribute, probe.latent): probe for probe in probes}
    assert by_name["label", "z1"].accuracy > 0.95
    assert by_name["color", "z2"].accuracy > 0.95
    assert by_name["label", "z2"].accuracy <= 0.8
    assert abs(by_name["color", "z1"].accuracy - 0.5) < 0.15
    assert by_name["label", "z1"].chance == 0.75
    for probe in probes:
        assert (probe.low, probe.high) == pytest.approx(
            wilson(probe.accuracy, 200), abs=1e-6
        )
    assert len(str(probes).splitlines()) == 4
    assert json.loads(json.dumps(probes.to_dicts()))[0]["latent"] == "z1"


@pytest.mark.parametrize(
    "y, attributes, message",
    [
        (np.zeros(10), None, "two classes at least"),
        (np.arange(10) // 9, None, r"with \[9, 1\] examples"),
        (np.arange(10) % 2, {"color": np.arange(9)}, "'color' must have one"),
        (np.ones((10, 2)), None, "'label' must have one value"),
        (np.arange(8) % 2, None, "layer .* saw 10"),
        (np.arange(10) % 2, {"label": np.arange(10) % 2}, "that is `y`"),
    ],
)
def test_bad_labels_are_refused(y, attributes, message, model, x):
    with pytest.raises(ValueError, match=message):
        keras_fvae.probe_latents(model, x, y, attributes, num_folds=4)
