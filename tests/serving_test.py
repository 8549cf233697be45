"""From training to use: finalize, merge, switch off, export."""

import keras
import keras_hub
import numpy as np
import pytest
import small_models
from helpers import BACKEND
from helpers import move_adapters
from helpers import run_python
from helpers import snapshot
from helpers import to_numpy
from safetensors.numpy import load_file

import keras_fvae
from keras_fvae.model import lookup

SMALL = {"rank": 2, "decoder_units": (4,)}
NAMES = [*small_models.MODELS]


def make_adapted(name, rng, **options):
    """A model with adapters that matter, and what it predicts."""
    model = small_models.MODELS[name]()
    base_predictions = small_models.predict(model, name)
    keras_fvae.enable_fvae_lora(
        getattr(model, "backbone", model), **{**SMALL, **options}
    )
    move_adapters(model, rng, scale=1.0)
    predictions = small_models.predict(model, name)
    assert np.abs(predictions - base_predictions).max() > 0.1
    return model, base_predictions, predictions


@pytest.mark.one_backend
@pytest.mark.parametrize("name", NAMES)
def test_finalizing_changes_no_prediction(name, rng):
    model, _, predictions = make_adapted(name, rng)
    keras_fvae.finalize_adapter(model)
    np.testing.assert_allclose(
        small_models.predict(model, name), predictions, atol=1e-6
    )
    for layer in lookup.adapted_layers(model):
        parameters = sum(to_numpy(w).size for w in layer.adapter.weights)
        assert parameters == layer.adapter.num_inference_parameters
        assert layer.adapter.trainable_weights == []


@pytest.mark.shared_out
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("encoder_units", [(), (3,), (4, 3)])
def test_every_kind_of_encoder_can_be_finalized(shared, encoder_units, rng):
    model, _, predictions = make_adapted(
        "sequential",
        rng,
        encoder_units=encoder_units,
        encoder_shared_trunk=shared,
        latent_fusion="average",
    )
    keras_fvae.finalize_adapter(model)
    np.testing.assert_allclose(
        small_models.predict(model, "sequential"), predictions, atol=1e-6
    )


@pytest.mark.one_backend
def test_what_remains_of_vit_b_16():
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
    )
    base_parameters = backbone.count_params()
    summary = backbone.enable_fvae_lora(
        config=keras_fvae.FVAELoRAConfig.from_paper(rank=16)
    )
    assert len(summary.layer_paths) == 24
    keras_fvae.finalize_adapter(backbone)
    assert backbone.count_params() - base_parameters == 596_736


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["functional", "text_classifier"])
def test_a_finalized_model_refuses_to_train(name, rng):
    model, _, predictions = make_adapted(name, rng)
    small_models.compile_model(model, name)
    small_models.fit(model, name)
    predictions = small_models.predict(model, name)
    keras_fvae.finalize_adapter(model)
    x, y = small_models.data(name)
    for call in (
        lambda: small_models.fit(model, name),
        lambda: model.train_on_batch(x, y),
        lambda: model(x, training=True),
    ):
        with pytest.raises(ValueError, match="This model is finalized"):
            call()
    # And all is as it was.
    np.testing.assert_allclose(
        small_models.predict(model, name), predictions, atol=1e-6
    )
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert np.isfinite(logs["loss"])


def test_finalizing_twice_is_finalizing_once(rng):
    model, _, predictions = make_adapted("sequential", rng)
    keras_fvae.finalize_adapter(model)
    keras_fvae.finalize_adapter(model)
    np.testing.assert_allclose(
        small_models.predict(model, "sequential"), predictions, atol=1e-6
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("name", NAMES)
def test_merging_leaves_plain_layers(name, rng):
    model, _, predictions = make_adapted(name, rng, encoder_units=(), alpha=3.0)
    layers = lookup.adapted_layers(model)
    keras_fvae.merge_adapter(model)
    scale = max(np.abs(predictions).max(), 1)
    np.testing.assert_allclose(
        small_models.predict(model, name) / scale,
        predictions / scale,
        atol=1e-5,
    )
    assert {type(layer) for layer in layers} <= {
        keras.layers.Dense,
        keras.layers.EinsumDense,
    }
    assert not any("adapter" in weight.path for weight in model.weights)
    if name in ("text_classifier", "functional"):
        # All had a bias for each unit before: nothing of ours is left.
        module = type(getattr(model, "backbone", model)).__module__
        assert not module.startswith("keras_fvae")


@pytest.mark.shared_out
@pytest.mark.parametrize("name", ["functional", "causal_lm", "backbone"])
def test_a_merged_model_can_be_saved(name, rng, tmp_path):
    """Also where the update needs a bias, which a Llama has not."""
    model, _, _ = make_adapted(name, rng, encoder_units=())
    keras_fvae.merge_adapter(model)
    predictions = small_models.predict(model, name)
    model.save(tmp_path / "model.keras")
    for _ in range(2):
        model = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(
            small_models.predict(model, name), predictions, atol=1e-6
        )
        model.save(tmp_path / "model.keras")


EQUATIONS = [
    ("abc,cde->abde", (None, 2, 3), "e", (2, 5, 4)),
    ("abc,cde->abde", (None, 2, 3), None, (2, 5, 4)),
    ("abc,cde->abde", (None, 2, 3), "de", (2, 5, 4)),
    ("bqm,muh->bquh", (None, 2, 3), None, (2, 5, 4)),
    ("btd,ndh->btnh", (None, 2, 3), None, (2, 5, 4)),
    ("btnh,nhd->btd", (None, 3), "d", (2, 5, 2, 4)),
    ("abc,dc->adb", (3, None), None, (2, 5, 4)),
    ("...x,xy->...y", (5, 3), "y", (2, 5, 4)),
]


@pytest.mark.one_backend
@pytest.mark.parametrize("equation, output_shape, bias_axes, shape", EQUATIONS)
def test_merging_einsum_layers(equation, output_shape, bias_axes, shape, rng):
    inputs = keras.Input(shape[1:])
    layer = keras.layers.EinsumDense(
        equation, output_shape, bias_axes=bias_axes, activation="tanh"
    )
    model = keras.Model(inputs, layer(inputs))
    keras_fvae.enable_fvae_lora(
        model, 2, layer.name, encoder_units=(), decoder_units=(4,)
    )
    move_adapters(model, rng, scale=1.0)
    x = rng.normal(size=shape).astype("float32")
    expected = to_numpy(model(x))
    keras_fvae.merge_adapter(model)
    np.testing.assert_allclose(to_numpy(model(x)), expected, atol=1e-5)
    # What the layer is now is in its config.
    clone = keras.layers.EinsumDense.from_config(layer.get_config())
    clone.build(shape)
    clone.set_weights(layer.get_weights())
    np.testing.assert_allclose(to_numpy(clone(x)), expected, atol=1e-5)


def test_a_merged_model_can_be_adapted_again(rng):
    model, _, _ = make_adapted("causal_lm", rng, encoder_units=())
    keras_fvae.merge_adapter(model)
    predictions = small_models.predict(model, "causal_lm")
    model.backbone.enable_fvae_lora(**SMALL)
    np.testing.assert_allclose(
        small_models.predict(model, "causal_lm"), predictions, atol=1e-6
    )
    small_models.compile_model(model, "causal_lm")
    assert np.isfinite(small_models.fit(model, "causal_lm").history["loss"][0])


def quantized(model):
    model.quantize("int8")
    keras_fvae.enable_fvae_lora(model, encoder_units=(), **SMALL)


def adapted(**options):
    return lambda model: keras_fvae.enable_fvae_lora(
        model, **{**SMALL, **options}
    )


def untouched(model):
    pass


REFUSALS = [
    (keras_fvae.finalize_adapter, untouched, "no adapted layer"),
    (keras_fvae.merge_adapter, untouched, "no adapted layer"),
    (
        keras_fvae.finalize_adapter,
        adapted(sample_at_inference=True),
        "samples at inference",
    ),
    (
        keras_fvae.merge_adapter,
        adapted(sample_at_inference=True, encoder_units=()),
        "samples at inference",
    ),
    (
        keras_fvae.merge_adapter,
        adapted(),
        r"hidden layers \(encoder_units=\(8,\)\).*finalize_adapter",
    ),
    (keras_fvae.merge_adapter, quantized, "quantized"),
]


@pytest.mark.one_backend
@pytest.mark.parametrize("call, prepare, message", REFUSALS)
def test_refusals_change_nothing(call, prepare, message):
    model = small_models.make_sequential()
    prepare(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["functional", "text_classifier"])
def test_disabled_adapters_give_the_base_predictions(name, rng):
    model, base_predictions, predictions = make_adapted(name, rng)
    x, _ = small_models.data(name)

    def predict():
        return model.predict(x, batch_size=small_models.NUM_SAMPLES, verbose=0)

    np.testing.assert_allclose(predict(), predictions, atol=1e-5)
    with keras_fvae.adapter_disabled(getattr(model, "backbone", model)):
        # The model has a compiled `predict` already.
        np.testing.assert_allclose(predict(), base_predictions, atol=1e-5)
        np.testing.assert_array_equal(
            small_models.predict(model, name), base_predictions
        )
        with keras_fvae.adapter_disabled(model):
            pass
        np.testing.assert_array_equal(
            small_models.predict(model, name), base_predictions
        )
    np.testing.assert_allclose(predict(), predictions, atol=1e-5)


def test_disabled_adapters_come_back_when_the_body_raises(rng):
    model, _, predictions = make_adapted("sequential", rng)
    with pytest.raises(KeyError), keras_fvae.adapter_disabled(model):
        raise KeyError
    np.testing.assert_array_equal(
        small_models.predict(model, "sequential"), predictions
    )


def test_base_predictions_during_fit(rng):
    """As a callback that compares with the base model would."""
    model, base_predictions, _ = make_adapted("sequential", rng)
    small_models.compile_model(model, "sequential")
    x, y = small_models.data("sequential")

    class Compare(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with keras_fvae.adapter_disabled(self.model):
                self.seen = self.model.predict(x, verbose=0)

    compare = Compare()
    model.fit(x, y, epochs=2, verbose=0, callbacks=[compare])
    np.testing.assert_allclose(compare.seen, base_predictions, atol=1e-6)


def test_disabling_needs_adapters():
    with (
        pytest.raises(ValueError, match="no adapted layer"),
        keras_fvae.adapter_disabled(small_models.make_sequential()),
    ):
        pass


@pytest.fixture
def finalized(rng):
    """An image classifier with finalized adapters, and what it predicts."""
    model, _, _ = make_adapted("image_classifier", rng)
    keras_fvae.finalize_adapter(model)
    return model, small_models.predict(model, "image_classifier")


@pytest.mark.skipif(
    BACKEND == "torch", reason="Keras exports no SavedModel from PyTorch"
)
def test_export_to_saved_model(finalized, tmp_path):
    import tensorflow as tf

    model, predictions = finalized
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "model"))
    x, _ = small_models.data("image_classifier")
    scale = np.abs(predictions).max()
    np.testing.assert_allclose(
        served.serve(x).numpy() / scale, predictions / scale, atol=1e-5
    )


@pytest.mark.skipif(BACKEND != "torch", reason="Of PyTorch's own format")
def test_export_to_pytorch(finalized, tmp_path):
    import torch

    model, predictions = finalized
    x, _ = small_models.data("image_classifier")
    path = tmp_path / "model.pt2"
    dynamic_shapes = {0: torch.export.Dim("batch", min=1, max=64)}
    model.export(
        path, format="torch", verbose=False, dynamic_shapes=dynamic_shapes
    )
    served = torch.export.load(path).module()
    scale = np.abs(predictions).max()
    np.testing.assert_allclose(
        served(torch.tensor(x)).detach().numpy() / scale,
        predictions / scale,
        atol=1e-5,
    )


EXPORT = """
import sys
import keras
import keras_fvae
directory = sys.argv[1]
model = keras.saving.load_model(directory + "/model.keras")
model(keras.ops.ones((1, 6, 8)))
model.export(directory + "/model.onnx", format="onnx", verbose=False)
"""


def test_export_to_onnx(rng, tmp_path):
    import onnxruntime

    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x))
    keras_fvae.enable_fvae_lora(model, **SMALL)
    move_adapters(model, rng)
    keras_fvae.finalize_adapter(model)
    x = rng.normal(size=(3, 6, 8)).astype("float32")
    predictions = model.predict(x, verbose=0)
    if BACKEND == "jax":
        # Keras does it by way of a package with some thirty dependencies.
        # TensorFlow exports what JAX has trained as well.
        model.save(tmp_path / "model.keras")
        run_python("-c", EXPORT, tmp_path, backend="tensorflow")
    else:
        model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(outputs, predictions, atol=1e-5)


def greedy(causal_lm, prompt, length):
    """Greedy decoding by whole forward passes, without a cache."""
    tokens = np.zeros((len(prompt), length), "int32")
    tokens[:, : prompt.shape[1]] = prompt
    for position in range(prompt.shape[1], length):
        inputs = {
            "token_ids": tokens,
            "padding_mask": (np.arange(length) < position)[None]
            * np.ones_like(tokens),
        }
        logits = to_numpy(causal_lm(inputs))
        tokens[:, position] = logits[:, position - 1].argmax(axis=-1)
    return tokens


CAUSAL_LMS = {
    "Gemma": {
        "num_query_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    },
    "Llama": {"num_query_heads": 2, "num_key_value_heads": 1},
    "GPT2": {"num_heads": 2, "max_sequence_length": 16},
}


@pytest.mark.parametrize(
    "family",
    [
        "Llama",
        *[pytest.param(f, marks=pytest.mark.slow) for f in ("Gemma", "GPT2")],
    ],
)
def test_generation_with_a_cache(family, rng):
    backbone = getattr(keras_hub.models, f"{family}Backbone")(
        vocabulary_size=30,
        num_layers=2,
        hidden_dim=8,
        intermediate_dim=16,
        **CAUSAL_LMS[family],
    )
    for weight in backbone.weights:
        if weight.name in ("kernel", "embeddings"):
            weight.assign(rng.normal(size=weight.shape))
    model = getattr(keras_hub.models, f"{family}CausalLM")(
        backbone, preprocessor=None
    )
    model.compile(sampler="greedy")
    prompt = rng.integers(1, 30, (3, 4))
    inputs = {
        "token_ids": np.pad(prompt, [(0, 0), (0, 8)]),
        "padding_mask": np.pad(np.ones_like(prompt), [(0, 0), (0, 8)]),
    }

    def generate():
        return to_numpy(
            model.generate(inputs, stop_token_ids=None)["token_ids"]
        )

    base = generate()
    backbone.enable_fvae_lora(**SMALL)
    move_adapters(model, rng, scale=1.0)
    # The compiled `generate` sees the weights of now.
    tokens = generate()
    assert (tokens != base).any()
    np.testing.assert_array_equal(tokens, greedy(model, prompt, 12))
    with keras_fvae.adapter_disabled(model):
        np.testing.assert_array_equal(generate(), base)


@pytest.mark.parametrize("use", ["adapted", "finalized", "merged"])
def test_kerashub_does_not_export_what_it_would_drop(use, rng, tmp_path):
    model = keras_hub.models.Llama3Backbone(
        vocabulary_size=30,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
    )
    task = keras_hub.models.Llama3CausalLM(model, preprocessor=None)
    model.enable_fvae_lora(**SMALL, encoder_units=())
    move_adapters(model, rng)
    if use == "finalized":
        keras_fvae.finalize_adapter(model)
    elif use == "merged":
        keras_fvae.merge_adapter(model)
    for whole in (model, task):
        with pytest.raises(ValueError, match="base weights alone.*save_peft"):
            whole.export_to_transformers(str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_kerashub_exports_a_merged_model_whose_layers_had_biases(rng, tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        return keras_hub.models.GPT2Backbone(
            vocabulary_size=30,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=8,
        )

    def export(model, name):
        model.export_to_transformers(str(tmp_path / name))
        return load_file(tmp_path / name / "model.safetensors")

    model = make()
    base = export(model, "base")
    model.enable_fvae_lora(**SMALL, encoder_units=())
    move_adapters(model, rng)
    keras_fvae.merge_adapter(model)
    merged = export(model, "merged")
    assert merged.keys() == base.keys()
    changed = {k for k in base if not np.array_equal(base[k], merged[k])}
    assert changed and all("attn.c_attn" in name for name in changed)


WITHOUT_THE_PACKAGE = """
import sys
import keras, numpy as np
assert "keras_fvae" not in sys.modules
model = keras.saving.load_model(sys.argv[1] + "/model.keras")
x = np.load(sys.argv[1] + "/x.npy")
np.save(sys.argv[1] + "/y.npy", keras.ops.convert_to_numpy(model(x)))
"""


@pytest.mark.one_backend
def test_a_merged_model_of_plain_layers_needs_nothing_of_ours(rng, tmp_path):
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, use_bias=False, name="query")(inputs)
    x = keras.Sequential([keras.layers.Dense(8, use_bias=False)])(x)
    model = keras.Model(inputs, keras.layers.Dense(3, use_bias=False)(x))
    keras_fvae.enable_fvae_lora(
        model, 2, lambda layer: True, encoder_units=(), decoder_units=(4,)
    )
    move_adapters(model, rng)
    keras_fvae.merge_adapter(model)
    x = rng.normal(size=(2, 8)).astype("float32")
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    run_python("-c", WITHOUT_THE_PACKAGE, tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), to_numpy(model(x)), atol=1e-6
    )


def test_a_task_is_plain_again_after_its_backbone_was_merged(rng):
    model, _, predictions = make_adapted(
        "text_classifier", rng, encoder_units=()
    )
    keras_fvae.merge_adapter(model.backbone)
    assert type(model) is keras_hub.models.BertTextClassifier
    assert type(model.backbone) is keras_hub.models.BertBackbone
    np.testing.assert_allclose(
        small_models.predict(model, "text_classifier"), predictions, atol=1e-4
    )
    small_models.compile_model(model, "text_classifier")
    assert np.isfinite(
        small_models.fit(model, "text_classifier").history["loss"]
    ).all()


def test_lora_on_an_adapted_backbone_is_refused_at_once():
    model = small_models.make_text_classifier()
    model.backbone.enable_fvae_lora(**SMALL)
    before = snapshot(model)
    with pytest.raises(ValueError, match="remove_adapter"):
        model.backbone.enable_lora(2)
    assert snapshot(model) == before
