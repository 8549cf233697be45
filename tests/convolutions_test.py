"""Adapted convolutions: what a patch is, and what is added for each."""

import dataclasses
import re

import keras
import keras_hub
import numpy as np
import pytest
from backbones import BACKBONES
from family import CONFIGS
from helpers import move_adapters
from helpers import snapshot
from helpers import to_numpy
from helpers import value_and_gradients
from keras import layers
from keras import ops
from keras.src.testing import TestCase
from sklearn.datasets import load_digits

import keras_fvae
from keras_fvae.layers.frozen import linear_map_of
from keras_fvae.model import lookup

LORA = keras_fvae.LoRAConfig(3, 6, seed=0)
FVAE = keras_fvae.FVAELoRAConfig(2, decoder_units=(4,), seed=0)
FIRST = "channels_first"
# Number of axes, size, what else `keras.layers.Conv` takes.
CASES = [
    (1, 1, {"strides": 2}),
    (1, 3, {"padding": "causal", "dilation_rate": 2}),
    (1, 2, {"padding": "causal", "strides": 2, "data_format": FIRST}),
    (2, 1, {"padding": "same", "strides": (2, 3), "data_format": FIRST}),
    (2, (3, 2), {}),
    (2, (3, 2), {"padding": "same", "dilation_rate": 2, "data_format": FIRST}),
    (2, 3, {"padding": "same", "strides": 2}),
    # There is less to pad than the kernel leaves out.
    (2, (1, 2), {"padding": "same", "strides": 3}),
    (3, (2, 1, 3), {"padding": "same", "strides": 2}),
    (3, 2, {"strides": 2, "data_format": FIRST}),
]
on_cases = pytest.mark.parametrize("num_axes, size, options", CASES)
# Not as many filters as there are positions: on TensorFlow, Keras takes the
# last axis for the channels then.
FILTERS, CHANNELS = 9, 4


def make(num_axes, size, options, **more):
    """A plain convolution, and inputs for it."""
    rng = np.random.default_rng(0)
    layer = getattr(layers, f"Conv{num_axes}D")(
        FILTERS, size, **options, **more
    )
    shape = [2, *[8, 7, 6][:num_axes], CHANNELS]
    if layer.data_format == FIRST:
        shape.insert(1, shape.pop())
    x = rng.normal(size=shape).astype("float32")
    layer.build(x.shape)
    for weight in layer.weights:
        weight.assign(rng.normal(scale=0.3, size=weight.shape))
    return layer, x


def adapt(layer, x, config):
    """Adapts a layer, and moves its adapter away from where it starts."""
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    keras_fvae.enable_adapter(model, config, lambda layer: True)
    move_adapters(model, np.random.default_rng(1))
    return model


def assert_close(found, expected, tolerance=1e-5):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * scale
    )


@pytest.mark.shared_out
@on_cases
def test_patches_times_the_kernel_are_the_convolution(num_axes, size, options):
    layer, x = make(num_axes, size, options, use_bias=False)
    expected, x = to_numpy(layer(x)), ops.convert_to_tensor(x)
    linear_map, shape = linear_map_of(layer), tuple(layer.kernel.shape)
    matrix = linear_map.to_matrix(layer.kernel)
    kernel = linear_map.from_matrix(to_numpy(matrix), shape)
    np.testing.assert_array_equal(kernel, to_numpy(layer.kernel))
    products = ops.matmul(linear_map.to_tokens(x, shape), matrix)
    for outputs in (
        linear_map.from_tokens(products, x, shape),
        linear_map.multiply(x, matrix, shape),
    ):
        assert_close(to_numpy(outputs), expected)
    projected = linear_map.project(x, matrix, shape)
    assert_close(to_numpy(projected), to_numpy(products))
    total = linear_map.add_product(
        ops.convert_to_tensor(expected), projected, -ops.eye(FILTERS), x, shape
    )
    assert_close(to_numpy(total), np.zeros_like(expected))


@pytest.mark.shared_out
@on_cases
def test_lora_is_that_of_keras(num_axes, size, options):
    ours, x = make(num_axes, size, options, activation="tanh")
    theirs, _ = make(num_axes, size, options, activation="tanh")
    adapt(ours, x, LORA)
    theirs.enable_lora(LORA.rank, lora_alpha=LORA.alpha)
    our_weights = [ours.adapter.kernel_a, ours.adapter.kernel_b]
    their_weights = [theirs.lora_kernel_a, theirs.lora_kernel_b]
    for one, other in zip(our_weights, their_weights):
        other.assign(ops.reshape(one, other.shape))

    def value_and_all_gradients(layer, weights):
        value, of_weights, of_x = value_and_gradients(
            lambda x: ops.mean(ops.square(layer(x))), weights, [x]
        )
        return value, *of_weights, *of_x

    assert_close(to_numpy(ours(x)), to_numpy(theirs(x)))
    for found, expected in zip(
        value_and_all_gradients(ours, our_weights),
        value_and_all_gradients(theirs, their_weights),
    ):
        assert_close(found.reshape(expected.shape), expected)


@on_cases
def test_the_frozen_layer_is_keras_s_to_the_bit(num_axes, size, options):
    layer, x = make(num_axes, size, options, activation="tanh")
    expected = to_numpy(layer(x))
    model = adapt(layer, x, LORA)
    with keras_fvae.adapter_disabled(model):
        np.testing.assert_array_equal(to_numpy(layer(x)), expected)


def step(layer, x, training):
    """The outputs of a call, and the loss that it adds."""
    outputs = to_numpy(layer(x, training=training))
    return outputs, sum(to_numpy(loss) for loss in layer.losses)


def twins(config, **options):
    """A convolution of size 1, and the `Dense` layer that it is, adapted."""
    convolution, x = make(2, 1, options, activation="tanh")
    dense = layers.Dense(FILTERS, activation="tanh")
    dense.build((None, CHANNELS))
    dense.kernel.assign(ops.reshape(convolution.kernel, (CHANNELS, FILTERS)))
    dense.bias.assign(convolution.bias)
    strides = convolution.strides
    inputs_of_dense = x[:, :: strides[0], :: strides[1]]
    adapt(convolution, x, config)
    adapt(dense, inputs_of_dense, config)
    return (convolution, x), (dense, inputs_of_dense)


@pytest.mark.shared_out
@pytest.mark.parametrize("name", CONFIGS)
def test_one_of_size_1_is_a_dense_layer(name):
    for is_training in (False, True):
        # What dropout draws for x is for all of it.
        for strides in (1, (2, 3)) if "dropout" not in name else (1,):
            (found, added), (expected, expected_added) = (
                step(layer, x, is_training)
                for layer, x in twins(CONFIGS[name], strides=strides)
            )
            assert_close(found, expected)
            assert_close(added, expected_added)


def test_methods_start_from_the_kernel_as_a_matrix():
    layer, x = make(2, 3, {"data_format": FIRST}, use_bias=False)
    kernel = to_numpy(layer.kernel)
    matrix = kernel.reshape(-1, FILTERS)

    def weights(config):
        model = keras.Sequential([keras.Input(x.shape[1:]), layer])
        keras_fvae.enable_adapter(model, config, lambda layer: True)
        arrays = layer.adapter.get_arrays()
        keras_fvae.remove_adapter(model)
        return arrays

    magnitude = weights(keras_fvae.DoRAConfig(2))["magnitude"]
    assert_close(magnitude, np.sqrt(np.square(kernel).sum(axis=(0, 1, 2))))
    arrays = weights(keras_fvae.PiSSAConfig(2))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    assert_close(
        arrays["kernel_a"] @ arrays["kernel_b"], u[:, :2] * s[:2] @ vt[:2]
    )
    # B has orthonormal rows, the first two of the filters span them.
    kernel_b = weights(keras_fvae.OLoRAConfig(2))["kernel_b"]
    assert_close(kernel_b @ kernel_b.T, np.eye(2))


def test_dropout_is_on_the_input():
    config = keras_fvae.LoRAConfig(CHANNELS, dropout=0.5, seed=0)
    layer, x = make(1, 2, {}, use_bias=False)
    adapt(layer, x, config)
    # A that tells the two positions of a patch apart, and B that shows all.
    layer.kernel.assign(np.zeros(layer.kernel.shape))
    layer.adapter.kernel_b.assign(np.eye(CHANNELS, FILTERS))
    first, second = np.eye(CHANNELS), np.zeros((CHANNELS, CHANNELS))
    seen = []
    for kernel_a in ((first, second), (second, first)):
        layer.adapter.kernel_a.assign(np.concatenate(kernel_a))
        layer.adapter.seed_generator.state.assign([0, 0])
        seen.append(to_numpy(layer(x, training=True))[..., :CHANNELS])
    # What is dropped for one patch is dropped for the next one, too.
    np.testing.assert_array_equal(seen[0][:, 1:], seen[1][:, :-1])
    assert {*np.unique(np.round(seen[0] / x[:, :-1], 4))} == {0.0, 2.0}


# Whose mean squares are of all patches that count.
SEES_PATCHES = keras_fvae.OPLoRAConfig(2, mean_squares=True, seed=0)


@pytest.mark.parametrize("padding, zeros", [("same", 1), ("causal", 2)])
def test_patches_of_padding_count_for_nothing(padding, zeros, rng):
    tokens = rng.integers(1, 50, (3, 7))
    tokens[1, 2:] = 0
    found = []
    for length in (20, 4):
        keras.utils.set_random_seed(0)
        embedding = layers.Embedding(50, 4, mask_zero=True)
        layer = layers.Conv1D(5, 3, strides=2, padding=padding, name="layer")
        inputs = keras.Input((None,), dtype="int32")
        with pytest.warns(UserWarning, match="does not support masking"):
            # What the loss sees is before the padding.
            model = keras.Model(inputs, layer(embedding(inputs))[:, :2])
            model(np.ones((1, 3), "int32"))
        keras_fvae.enable_adapter(model, SEES_PATCHES, "layer")
        model.compile(keras.optimizers.SGD(1.0), "mse")
        padded = np.pad(tokens, [(0, 0), (0, length)])
        model.train_on_batch(padded, np.ones((3, 2, 5)))
        adapter = layer.adapter
        squares = [adapter.input_squares, adapter.output_squares]
        found.append(np.concatenate([to_numpy(each) for each in squares]))
    np.testing.assert_allclose(*found, rtol=1e-5)

    def patches(values):
        around = [(0, 0), (zeros, 2 - zeros), (0, 0)]
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(values, around), 3, axis=1
        )
        return windows[:, ::2].swapaxes(-1, -2).reshape(3, 6, -1)

    # One counts if any part of it does.
    counts = patches(padded[..., None] != 0).any(axis=-1)
    expected = patches(to_numpy(embedding(padded)))[counts] ** 2
    assert_close(-found[0][:12], expected.mean(axis=0))


@pytest.mark.one_backend
def test_images_of_any_size(rng):
    inputs = keras.Input((None, None, 2))
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="first")(inputs)
    x = layers.Conv2D(4, (1, 2), strides=3, padding="same", name="second")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(1, name="head")(x))
    keras_fvae.enable_adapter(model, SEES_PATCHES, ["first", "second"])
    model.compile("adam", "mse")
    for size in (7, 8):
        x = rng.normal(size=(4, size, size + 1, 2))
        loss = model.fit(x, np.ones((4, 1)), verbose=0).history["loss"]
        assert np.isfinite(loss)
        move_adapters(model, rng)
        assert_close(model.predict(x, verbose=0), to_numpy(model(x)))


def is_of_size_1(layer):
    return {*getattr(layer, "kernel_size", ())} == {1}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "targets, larger",
    [
        ("all-conv", "'stem'.*=(3, 3)"),
        ({"point": 2, "wide": 3}, "'wide'.*=(1, 2)"),
        (lambda layer: layer.name in ("point", "stem"), "'stem'.*=(3, 3)"),
        # Where nothing is chosen, what could be is listed.
        (None, "not fit 'stem'.*=(3, 3).*are: .'dense', 'head', 'point'.."),
    ],
)
def test_the_fvae_takes_none_that_is_larger_than_1(targets, larger):
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, name="stem")(inputs)
    x = layers.Conv2D(4, (1, 2), name="wide")(x)
    x = layers.Conv2D(4, 1, strides=2, name="point")(x)
    x = layers.Dense(4, name="dense")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    before = snapshot(model)
    for config in (FVAE, dataclasses.replace(FVAE, encoder_units=())):
        message = larger.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=message):
            keras_fvae.enable_adapter(model, config, targets)
        assert snapshot(model) == before
    keras_fvae.enable_adapter(model, FVAE, is_of_size_1)
    assert names_of(model) == {"point"}


@pytest.mark.one_backend
def test_the_fvae_beside_another_method_for_larger_ones():
    model = make_picture_model()
    keras_fvae.enable_adapter(model, FVAE, {"point": 2, "stem": LORA})
    assert names_of(model) == {"point", "stem"}


@pytest.mark.one_backend
@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_a_larger_layer_is_not_made_with_the_fvae(num_axes):
    cls = getattr(keras_fvae, f"AdaptedConv{num_axes}D")
    with pytest.raises(ValueError, match="'new'.*by FVAE-LoRA.*kernel_size="):
        cls(4, 2, FVAE, name="new")
    assert cls(4, 1, FVAE)(np.ones((1, *[3] * num_axes, 2))).shape[-1] == 4


class ConformanceTest(TestCase):
    """Keras's own test of a layer: build, serialize, train, mixed precision."""

    def test_convolutions(self):
        for num_axes, size, options in (CASES[1], CASES[6]):
            self.run_layer_test(
                getattr(keras_fvae, f"AdaptedConv{num_axes}D"),
                init_kwargs={
                    "filters": 5,
                    "kernel_size": size,
                    "config": LORA,
                    "activation": "relu",
                    "kernel_regularizer": "l2",
                    **options,
                },
                input_shape=(2, *[4] * num_axes, 4),
                expected_num_trainable_weights=2,
                expected_num_non_trainable_weights=2,
                expected_num_losses=2,
                supports_masking=False,
            )


@pytest.mark.one_backend
@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_configs_come_back(num_axes):
    cls = getattr(keras_fvae, f"AdaptedConv{num_axes}D")
    layer = cls(5, 2, LORA, strides=2, padding="same", use_bias=False)
    x = np.ones((2, *[4] * num_axes, 3))
    outputs = to_numpy(layer(x))
    copied = cls.from_config(layer.get_config())
    copied.build(x.shape)
    copied.set_weights(layer.get_weights())
    assert copied.config == LORA
    assert_close(to_numpy(copied(x)), outputs)
    with pytest.raises(ValueError, match="takes no LoRA of Keras's besides"):
        cls(5, 2, LORA, lora_rank=2)
    with pytest.raises(TypeError, match="must be the config"):
        cls(5, 2, "LoRA")
    with pytest.raises(ValueError, match="several groups.*groups=5"):
        cls(5, 2, LORA, groups=5).build((2, *[4] * num_axes, 5))


def make_picture_model():
    """All kinds of convolutions that there are, and a head of one."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, name="stem")(inputs)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(4, 1, groups=2, name="grouped")(x)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.Conv2DTranspose(4, 3, name="transposed")(x)
    x = layers.Conv2D(4, 1, name="point")(x)
    x = layers.Dense(4, name="dense")(x)
    return keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))


def names_of(model):
    return {layer.name for layer in lookup.adapted_layers(model)}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "targets, names",
    [
        ("all-conv", {"stem", "point"}),
        ("all-linear", {"dense"}),
        (re.compile("stem|depthwise"), {"stem"}),
        (lambda layer: getattr(layer, "kernel_size", None) == (1, 1), None),
        (["point", "dense"], {"point", "dense"}),
        ({"stem": 2, "dense": 3}, {"stem", "dense"}),
        (
            lambda layer: (
                isinstance(layer, layers.Conv2D) and layer.groups == 1
            ),
            {"stem", "point", "head"},
        ),
    ],
)
def test_targets(targets, names):
    model = make_picture_model()
    if names is None:
        before = snapshot(model)
        with pytest.raises(ValueError, match="several groups.*'grouped'"):
            keras_fvae.enable_adapter(model, LORA, targets)
        assert snapshot(model) == before
        return
    keras_fvae.enable_adapter(model, LORA, targets)
    assert names_of(model) == names


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "targets, message",
    [
        ("depthwise", "'depthwise'.*one channel each.*more weights would be"),
        (re.compile("separable"), "'separable'.*it has two kernels"),
        ("transposed", "'transposed'.*spreads each position of the input"),
        ("grouped", "several groups.*groups=2, for the layer 'grouped'"),
        (None, "no query or value projections.*target_layer_names='all-conv'"),
    ],
)
def test_others_are_refused_by_name(targets, message):
    model = make_picture_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        keras_fvae.enable_adapter(model, LORA, targets)
    assert snapshot(model) == before


class Standardized(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - ops.mean(kernel))


class Named(layers.Conv2D):
    """Computes the same."""


@pytest.mark.one_backend
def test_subclasses():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            Standardized(3, 1, name="other"),
            Named(3, 2, name="same"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    with pytest.raises(ValueError, match="matches no layer.*Standardized"):
        keras_fvae.enable_adapter(model, LORA, "other")
    keras_fvae.enable_adapter(model, LORA, "all-conv")
    assert names_of(model) == {"same"}


@pytest.mark.one_backend
def test_a_quantized_model_keeps_its_convolutions(rng):
    model = make_picture_model()
    with pytest.warns(UserWarning, match="Conv2D.*does not have a `quantize"):
        model.quantize("int8")
    x = rng.normal(size=(2, 8, 8, 4))
    before = to_numpy(model(x))
    keras_fvae.enable_adapter(model, LORA, "all-conv")
    assert_close(to_numpy(model(x)), before)
    move_adapters(model, rng)
    adapted = to_numpy(model(x))
    keras_fvae.merge_adapter(model)
    assert_close(to_numpy(model(x)), adapted, 1e-3)


def fit_digits(model, x, labels, epochs):
    """Trains a classifier; the loss on what it trained on, before and after."""
    model.compile(
        keras.optimizers.Adam(5e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def loss():
        return model.evaluate(x, labels, verbose=0, return_dict=True)["loss"]

    before = loss()
    model.fit(x, labels, epochs=epochs, batch_size=32, verbose=0)
    return before, loss()


def make_resnet():
    return keras_hub.models.ResNetImageClassifier(
        BACKBONES["ResNetBackbone"](), num_classes=10, preprocessor=None
    )


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "config, targets, num_layers",
    [
        (keras_fvae.LoRAConfig(4, seed=0), "all-conv", 10),
        (
            keras_fvae.FVAELoRAConfig(4, decoder_units=(16,), seed=0),
            is_of_size_1,
            3,
        ),
    ],
    ids=["LoRA", "FVAE-LoRA"],
)
def test_a_resnet_of_kerashub(config, targets, num_layers, tmp_path):
    data = load_digits()
    x = (data.images[:512, ..., None] / 16).repeat(3, axis=-1)
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    labels = data.target[:512]
    base = make_resnet()
    fit_digits(base, x, labels, epochs=4)
    # Black on white, from now on.
    x = 1 - x

    model = make_resnet()
    model.set_weights(base.get_weights())
    before = model.predict(x, verbose=0)
    summary = keras_fvae.enable_adapter(model, config, targets)
    assert len(summary.layer_paths) == num_layers
    assert_close(model.predict(x, verbose=0), before)
    loss_before, loss_after = fit_digits(model, x, labels, epochs=3)
    assert loss_after < 0.85 * loss_before
    adapted = model.predict(x, verbose=0)
    with keras_fvae.adapter_disabled(model):
        # To the bit, averages of `BatchNormalization` and all.
        np.testing.assert_array_equal(model.predict(x, verbose=0), before)

    keras_fvae.save_adapter(model, tmp_path / "digits.safetensors")
    keras_fvae.load_adapter(base, tmp_path / "digits.safetensors")
    assert_close(base.predict(x, verbose=0), adapted)
    model.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.ImageClassifier.from_preset(
        str(tmp_path / "preset"), preprocessor=None
    )
    assert_close(loaded.predict(x, verbose=0), adapted)
    keras_fvae.finalize_adapter(loaded)
    assert_close(loaded.predict(x, verbose=0), adapted)
    if config.method_name == "LoRA":
        keras_fvae.merge_adapter(model)
        assert_close(model.predict(x, verbose=0), adapted, 1e-4)


@pytest.mark.one_backend
def test_pefts_format_has_no_place_for_them(tmp_path):
    backbone = BACKBONES["ViTBackbone"]()
    backbone.enable_adapter(LORA, "all-conv")
    with pytest.raises(ValueError, match="'.*' is a convolution, and those"):
        keras_fvae.save_peft_adapter(backbone, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.one_backend
def test_a_new_head_of_a_convolution_is_told():
    model = make_picture_model()
    model.get_layer("stem").bias.assign(np.ones(4))
    with pytest.warns(UserWarning, match="'head'"):
        summary = keras_fvae.enable_adapter(model, LORA, "all-conv")
    assert "head" in summary.fresh
