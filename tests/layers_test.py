import re

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import dtype_of
from helpers import move_adapters
from helpers import to_numpy
from helpers import value_and_gradients
from keras import ops
from keras.src.testing import TestCase

import keras_fvae
from keras_fvae.methods.fvae.layout import reference_views

EQUATIONS = [
    # equation, output_shape, bias_axes, input_shape
    ("ab,bc->ac", 5, "c", (3, 4)),
    ("abc,cde->abde", (None, 2, 3), "de", (2, 4, 6)),
    ("bqm,muh->bquh", (None, 2, 3), "uh", (2, 4, 6)),
    ("btd,ndh->btnh", (None, 2, 3), "h", (2, 4, 6)),
    ("btnh,nhd->btd", (None, 6), "d", (2, 3, 2, 4)),
    ("...x,xy->...y", 5, "y", (2, 3, 4)),
    ("ab...,bc->ac...", 5, "c", (2, 3, 4)),
]


class ConformanceTest(TestCase):
    """Keras's own test of a layer: build, serialize, train, mixed precision."""

    def test_dense(self):
        self.run_layer_test(
            keras_fvae.FVAELoRADense,
            init_kwargs={
                "units": 5,
                "rank": 3,
                "activation": "relu",
                "kernel_regularizer": "l2",
                "bias_regularizer": "l2",
                "activity_regularizer": "l2",
                "bias_constraint": "non_neg",
                "kernel_constraint": "non_neg",
            },
            input_shape=(2, 4, 7),
            expected_output_shape=(2, 4, 5),
            # B and the FVAE's two; the frozen kernel and bias.
            expected_num_trainable_weights=3,
            expected_num_non_trainable_weights=2,
            expected_num_seed_generators=1,
            # The regularizers of B and of the output: no loss at inference.
            expected_num_losses=2,
            supports_masking=True,
        )

    def test_einsum_dense(self):
        for equation, output_shape, bias_axes, input_shape in EQUATIONS:
            with self.subTest(equation):
                self.run_layer_test(
                    keras_fvae.FVAELoRAEinsumDense,
                    init_kwargs={
                        "equation": equation,
                        "output_shape": output_shape,
                        "bias_axes": bias_axes,
                        "rank": 3,
                    },
                    input_shape=input_shape,
                    expected_num_trainable_weights=3,
                    expected_num_non_trainable_weights=2,
                )


def move(layer, rng):
    """Moves the adapter's weights, so that the update is not zero."""
    for weight in layer.adapter.weights:
        noise = rng.normal(scale=0.3, size=weight.shape)
        weight.assign(to_numpy(weight) + noise)


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "equation, output_shape, bias_axes, input_shape", EQUATIONS
)
def test_the_update_comes_before_the_activation(
    equation, output_shape, bias_axes, input_shape, rng
):
    # With a linear encoder the update is that of a second kernel, and what
    # the layer computes can be told by NumPy.
    layer = keras_fvae.FVAELoRAEinsumDense(
        equation,
        output_shape,
        config=keras_fvae.FVAELoRAConfig(
            rank=3, alpha=6, encoder_units=(), decoder_units=(4,)
        ),
        bias_axes=bias_axes,
        activation="tanh",
    )
    x = rng.normal(size=input_shape).astype("float32")
    layer.build(x.shape)
    layer.bias.assign(rng.normal(size=layer.bias.shape))
    base = np.einsum(equation, x, to_numpy(layer.kernel)) + to_numpy(layer.bias)
    np.testing.assert_allclose(
        to_numpy(layer(x)), np.tanh(base), rtol=1e-4, atol=1e-5
    )

    move(layer, rng)
    prefix = "views_conditionalGaussianEncoders_list.0.mean"
    weights = layer.adapter.fvae.get_reference_weights()
    to_z1 = weights[f"{prefix}.weight"].T
    kernel_b = to_numpy(layer.adapter.kernel_b)
    # Both in the kernel's shape: the contracted axes, then the carried ones.
    inputs, kernel = equation.split("->")[0].split(",")
    outputs = equation.split("->")[1]
    sizes = dict(zip(kernel, layer.kernel.shape))
    contracted = "".join(c for c in kernel if c in inputs)
    carried = "".join(c for c in outputs if c in kernel)
    second_kernel = (2 * to_z1 @ kernel_b).reshape(
        [sizes[c] for c in contracted + carried]
    )
    second_kernel = np.einsum(f"{contracted}{carried}->{kernel}", second_kernel)
    bias = (2 * weights[f"{prefix}.bias"] @ kernel_b).reshape(
        [sizes[c] for c in carried]
    )
    tokens = np.einsum(equation, np.ones_like(x), np.zeros_like(second_kernel))
    letters = outputs.replace("...", "EFG"[: tokens.ndim - len(outputs) + 3])
    update = np.einsum(equation, x, second_kernel) + np.einsum(
        f"{letters},{carried}->{letters}", tokens + 1, bias
    )
    assert np.abs(update).max() > 0.1
    np.testing.assert_allclose(
        to_numpy(layer(x)), np.tanh(base + update), rtol=1e-4, atol=1e-4
    )


def test_dense_is_the_einsum_of_the_last_axis(config, rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    dense = keras_fvae.FVAELoRADense(5, config=config, activation="relu")
    einsum = keras_fvae.FVAELoRAEinsumDense(
        "...x,xy->...y", 5, config=config, bias_axes="y", activation="relu"
    )
    dense(x), einsum(x)
    move(dense, rng)
    einsum.set_weights(dense.get_weights())
    np.testing.assert_allclose(
        to_numpy(dense(x)), to_numpy(einsum(x)), rtol=1e-5, atol=1e-6
    )


def test_alpha_scales_the_update(rng):
    x = rng.normal(size=(2, 4)).astype("float32")
    layers = [
        keras_fvae.FVAELoRADense(
            5,
            config=keras_fvae.FVAELoRAConfig(
                rank=4, alpha=alpha, decoder_units=(4,), seed=1
            ),
            kernel_initializer="zeros",
        )
        for alpha in (4, 2)
    ]
    outputs = []
    for layer in layers:
        layer.build(x.shape)
        move(layer, np.random.default_rng(0))
        outputs.append(to_numpy(layer(x)))
    np.testing.assert_allclose(outputs[1], outputs[0] / 2, rtol=1e-5)


def test_training_draws_z1_and_adds_the_weighted_loss(config, rng):
    layer = keras_fvae.FVAELoRADense(5, config=config)
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer.build(x.shape)
    move(layer, rng)
    quiet = layer(x)
    assert layer.losses == []
    first, second = layer(x, training=True), layer(x, training=True)
    assert len(layer.losses) == 1
    assert not np.allclose(to_numpy(first), to_numpy(second))
    assert not np.allclose(to_numpy(first), to_numpy(quiet))
    # With hardly any variance, the draws are the means, and so is the loss.
    fvae = layer.adapter.fvae
    weights = fvae.get_reference_weights()
    for index in (0, 1):
        name = f"views_conditionalGaussianEncoders_list.{index}.logvar.bias"
        weights[name] = np.full_like(weights[name], -40.0)
    fvae.set_reference_weights(weights)
    np.testing.assert_allclose(
        to_numpy(layer(x, training=True)), to_numpy(layer(x)), atol=1e-3
    )
    layer(x, training=True)
    np.testing.assert_allclose(
        to_numpy(layer.losses[0]),
        config.elbo_weight * to_numpy(fvae(x).loss),
        rtol=1e-3,
    )


def test_several_draws_move_the_update_by_their_mean(rng):
    config = keras_fvae.FVAELoRAConfig(
        rank=4, decoder_units=(4,), num_samples=2000, dropout=0.0
    )
    layer = keras_fvae.FVAELoRADense(5, config=config)
    x = rng.normal(size=(1, 4)).astype("float32")
    layer.build(x.shape)
    move(layer, rng)
    np.testing.assert_allclose(
        to_numpy(layer(x, training=True)), to_numpy(layer(x)), atol=0.2
    )


def test_sampling_at_inference(rng):
    config = keras_fvae.FVAELoRAConfig(rank=4, sample_at_inference=True)
    layer = keras_fvae.FVAELoRADense(5, config=config)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert not np.allclose(to_numpy(layer(x)), to_numpy(layer(x)))
    assert layer.losses == []


@pytest.mark.skipif(BACKEND != "torch", reason="Of PyTorch's compiler")
def test_torch_compile_traces_a_layer_as_one_graph(config, rng):
    import torch

    layer = keras_fvae.FVAELoRADense(5, config=config)
    x = torch.tensor(rng.normal(size=(2, 3, 4)).astype("float32"))
    layer.build(x.shape)
    move(layer, rng)

    def step(x):
        return layer(x, training=True)

    # Raises where it cannot.
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for call in (compiled, step):
        layer.adapter.fvae.seed_generator.state.assign([3, 0])
        outputs = call(x)
        (gradient,) = torch.autograd.grad(
            outputs.sum() + sum(layer.losses), [layer.adapter.kernel_b.value]
        )
        results.append([outputs, layer.losses[0], gradient])
    for one, other in zip(*results):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="Of PyTorch's compiler")
@pytest.mark.parametrize(
    "config, activation",
    [
        (keras_fvae.FVAELoRAConfig(rank=2), None),
        (keras_fvae.FVAELoRAConfig(rank=2), "relu"),
        (keras_fvae.LoRAConfig(rank=2), None),
        (keras_fvae.LoRAConfig(rank=2), "relu"),
    ],
)
def test_torch_compiles_and_exports_many_layers(config, activation, rng):
    import torch

    inputs = keras.Input((8,))
    x = inputs
    # PyTorch gives up a function that it has compiled eight times.
    for index in range(9):
        name = f"query_{index}"
        x = x + keras.layers.Dense(8, activation=activation, name=name)(x)
    model = keras.Model(inputs, x)
    keras_fvae.enable_adapter(model, config, re.compile("query_"))
    move_adapters(model, rng)
    x = torch.tensor(rng.normal(size=(3, 8)).astype("float32"))
    expected = to_numpy(model(x))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = torch.compile(model, backend="eager")
        compiled(x, training=True).sum().backward()
        with torch.no_grad():
            np.testing.assert_array_equal(to_numpy(compiled(x)), expected)
    exported = torch.export.export(model, (x,), strict=True).module()
    np.testing.assert_array_equal(to_numpy(exported(x)), expected)


def test_only_the_adapter_trains(config, rng):
    layer = keras_fvae.FVAELoRADense(5, config=config)
    layer.build((None, 4))
    names = {weight.path for weight in layer.trainable_weights}
    assert names == {
        f"{layer.name}/adapter/kernel_b",
        f"{layer.name}/adapter/fvae/feature_weights",
        f"{layer.name}/adapter/fvae/latent_weights",
    }
    # Whatever a user or a task does to the flag, the base stays frozen.
    layer.trainable = False
    assert layer.trainable_weights == []
    layer.trainable = True
    assert {weight.path for weight in layer.trainable_weights} == names
    assert not layer.kernel.trainable
    assert not layer.bias.trainable


def test_every_adapter_weight_gets_a_gradient(config, rng):
    layer = keras_fvae.FVAELoRADense(5, config=config)
    x = rng.normal(size=(2, 50, 4)).astype("float32")
    layer.build(x.shape)
    move(layer, rng)

    def loss(x):
        outputs = layer(x, training=True)
        return ops.sum(ops.square(outputs)) + sum(layer.losses)

    fvae = layer.adapter.fvae
    _, (kernel_b, *packed), _ = value_and_gradients(
        loss,
        [layer.adapter.kernel_b, fvae.feature_weights, fvae.latent_weights],
        [x],
    )
    gradients = {
        "kernel_b": kernel_b,
        **reference_views(fvae.config, fvae.networks.unpack(*packed)),
    }
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 0, name


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "dtype", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float16"]
)
@pytest.mark.parametrize("training", [False, True])
def test_dtype_policies(dtype, training, config, rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = keras_fvae.FVAELoRADense(5, config=config, dtype=dtype)
    outputs = layer(x, training=training)
    assert dtype_of(outputs) == dtype.removeprefix("mixed_")
    assert [dtype_of(loss) for loss in layer.losses] == ["float32"] * training
    assert {w.dtype for w in layer.adapter.weights} == {"float32"}
    full = keras_fvae.FVAELoRADense(5, config=config)
    full.build(x.shape)
    full.set_weights([w.astype("float32") for w in layer.get_weights()])
    np.testing.assert_allclose(
        to_numpy(ops.cast(layer(x), "float32")),
        to_numpy(full(x)),
        atol=0.05,
    )


@pytest.mark.parametrize(
    "cls, arguments",
    [
        (keras_fvae.FVAELoRADense, (5,)),
        (keras_fvae.FVAELoRAEinsumDense, ("ab,bc->ac", 5)),
    ],
)
class TestArguments:
    def test_lora_is_refused(self, cls, arguments):
        with pytest.raises(ValueError, match="takes no LoRA"):
            cls(*arguments, lora_rank=4)

    def test_enabling_lora_is_refused(self, cls, arguments):
        layer = cls(*arguments, rank=2)
        layer.build((None, 4))
        with pytest.raises(ValueError, match="remove_adapter"):
            layer.enable_lora(4)

    @pytest.mark.parametrize("rank", [0, -1, 1.5, "16", None])
    def test_rank(self, cls, arguments, rank):
        with pytest.raises(ValueError, match="`rank` must be"):
            cls(*arguments, rank=rank)

    def test_config_and_rank(self, cls, arguments):
        config = keras_fvae.FVAELoRAConfig(rank=4)
        assert cls(*arguments, config=config).config.rank == 4
        with pytest.raises(ValueError, match="`rank` must be that of `config`"):
            cls(*arguments, rank=8, config=config)

    def test_positional_rank(self, cls, arguments):
        assert cls(*arguments, 8).config.rank == 8


def test_an_equation_that_cannot_be_adapted_is_refused():
    layer = keras_fvae.FVAELoRAEinsumDense("ebd,edf->ebf", (None, 4), rank=2)
    with pytest.raises(ValueError, match="No adapter fits the einsum equation"):
        layer.build((2, 3, 4))


def test_in_a_functional_model(config, rng):
    inputs = keras.Input((None, 4))
    outputs = keras_fvae.FVAELoRADense(5, config=config)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x, y = rng.normal(size=(8, 3, 4)), rng.normal(size=(8, 3, 5))
    history = model.fit(x, y, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
