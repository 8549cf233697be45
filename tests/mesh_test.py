"""Adapted backbones on a mesh of eight devices of JAX."""

import family
import jax
import keras
import keras_hub
import numpy as np
import pytest
from distributed.common import BACKBONES
from distributed.common import CONFIG
from distributed.common import enable
from distributed.common import fit
from distributed.common import make_backbone
from distributed.common import make_batch
from distributed.common import model_parallel
from helpers import snapshot
from helpers import to_numpy

import keras_fvae
from keras_fvae.backend import keras_internals
from keras_fvae.model.lookup import adapted_layers

# How the kernels of `query` and `value` lie, from which the rest follows.
INPUT_AND_OUTPUT_AXES = {
    "llama": ("model", "batch"),
    "gemma": ("batch", "model"),
}


def device_mesh():
    return keras.distribution.DeviceMesh((2, 4), ("batch", "model"))


def layout_map_of(name):
    return BACKBONES[name][0].get_layout_map(device_mesh())


DISTRIBUTIONS = {
    "data": lambda name: keras.distribution.DataParallel(),
    "model": lambda name: model_parallel(layout_map_of(name)),
}


def make_adapted(name, **options):
    backbone = make_backbone(name)
    enable(backbone, **options)
    return backbone


@pytest.fixture
def batch():
    return make_batch()


def loss_and_gradients(backbone, batch):
    """Of a step with noise and dropout, on the weights that train."""
    distribution = keras.distribution.distribution()
    variables = backbone.trainable_variables

    def place(array):
        if distribution is None:
            return array
        layout = distribution.get_data_layout(array.shape)
        return keras.distribution.distribute_tensor(array, layout)

    def loss(values, inputs, targets):
        state = zip(variables, values)
        with keras.StatelessScope(state, collect_losses=True):
            outputs = backbone(inputs, training=True)
            error = keras.ops.mean(keras.ops.square(outputs - targets))
            return error + sum(backbone.losses)

    values = [variable.value for variable in variables]
    placed = keras.tree.map_structure(place, batch)
    return jax.jit(jax.value_and_grad(loss))(values, *placed)


def specs(variables):
    """By path, the mesh axes over which each variable is sharded."""
    result = {}
    for variable in variables:
        spec = tuple(variable.value.sharding.spec)
        result[variable.path] = spec + (None,) * (
            len(variable.shape) - len(spec)
        )
    return result


def assert_close(values, expected):
    for value, expected_value in zip(values, expected, strict=True):
        scale = max(1.0, np.abs(expected_value).max())
        np.testing.assert_allclose(
            value / scale, expected_value / scale, atol=1e-5, rtol=0
        )


def assert_sharded_as_kernels(backbone, name):
    inputs, outputs = INPUT_AND_OUTPUT_AXES[name]
    for layer in adapted_layers(backbone):
        fvae = layer.adapter.fvae
        assert specs([layer.adapter.kernel_b, fvae.feature_weights]) == {
            layer.adapter.kernel_b.path: (None, outputs),
            fvae.feature_weights.path: (inputs, None),
        }
        rest = [fvae.latent_weights, fvae.coefficients.variable]
        for variable in [*rest, fvae.seed_generator.state]:
            assert len(variable.value.sharding.device_set) == 8
            assert variable.value.is_fully_replicated


def test_there_are_eight_devices():
    assert jax.device_count() == 8


# Of data alone, without shards of the weights, one is as good as another.
FIRST_BACKBONE = next(iter(BACKBONES))


@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param(
            name,
            kind,
            marks=[] if name == FIRST_BACKBONE else [pytest.mark.slow],
        )
        for name in BACKBONES
        for kind in DISTRIBUTIONS
    ],
)
def test_losses_and_gradients_of_one_device(name, kind, batch):
    backbone = make_adapted(name)
    expected = loss_and_gradients(backbone, batch)
    expected_losses = fit(backbone, batch)
    keras.utils.clear_session(free_memory=False)
    with DISTRIBUTIONS[kind](name).scope():
        backbone = make_adapted(name)
        value, gradients = loss_and_gradients(backbone, batch)
        losses = fit(backbone, batch)
    assert_close([value, *gradients], [expected[0], *expected[1]])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_sharding_of_every_variable(name, batch):
    with model_parallel(layout_map_of(name)).scope():
        backbone = make_adapted(name)
        assert_sharded_as_kernels(backbone, name)
        fit(backbone, batch)
    # A step must not gather what was spread.
    assert_sharded_as_kernels(backbone, name)


# How a kernel lies, and which of an adapter's axes lie so.
HEADS = {
    "query": ((None, "model", None), "output"),
    "output": (("model", None, None), "input"),
}
CHANNELS = {
    "one": ((None, None, "model"), "output"),
    "strided": ((None, None, "model", None), "input"),
}


# Whose weights and computation are of a kind of their own.
IN_SHORT = (
    "LoRA",
    "AdaLoRA",
    "BeamLoRA",
    "SRLoRA",
    "MoE-LoRA",
    "OPLoRA with mean squares",
)


@pytest.mark.parametrize(
    "name, make_model, kernels",
    [
        *[
            pytest.param(
                name,
                family.make_model,
                HEADS,
                marks=[] if name in IN_SHORT else [pytest.mark.slow],
            )
            for name in family.WITHOUT_NOISE
        ],
        ("DoRA with gradient", family.make_convolutions, CHANNELS),
        ("HiRA", family.make_convolutions, CHANNELS),
    ],
)
def test_every_method_computes_what_one_device_does(name, make_model, kernels):
    expected = family.train(family.adapt(make_model(), name))
    mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"))
    layout_map = keras.distribution.LayoutMap(mesh)
    for layer_name, (axes, _) in kernels.items():
        layout_map[f"{layer_name}/kernel"] = axes
    with model_parallel(layout_map).scope():
        model = family.adapt(make_model(), name)
        losses = family.train(model)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for layer_name, (_, axis) in kernels.items():
        adapter = model.get_layer(layer_name).adapter
        for weight in adapter.weights:
            assert tuple(weight.value.sharding.spec) == tuple(
                "model" if a == axis else None
                for a in adapter.weight_axes[weight.name]
            ), weight.path


def test_adalora_scores_what_lies_on_several_devices():
    def train(model):
        model.compile(keras.optimizers.Adam(0.02), "mse")
        model.fit(
            family.X,
            np.ones((8, 3)),
            batch_size=4,
            epochs=8,
            shuffle=False,
            callbacks=[keras_fvae.AdaLoRAAllocator()],
            verbose=0,
        )
        return [
            to_numpy(layer.adapter.singular_values)
            for layer in adapted_layers(model)
        ]

    expected = train(family.adapt(family.make_model(), "AdaLoRA"))
    mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"))
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["query/kernel"] = (None, "model", None)
    with model_parallel(layout_map).scope():
        found = train(family.adapt(family.make_model(), "AdaLoRA"))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert np.count_nonzero(expected) == 3


def test_slots_of_the_optimizer_lie_as_the_weights_do():
    with model_parallel(layout_map_of("llama")).scope():
        backbone = make_adapted("llama")
        optimizer = keras.optimizers.Adam()
        optimizer.build(backbone.trainable_weights)
    found = {
        (tuple(v.shape), v.value.sharding.spec)
        for v in optimizer.variables
        if v.path.endswith("feature_weights_momentum")
    }
    fvae = adapted_layers(backbone)[0].adapter.fvae
    assert found == {
        (
            tuple(fvae.feature_weights.shape),
            fvae.feature_weights.value.sharding.spec,
        )
    }


@pytest.mark.parametrize(
    "method, make_optimizer",
    [
        ("LoRA", keras_fvae.optimizers.RiemannianPreconditioning),
        ("LoRA", lambda other: keras_fvae.optimizers.LoRARITE(0.05, other)),
        pytest.param(
            "OPLoRA",
            lambda other: keras_fvae.optimizers.OPLoRA(
                0.05, other, momentum=0.5
            ),
            marks=pytest.mark.slow,
        ),
        (
            "OPLoRA with mean squares",
            lambda other: keras_fvae.optimizers.OPLoRA(0.5, other, scaled=True),
        ),
    ],
)
def test_optimizers_of_pairs(method, make_optimizer):
    def train():
        model = family.adapt(family.make_model(), method)
        optimizer = make_optimizer(keras.optimizers.Adam(0.05))
        return family.train(model, optimizer=optimizer)

    expected = train()
    mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"))
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["query/kernel"] = (None, "model", None)
    layout_map["output/kernel"] = ("model", None, None)
    with model_parallel(layout_map).scope():
        losses = train()
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "is_set", ["before building", "before enabling", "before training"]
)
def test_when_the_distribution_is_set(is_set, kind, batch):
    expected = fit(make_adapted("llama"), batch)
    keras.utils.clear_session(free_memory=False)
    distribution = DISTRIBUTIONS[kind]("llama")
    try:
        if is_set == "before building":
            keras.distribution.set_distribution(distribution)
        backbone = make_backbone("llama")
        if is_set == "before enabling":
            keras.distribution.set_distribution(distribution)
        enable(backbone)
        keras.distribution.set_distribution(distribution)
        losses = fit(backbone, batch)
    finally:
        keras.distribution.set_distribution(None)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    kernel = adapted_layers(backbone)[0].kernel
    if kind == "model":
        assert_sharded_as_kernels(backbone, "llama")
        assert specs([kernel])[kernel.path] == ("model", "batch", None)
    else:
        assert len(kernel.value.sharding.device_set) == 8


def test_enabled_outside_the_scope_in_which_the_model_was_built():
    with model_parallel(layout_map_of("llama")).scope():
        backbone = make_backbone("llama")
    enable(backbone)
    assert_sharded_as_kernels(backbone, "llama")


def test_a_task_with_the_distribution_set_last():
    model = keras_hub.models.LlamaCausalLM(backbone=make_backbone("llama"))
    enable(model.backbone)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    x = {
        "token_ids": np.ones((8, 12), "int32"),
        "padding_mask": np.ones((8, 12), "int32"),
    }
    with model_parallel(layout_map_of("llama")).scope():
        model.fit(x, x["token_ids"], verbose=0)
    assert_sharded_as_kernels(model.backbone, "llama")


def test_files_go_from_one_device_to_a_mesh_and_back(batch, tmp_path):
    path = tmp_path / "task.safetensors"
    backbone = make_adapted("llama")
    backbone.save_adapter(path)
    expected = backbone.predict(batch[0], verbose=0)
    keras.utils.clear_session(free_memory=False)
    with model_parallel(layout_map_of("llama")).scope():
        plain = make_backbone("llama")
        plain.load_adapter(path)
        adapted = make_adapted("llama")
        adapted.load_adapter(path)
        for loaded in (plain, adapted):
            assert_sharded_as_kernels(loaded, "llama")
            assert_close([loaded.predict(batch[0], verbose=0)], [expected])
        plain.save_adapter(path)
    keras.utils.clear_session(free_memory=False)
    backbone = make_backbone("llama")
    backbone.load_adapter(path)
    assert_close([backbone.predict(batch[0], verbose=0)], [expected])


def test_whole_models_and_what_is_made_for_use(batch, tmp_path):
    path = tmp_path / "model.keras"
    with model_parallel(layout_map_of("llama")).scope():
        backbone = make_adapted("llama", encoder_units=())
        backbone.save(path)
        expected = backbone.predict(batch[0], verbose=0)
        loaded = keras.saving.load_model(path)
        assert_sharded_as_kernels(loaded, "llama")
        assert_close([loaded.predict(batch[0], verbose=0)], [expected])
        keras_fvae.finalize_adapter(backbone)
        inputs, outputs = INPUT_AND_OUTPUT_AXES["llama"]
        adapter = adapted_layers(backbone)[0].adapter
        found = specs([adapter.kernel_b, adapter.fvae.feature_weights])
        assert [*found.values()] == [(None, outputs), (inputs, None)]
        assert_close([backbone.predict(batch[0], verbose=0)], [expected])
    # Its biases are new; outside the scope Keras would put them elsewhere.
    keras_fvae.merge_adapter(loaded)
    for variable in loaded.variables:
        assert len(variable.value.sharding.device_set) == 8
    with model_parallel(layout_map_of("llama")).scope():
        assert_close([loaded.predict(batch[0], verbose=0)], [expected])


def test_layers_of_a_users_own_model(config):
    layout_map = keras.distribution.LayoutMap(device_mesh())
    # As people write them; it matches what is inside the layer, too.
    layout_map[".*encode.*"] = ("batch", "model")
    with model_parallel(layout_map).scope():
        layer = keras_fvae.FVAELoRADense(
            8, use_bias=False, name="encode", config=config
        )
        model = keras.Sequential([layer, keras.layers.Dense(3)])
        model.compile("adam", "mse")
        # Built by the first batch.
        x = np.ones((8, 4), "float32")
        model.fit(x, np.ones((8, 3)), verbose=0)
    adapter = layer.adapter
    found = specs([adapter.kernel_b, adapter.fvae.feature_weights])
    assert [*found.values()] == [(None, "model"), ("batch", None)]


def test_the_extended_layout_map_tells_and_is_told():
    base = layout_map_of("llama")
    patterns = [*base]
    layout_map = keras_fvae.adapter_layout_map(base)
    layout_map[".*value/adapter/kernel_b"] = (None, "model")
    with model_parallel(layout_map).scope():
        backbone = make_adapted("llama")
    assert [*base] == patterns
    query, value = adapted_layers(backbone)
    for layer, axes in ((query, (None, "batch")), (value, (None, "model"))):
        kernel_b = layer.adapter.kernel_b
        assert specs([kernel_b])[kernel_b.path] == axes
        # Which is what the map says.
        assert layout_map[kernel_b.path].axes == axes
        features = layer.adapter.fvae.feature_weights
        assert layout_map[features.path].axes == ("model", None)
    assert layout_map["token_embedding/embeddings"].axes == ("model", "batch")


def test_a_rank_that_cannot_be_sharded_is_replicated():
    for rank, axis in ((3, None), (8, "model")):
        keras.utils.clear_session(free_memory=False)
        layout_map = layout_map_of("llama")
        layout_map[".*query/adapter/kernel_b"] = ("model", "batch")
        with model_parallel(layout_map).scope():
            backbone = make_adapted("llama", rank=rank)
        kernel_b = adapted_layers(backbone)[0].adapter.kernel_b
        assert specs([kernel_b])[kernel_b.path] == (axis, "batch")


def test_a_mesh_that_does_not_divide_a_variable():
    layout_map = layout_map_of("llama")
    layout_map[".*adapter/fvae/feature_weights"] = (None, "model")
    with model_parallel(layout_map).scope():
        backbone = make_backbone("llama")
        before = snapshot(backbone)
        with pytest.raises(ValueError) as raised:
            enable(backbone, decoder_units=(7,))
        assert snapshot(backbone) == before
    message = str(raised.value)
    assert "'transformer_layer_0/self_attention/query/adapter/fvae/" in message
    assert "(None, 'model')" in message
    # What Keras says, from JAX, whose words depend on its version.
    assert "evenly divide" in message or "divisible by" in message


def test_a_layout_that_does_not_fit_leaves_a_variable_as_it_was():
    variable = keras.Variable(np.arange(6.0))
    layout = keras.distribution.TensorLayout(("model",), device_mesh())
    with pytest.raises(ValueError):
        keras_internals.set_layout(variable, layout)
    assert keras_internals.layout_of(variable) is None
    variable = keras.Variable(np.arange(8.0))
    keras_internals.set_layout(variable, layout)
    assert [*specs([variable]).values()] == [("model",)]
    assert to_numpy(variable).tolist() == [*range(8)]


def test_a_mesh_that_does_not_divide_a_variable_of_the_base(batch):
    backbone = make_adapted("llama")
    layout_map = keras.distribution.LayoutMap(
        keras.distribution.DeviceMesh((1, 8), ("batch", "model"))
    )
    # Four heads.
    layout_map[".*value.kernel"] = (None, "model", None)
    backbone.compile("adam", "mse")
    with (
        model_parallel(layout_map).scope(),
        pytest.raises(ValueError, match="value/kernel' of shape"),
    ):
        backbone.fit(*batch, verbose=0)


def test_what_is_no_layout_map():
    with pytest.raises(TypeError, match="must be a `keras.distribution.Layout"):
        keras_fvae.adapter_layout_map({".*kernel": (None, "model")})


@pytest.mark.slow
def test_monitor_and_latents(batch):
    inputs, targets = batch
    results = []
    for distribution in (None, model_parallel(layout_map_of("gemma"))):
        keras.utils.clear_session(free_memory=False)
        keras.distribution.set_distribution(distribution)
        try:
            backbone = make_adapted("gemma")
            backbone.compile(keras.optimizers.Adam(1e-2), "mse")
            history = backbone.fit(
                inputs,
                targets,
                batch_size=8,
                epochs=2,
                verbose=0,
                callbacks=[keras_fvae.FVAELoRAMonitor()],
            ).history
            latents = keras_fvae.latents(backbone, inputs)
        finally:
            keras.distribution.set_distribution(None)
        results.append((history, latents))
    (history, latents), (other_history, other_latents) = results
    for name, values in history.items():
        np.testing.assert_allclose(values, other_history[name], rtol=1e-3)
    assert [*latents] == [*other_latents]


@pytest.mark.parametrize("name", BACKBONES)
def test_memory_as_the_shards_take_it(name):
    distribution = model_parallel(layout_map_of(name))
    memory = keras_fvae.memory_per_device(
        lambda: make_backbone_adapted(name), distribution
    )
    with distribution.scope():
        backbone = make_backbone_adapted(name)

    def bytes_on_first_device(weights):
        return sum(w.value.addressable_shards[0].data.nbytes for w in weights)

    frozen = bytes_on_first_device(backbone.non_trainable_weights)
    trained = bytes_on_first_device(backbone.trainable_weights)
    assert memory.frozen_weights == frozen
    assert memory.trainable_weights == trained


def make_backbone_adapted(name):
    backbone = make_backbone(name)
    backbone.enable_fvae_lora(**CONFIG)
    return backbone
