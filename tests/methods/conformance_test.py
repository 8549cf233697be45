"""What must hold for every method, and holds for a new one for nothing."""

import collections
import contextlib
import copy
import pickle

import keras
import keras_hub
import numpy as np
import pytest
from family import CONFIGS
from family import KINDS
from family import ON_CONVOLUTIONS
from family import WITHOUT_NOISE
from family import X
from family import Y
from family import adapt
from family import frozen_bytes
from family import is_target
from family import make_model
from family import predict
from family import train
from helpers import move_adapters
from helpers import snapshot
from helpers import text_inputs
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.config import config_from_description
from keras_fvae.layers.config import describe_config
from keras_fvae.model import lookup

# Those whose update is no linear function of x, and what the refusal names.
DO_NOT_MERGE = {"FVAE-LoRA": "encoder_units", "MoE-LoRA": "router"}


def once(name, *values):
    """Those of each kind on each backend in the long run, others on one."""
    mark = "one_backend" if name in KINDS else "always_one_backend"
    return pytest.param(name, *values, marks=getattr(pytest.mark, mark))


on_all_once = pytest.mark.parametrize("name", [once(name) for name in CONFIGS])
on_all_models = pytest.mark.parametrize(
    "name, make_model",
    [
        *[(name, make_model) for name in CONFIGS],
        *[once(*pair) for pair in ON_CONVOLUTIONS.items()],
    ],
)
on_all_models_once = pytest.mark.parametrize(
    "name, make_model",
    [
        *[once(name, make_model) for name in CONFIGS],
        *[once(*pair) for pair in ON_CONVOLUTIONS.items()],
    ],
)


def assert_same(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, atol=atol)


def trained(name, make_model=make_model):
    """A model whose adapters are far from where they start."""
    model = adapt(make_model(), name)
    move_adapters(model, np.random.default_rng(1), scale=0.2)
    return model


@pytest.mark.shared_out
@on_all_models
def test_it_starts_as_the_base_model(name, make_model):
    model = make_model()
    before = predict(model)
    adapt(model, name)
    assert_same(predict(model), before, 2e-6)


# It is PyTorch's compiler.
@pytest.mark.always_one_backend
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_torch_traces_a_layer_as_one_graph(name, rng):
    import torch

    layer = keras_fvae.AdaptedDense(6, CONFIGS[name], activation="tanh")
    x = torch.tensor(rng.normal(size=(2, 3, 6)).astype("float32"))
    layer.build(x.shape)
    # Raises where it cannot.
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_same(to_numpy(compiled(x)), to_numpy(layer(x)))
    assert compiled(x, training=True).shape == x.shape


@pytest.mark.always_one_backend
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_within_torch_autocast(name):
    import torch

    model = adapt(make_model(), name)
    losses = []
    for is_within in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_within):
            outputs = model(ops.convert_to_tensor(X), training=True)
            loss = outputs.square().mean() + sum(model.losses)
        loss.backward()
        losses.append(float(loss))
    gradients = [w.value.grad for w in model.trainable_weights]
    assert all(ops.isfinite(ops.sum(gradient)) for gradient in gradients)
    # With other noise.
    assert losses[1] == pytest.approx(losses[0], rel=0.5)


# Of the others, each step is one program.
@pytest.mark.always_one_backend
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_does_not_wait_for_a_gpu(name, monkeypatch):
    """Nothing goes to or comes from the device, but by the frozen model."""
    frozen = make_model()
    frozen.trainable = False
    x = ops.convert_to_tensor(X)

    def count(model):
        def step():
            loss = ops.sum(model(x, training=True)) + sum(model.losses)
            if loss.requires_grad:
                loss.backward()

        step()
        with counting_round_trips(monkeypatch) as counts:
            step()
        return counts

    assert count(adapt(make_model(), name)) == count(frozen)


@pytest.mark.always_one_backend
@pytest.mark.parametrize(
    "name, callback",
    [
        ("LoRA", None),
        ("AdaLoRA", keras_fvae.AdaLoRAAllocator),
        ("BeamLoRA", keras_fvae.BeamLoRAPruner),
        ("Flat-LoRA", keras_fvae.FlatLoRASchedule),
        ("FVAE-LoRA", keras_fvae.FVAELoRAMonitor),
    ],
)
def test_a_callback_does_not_wait_for_a_gpu_at_each_layer(
    name, callback, monkeypatch
):
    def count(*targets):
        model = make_model()
        keras_fvae.enable_adapter(model, CONFIGS[name], targets)
        model.compile("adam", "sparse_categorical_crossentropy")
        counts = []
        with contextlib.ExitStack() as stack:

            def begin(batch, logs):
                if batch == 4:
                    counting = counting_round_trips(monkeypatch)
                    counts.append(stack.enter_context(counting))

            def end(batch, logs):
                stack.close()

            around = keras.callbacks.LambdaCallback(
                on_train_batch_begin=begin, on_train_batch_end=end
            )
            others = [] if callback is None else [callback()]
            model.fit(
                X, Y, batch_size=1, verbose=0, callbacks=[*others, around]
            )
        return counts

    assert count("query") == count("query", "output", "up")


@contextlib.contextmanager
def counting_round_trips(monkeypatch):
    """Counts in a dict what asks a device for numbers, or gives it some."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.overloadpacket.__name__
            if name in ("lift_fresh", "_local_scalar_dense"):
                counts[name] += 1
            return operation(*args, **(kwargs or {}))

    def tolist(tensor):
        counts["tolist"] += 1
        return original(tensor)

    original = torch.Tensor.tolist
    with Count(), monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", tolist)
        yield counts


@pytest.mark.shared_out
@on_all_models
def test_only_the_adapter_and_what_is_chosen_train(name, make_model):
    model = make_model()
    frozen = frozen_bytes(model)
    adapt(model, name)
    adapters = [layer.adapter for layer in lookup.adapted_layers(model)]
    weights = [w for adapter in adapters for w in adapter.trainable_weights]
    assert weights and all(
        any(w is t for t in model.trainable_weights) for w in weights
    )
    values = [to_numpy(weight) for weight in weights]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # In training there may be noise in it.
    before = loss(Y, predict(model))
    model.compile(keras.optimizers.Adam(0.05), loss)
    model.fit(X, Y, batch_size=4, epochs=8, verbose=0)
    assert loss(Y, predict(model)) < before
    assert frozen_bytes(model) == frozen
    for weight, value in zip(weights, values):
        assert np.abs(to_numpy(weight) - value).max() > 1e-3, weight.path


@on_all_models_once
def test_a_file_brings_it_back(name, make_model, tmp_path):
    model = trained(name, make_model)
    keras_fvae.save_adapter(model, tmp_path / "a.safetensors")
    loaded = make_model()
    keras_fvae.load_adapter(loaded, tmp_path / "a.safetensors")
    assert_same(predict(loaded), predict(model))
    assert [w.path for w in loaded.trainable_weights] == [
        w.path for w in model.trainable_weights
    ]
    for layer in lookup.adapted_layers(loaded):
        assert type(layer.config) is type(CONFIGS[name])
    # It trains on, from there.
    assert train(loaded) == pytest.approx(train(model), rel=1e-4)


@on_all_models_once
def test_a_file_with_what_inference_needs(name, make_model, tmp_path):
    model = trained(name, make_model)
    path = tmp_path / "a.safetensors"
    keras_fvae.save_adapter(model, path, include="inference")
    loaded = make_model()
    keras_fvae.load_adapter(loaded, path)
    assert_same(predict(loaded), predict(model))
    with pytest.raises(ValueError, match="finalized"):
        train(loaded)


@on_all_models_once
@pytest.mark.parametrize("copy_model", [copy.deepcopy, pickle, "keras"])
def test_copies_of_the_model(name, make_model, copy_model, tmp_path):
    model = trained(name, make_model)
    if copy_model == "keras":
        model.save(tmp_path / "model.keras")
        found = keras.saving.load_model(tmp_path / "model.keras")
    elif copy_model is pickle:
        found = pickle.loads(pickle.dumps(model))
    else:
        found = copy_model(model)
    assert_same(predict(found), predict(model))
    assert [weight.path for weight in found.trainable_weights] == [
        weight.path for weight in model.trainable_weights
    ]
    keras_fvae.remove_adapter(found)
    plain = with_head_of(make_model(), model)
    assert_same(predict(found), predict(plain))
    trainable = [weight.path for weight in found.trainable_weights]
    assert trainable == [weight.path for weight in plain.trainable_weights]


def with_head_of(plain, model):
    plain.get_layer("head").set_weights(model.get_layer("head").get_weights())
    return plain


@on_all_models_once
def test_merging(name, make_model):
    model = trained(name, make_model)
    before = predict(model)
    unchanged = snapshot(model)
    if name in DO_NOT_MERGE:
        with pytest.raises(ValueError, match=DO_NOT_MERGE[name]):
            keras_fvae.merge_adapter(model)
        assert snapshot(model) == unchanged
        return
    keras_fvae.merge_adapter(model)
    assert not lookup.adapted_layers(model)
    assert_same(predict(model), before, 1e-5)


@on_all_models_once
def test_switched_off_it_is_the_base_model(name, make_model):
    base = predict(make_model())
    model = trained(name, make_model)
    with keras_fvae.adapter_disabled(model):
        assert_same(predict(model), base, 0)
    assert np.abs(predict(model) - base).max() > 1e-2


@on_all_models_once
def test_removed_it_is_the_base_model(name, make_model):
    model = make_model()
    before = snapshot(model)
    base = predict(model)
    for other in (name, "LoRA"):
        adapt(model, other)
        move_adapters(model, np.random.default_rng(0))
        keras_fvae.remove_adapter(model)
        assert_same(predict(model), base, 0)
        assert snapshot(model) == before
    # And trains as one.
    assert train(model) == pytest.approx(train(make_model()), rel=1e-5)


@on_all_models_once
def test_finalizing(name, make_model):
    model = trained(name, make_model)
    before = predict(model)
    keras_fvae.finalize_adapter(model)
    assert_same(predict(model), before)
    assert not any(
        w.trainable
        for layer in lookup.adapted_layers(model)
        for w in layer.adapter.weights
    )
    with pytest.raises(ValueError, match="finalized"):
        train(model)
    keras_fvae.remove_adapter(model)
    assert_same(predict(model), predict(make_model()), 0)


@on_all_models_once
@pytest.mark.parametrize(
    "dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16", "float64"]
)
def test_adapters_are_float32(name, make_model, dtype):
    model = make_model(dtype)
    before = predict(model)
    adapt(model, name)
    for layer in lookup.adapted_layers(model):
        assert {w.dtype for w in layer.adapter.weights} == {"float32"}
    assert_same(predict(model), before, 2e-2)
    assert np.isfinite(train(model)).all()


@on_all_once
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_bases(name, mode, tmp_path):
    def make_quantized():
        model = make_model()
        model.quantize(mode)
        return model

    model = make_quantized()
    before = predict(model)
    frozen = frozen_bytes(model)
    adapt(model, name)
    assert_same(predict(model), before, 2e-6)
    losses = train(model, epochs=12)
    assert np.mean(losses[-3:]) < losses[0]
    assert frozen_bytes(model) == frozen
    with pytest.raises(ValueError, match="quantized"):
        keras_fvae.merge_adapter(model)
    keras_fvae.save_adapter(model, tmp_path / "a.safetensors")
    loaded = make_quantized()
    keras_fvae.load_adapter(loaded, tmp_path / "a.safetensors")
    assert_same(predict(loaded), predict(model))
    predictions = predict(model)
    keras_fvae.finalize_adapter(model)
    assert_same(predict(model), predictions, 1e-5)


@on_all_once
def test_a_layer_that_is_called_twice(name):
    inputs = keras.Input((6,))
    layer = keras.layers.Dense(6, "tanh", name="twice")
    head = keras.layers.Dense(3, name="head")
    model = keras.Model(inputs, head(layer(layer(inputs))))
    x = X[:, 0]
    base = to_numpy(model(x))
    keras_fvae.enable_adapter(model, CONFIGS[name], "twice")
    assert_same(to_numpy(model(x)), base, 2e-6)
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = model.fit(x, Y, epochs=20, verbose=0).history["loss"]
    assert np.mean(losses[-3:]) < losses[0]


@on_all_models_once
def test_what_never_trained_does_not_come_to(name, make_model):
    model = adapt(make_model(), name)
    layers = lookup.adapted_layers(model)

    def trainable():
        return [w.path for layer in layers for w in layer.trainable_weights]

    before = trainable()
    for holder in (model, *layers):
        holder.trainable = False
        assert not holder.trainable_weights
        holder.trainable = True
        assert trainable() == before


@on_all_models_once
def test_sharding_axes_name_every_weight(name, make_model):
    model = adapt(make_model(), name)
    for finalize in (False, True):
        if finalize:
            keras_fvae.finalize_adapter(model)
        for layer in lookup.adapted_layers(model):
            for weight in layer.adapter.weights:
                axes = layer.adapter.weight_axes[weight.name]
                assert len(axes) == len(weight.shape), weight.path
                assert {*axes} <= {"input", "output", None}


@on_all_once
def test_configs_come_back(name):
    config = CONFIGS[name]
    assert config_from_description(describe_config(config)) == config
    serialized = keras.saving.serialize_keras_object(config)
    assert keras.saving.deserialize_keras_object(serialized) == config
    assert isinstance(config.adapter_class, type)
    assert issubclass(config.adapter_class, Adapter)
    layer = keras_fvae.AdaptedDense(3, config, activation="relu")
    outputs = to_numpy(layer(X))
    copied = keras_fvae.AdaptedDense.from_config(layer.get_config())
    assert copied.config == config
    copied.build(X.shape)
    for finalize in (False, True):
        if finalize:
            model = keras.Sequential([keras.Input(X.shape[1:]), layer])
            keras_fvae.finalize_adapter(model)
            copied = keras_fvae.AdaptedDense.from_config(layer.get_config())
            copied.build(X.shape)
        assert len(copied.weights) == len(layer.weights)
        for ours, theirs in zip(copied.weights, layer.weights):
            ours.assign(theirs)
        assert_same(to_numpy(copied(X)), outputs)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_weights_give_the_same_losses_again(name):
    assert train(trained(name)) == train(trained(name))


@on_all_once
def test_what_cannot_be_right_is_refused(name, tmp_path):
    config = CONFIGS[name]
    model = adapt(make_model(), name)
    path = tmp_path / "a.safetensors"
    keras_fvae.save_adapter(model, path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="remove_adapter"):
        keras_fvae.enable_adapter(model, config, is_target)
    with pytest.raises(ValueError, match="remove_adapter"):
        model.get_layer("up").enable_lora(2)
    assert snapshot(model) == before
    other = adapt(make_model(), "DoRA" if "DoRA" not in name else "HiRA")
    before = snapshot(other)
    with pytest.raises(ValueError, match=type(config).__name__):
        keras_fvae.load_adapter(other, path)
    assert snapshot(other) == before
    for wrong in (0, 2.5, "2", None, True):
        with pytest.raises(ValueError, match="rank"):
            type(config)(wrong)
    for wrong in (-1, 0.5, "x"):
        with pytest.raises(ValueError, match="seed"):
            type(config)(2, seed=wrong)
    with pytest.raises(TypeError, match="LoRAConfig"):
        keras_fvae.enable_adapter(make_model(), type(config), is_target)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "use",
    [
        lambda model: keras_fvae.latents(model, X),
        lambda model: keras_fvae.probe_latents(model, X, Y % 2, num_folds=2),
        lambda model: model.fit(
            X, Y, verbose=0, callbacks=[keras_fvae.FVAELoRAMonitor()]
        ),
        lambda model: model.fit(
            X,
            Y,
            verbose=0,
            callbacks=[keras_fvae.FVAELoRASchedule(kl_weight=lambda step: 1.0)],
        ),
    ],
)
def test_what_is_of_latents_takes_fvae_lora_alone(use):
    model = adapt(make_model(), "DoRA")
    train(model, epochs=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapted by FVAE-LoRA.*by DoRA"):
        use(model)
    assert snapshot(model) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["Shift", "MoE-LoRA"])
def test_peft_has_not_every_method(name, bert, tmp_path):
    keras_fvae.enable_adapter(bert.backbone, CONFIGS[name])
    with pytest.raises(ValueError, match=f"PEFT has no counterpart of {name}"):
        keras_fvae.save_peft_adapter(bert, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.one_backend
@pytest.mark.parametrize("config", ["PiSSAConfig", "OLoRAConfig"])
def test_a_rank_above_the_kernels_is_refused(config):
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"query.*at most 6.*rank=7"):
        keras_fvae.enable_adapter(model, getattr(keras_fvae, config)(7))
    assert snapshot(model) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["PiSSA", "SRLoRA"])
def test_a_pair_of_zeros_would_never_train(name):
    """Of a kernel of zeros both A and B are 0, and neither has a gradient."""
    model = make_model()
    kernel = model.get_layer("up").kernel
    kernel.assign(0 * kernel)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'up'.*2 of the 2 pairs.*at 0"):
        keras_fvae.enable_adapter(model, CONFIGS[name], "up")
    assert snapshot(model) == before
    # OLoRA's B is orthonormal, whatever the kernel.
    keras_fvae.enable_adapter(model, CONFIGS["OLoRA"], "up")


@pytest.mark.one_backend
def test_peft_has_no_folder_of_two_methods(bert, tmp_path):
    layers = {"query": CONFIGS["FVAE-LoRA"], "value": CONFIGS["LoRA"]}
    keras_fvae.enable_adapter(bert.backbone, CONFIGS["LoRA"], layers)
    with pytest.raises(ValueError, match="one method.*FVAE-LoRA.*by LoRA"):
        keras_fvae.save_peft_adapter(bert, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.one_backend
def test_a_unit_without_weights_has_no_direction():
    model = make_model()
    kernel = to_numpy(model.get_layer("up").kernel).copy()
    kernel[:, 4] = 0
    model.get_layer("up").kernel.assign(kernel)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'up'.*unit 4 of 7 are all 0"):
        keras_fvae.enable_adapter(model, CONFIGS["DoRA"], "up")
    assert snapshot(model) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["PiSSA", "OLoRA", "DoRA"])
def test_methods_start_from_no_kernel_that_is_not_finite(name):
    model = make_model()
    model.get_layer("up").kernel.assign(np.full((6, 7), np.inf))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'up'.*not finite"):
        keras_fvae.enable_adapter(model, CONFIGS[name], is_target)
    assert snapshot(model) == before


@pytest.mark.one_backend
def test_a_plain_model_has_nothing_to_remove():
    with pytest.raises(ValueError, match="no adapted layer"):
        keras_fvae.remove_adapter(make_model())
    with pytest.raises(TypeError, match="Keras model or layer"):
        keras_fvae.remove_adapter("model")
    with pytest.raises(TypeError, match="alpha"):
        keras_fvae.HiRAConfig(2, alpha=4)


@on_all_once
def test_kerashub_brings_it_back(name, make_bert, rng, tmp_path):
    backbone = make_bert().backbone
    inputs = text_inputs(rng)

    def outputs(backbone):
        return to_numpy(backbone(inputs)["sequence_output"])

    plain = type(backbone).from_config(backbone.get_config())
    plain.set_weights(backbone.get_weights())
    backbone.enable_adapter(CONFIGS[name])
    move_adapters(backbone, rng)
    expected = outputs(backbone)
    backbone.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert_same(outputs(loaded), expected)
    backbone.save_adapter(tmp_path / "a.safetensors")
    plain.load_adapter(tmp_path / "a.safetensors")
    assert_same(outputs(plain), expected)
