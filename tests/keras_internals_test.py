"""Notices when Keras changes the private parts that the package uses."""

import pickle
import warnings

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import dtype_of
from helpers import to_numpy

from keras_fvae.backend import keras_internals


class Block(keras.layers.Layer):
    """Layers as attributes, in a list and in a dict."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(2, name="first")
        self.listed = [keras.layers.Dense(2, name="listed")]
        self.mapped = {"key": keras.layers.Dense(2, name="mapped")}
        self.shared = self.first

    def call(self, x):
        return self.mapped["key"](self.listed[0](self.first(x)))


def test_flatten_layers_finds_every_layer_once_and_in_order():
    inputs = keras.Input((3,))
    attention = keras.layers.MultiHeadAttention(1, 2, name="attention")
    x = keras.layers.Reshape((1, 3), name="reshape")(inputs)
    x = attention(x, x)
    model = keras.Model(inputs, Block()(x))
    names = [layer.name for layer in keras_internals.flatten_layers(model)]
    assert [n for n in names if not n.startswith(("input", "functional"))] == [
        "reshape",
        "attention",
        "query",
        "key",
        "value",
        "softmax",
        "dropout",
        "attention_output",
        "block",
        "first",
        "listed",
        "mapped",
    ]


def test_paths_do_not_depend_on_what_was_being_built():
    inner = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="dense")], name="inner"
    )
    inputs = keras.Input((3,))
    outer = keras.Model(inputs, inner(inputs), name="outer")
    paths = [path for path, _ in keras_internals.walk_layers(outer)]
    assert paths[0] == ""
    assert paths[-1] == "inner/dense"
    # Built before it was in the model, or after, as Keras does on loading.
    assert inner.layers[0].path in ("inner/dense", "dense")


def test_a_sublayer_can_be_forgotten():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with keras_internals.unlocked(layer):
        layer.extra = keras.layers.Dense(1)
    layer.extra.build((None, 3))
    keras_internals.untrack(layer, layer.extra)
    del layer.extra
    keras_internals.publish_weights(layer)
    assert keras_internals.flatten_layers(layer) == [layer]
    assert len(layer.weights) == 2
    if BACKEND == "torch":
        assert len(list(layer.parameters())) == 2


def test_a_built_layer_is_locked_and_can_be_unlocked():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises(ValueError, match="already built"):
        layer.extra = keras.layers.Dense(1)
    with keras_internals.unlocked(layer):
        layer.other = keras.layers.Dense(1)
    assert layer.other in keras_internals.flatten_layers(layer)
    with pytest.raises(ValueError, match="already built"):
        layer.third = keras.layers.Dense(1)


@pytest.mark.skipif(BACKEND != "torch", reason="what only PyTorch has")
def test_new_weights_become_torch_parameters():
    inputs = keras.Input((3,))
    layer = keras.layers.Dense(2)
    model = keras.Model(inputs, layer(inputs))
    with keras_internals.unlocked(layer):
        layer.extra = layer.add_weight(shape=(2,), name="extra")
    keras_internals.publish_weights(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert id(layer.extra.value) in parameters


def test_the_keras_mask_of_a_tensor():
    embedded = keras.layers.Embedding(5, 2, mask_zero=True)(
        np.array([[1, 2, 0]])
    )
    mask = keras_internals.get_keras_mask(embedded)
    assert keras.ops.convert_to_numpy(mask).tolist() == [[True, True, False]]
    assert keras_internals.get_keras_mask(np.ones(2)) is None
    assert keras_internals.get_keras_mask(None) is None
    assert keras_internals.get_keras_mask({"x": 1}) is None


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_the_kernel_variable(mode):
    for layer in (
        keras.layers.Dense(4),
        keras.layers.EinsumDense("ab,bcd->acd", (2, 2)),
    ):
        layer.build((None, 4))
        if mode is not None:
            layer.quantize(mode)
        kernel = keras_internals.kernel_of(layer)
        assert isinstance(kernel, keras.Variable)
        assert kernel.path == f"{layer.name}/kernel"


class TakesTraining(keras.layers.Conv1D):
    def call(self, inputs, training=None):
        self.seen = training
        return super().call(inputs)


def test_a_class_that_takes_training():
    layer = keras.layers.Conv1D(2, 1)
    layer.build((None, 3, 1))
    # Keras quantizes none.
    assert keras_internals.kernel_of(layer) is layer.kernel
    with pytest.raises(NotImplementedError, match="does not have a `quantize"):
        layer.quantize("int8")
    x = np.ones((1, 3, 1))
    layer(x, training=True)
    layer.__class__ = TakesTraining
    keras_internals.update_call_signature(layer)
    for training in (True, False):
        layer(x, training=training)
        assert layer.seen is training
    layer.__class__ = keras.layers.Conv1D
    keras_internals.update_call_signature(layer)
    plain = vars(keras.layers.Conv1D(2, 1))
    for name in (
        "_call_signature",
        "call_signature_parameters",
        "_call_has_training_arg",
        "_call_has_context_arg",
    ):
        assert vars(layer)[name] == plain[name]


def make_distribution():
    mesh = keras.distribution.DeviceMesh((1,), ("batch",), devices=["cpu:0"])
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["variable"] = ("batch",)
    return keras.distribution.ModelParallel(layout_map=layout_map), layout_map


def test_layouts_of_variables():
    distribution, layout_map = make_distribution()
    assert keras_internals.layout_map_of(distribution) is layout_map
    assert keras_internals.layout_map_of(None) is None
    variable = keras.Variable(np.arange(3.0), name="variable")
    assert keras_internals.layout_of(variable) is None
    keras_internals.set_layout(variable, layout_map["variable"])
    assert keras_internals.layout_of(variable).axes == ("batch",)
    assert keras.ops.convert_to_numpy(variable).tolist() == [0, 1, 2]
    if BACKEND == "jax":
        with distribution.scope():
            made = keras.Variable(np.arange(3.0), name="variable")
        # As Keras does it itself.
        assert keras_internals.layout_of(made) is layout_map["variable"]


def test_variables_without_values():
    def initializer(shape, dtype):
        raise AssertionError("The variable got a value.")

    with keras_internals.without_values():
        variable = keras.Variable(initializer, shape=(2, 3))
        variable.trainable = False
        assert not keras_internals.has_value(variable)
    assert variable.shape == (2, 3)
    # What Keras does for others when a scope ends.
    with keras.StatelessScope():
        other = keras.Variable(np.zeros, shape=(2,))
    assert keras.ops.convert_to_numpy(other).tolist() == [0, 0]
    assert keras_internals.has_value(other)


def test_losses_are_kept_while_others_call_the_same_layers():
    class Other(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(x))
            return x

    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first = Other()
            self.second = Other()

        def call(self, x):
            x = self.first(x)
            with keras_internals.losses_kept(keras_internals.entry_layer()):
                keras_internals.clear_losses(self)
                self.first.add_loss(100.0 * keras.ops.sum(x))
            return self.second(x)

    outer = Outer()
    outer(np.ones((2, 3), "float32"))
    losses = [float(loss) for loss in outer.losses]
    assert losses == [6.0, 6.0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="no other has traces")
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_state_is_made_before_a_trace(run_eagerly):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"], run_eagerly=run_eagerly)
    batch = np.ones((4, 3), "float32"), np.ones((4, 2), "float32"), None
    num_metrics = len(model.metrics_variables)
    # Nothing is known of it, so nothing is done.
    keras_internals.make_state(model, data_batch=([1.0], [1.0]))
    assert not model.optimizer.built
    if keras_internals.trace_makes_state(model):
        keras_internals.make_state(model, data_batch=batch)
    # Without a trace there is nothing to gain.
    assert model.optimizer.built != run_eagerly
    assert (len(model.metrics_variables) > num_metrics) != run_eagerly
    assert not keras_internals.trace_makes_state(model)


def make_model(**options):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, name="dense"),
            keras.layers.BatchNormalization(name="norm"),
        ]
    )
    model.compile("sgd", "mse", **options)
    return model


DATA = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")


def test_what_layers_hold():
    model = make_model()
    dense, norm = model.layers
    assert keras_internals.layers_of(model)[-2:] == [dense, norm]
    assert keras_internals.model_within(model).layers[-1] is norm
    assert keras_internals.model_within(dense) is None
    names = [weight.name for weight in keras_internals.state_of(norm)]
    assert names == ["moving_mean", "moving_variance"]
    norm.trainable = dense.trainable = False
    assert len(keras_internals.state_of(norm)) == 2
    assert keras_internals.state_of(dense) == []
    block = Block()
    assert keras_internals.attributes_of(block)["first"] is block.first
    assert keras_internals.optimized_variables(dense) == []
    assert keras_internals.optimized_variables(model) == []
    dense.trainable = True
    model.fit(*DATA, verbose=0)
    assert len(keras_internals.optimized_variables(model)) == 2
    assert keras_internals.is_described_by_layers(keras.Sequential)
    functional = keras.Model(model.inputs, model.outputs)
    assert keras_internals.is_described_by_layers(type(functional))
    assert not keras_internals.is_described_by_layers(keras.Model)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_what_is_running(run_eagerly):
    seen = {}

    class Model(keras.Model):
        def compute_loss(self, *args, **kwargs):
            seen["steps"] = keras_internals.is_in_training_step()
            seen["runs"] = keras_internals.running_trainers()
            return super().compute_loss(*args, **kwargs)

        def call(self, x):
            seen["entries"] = keras_internals.entry_models()
            return self.inner(x)

    model = Model()
    model.inner = keras.layers.Dense(2)
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    for name, is_training in (
        ("fit", True),
        ("train_on_batch", True),
        ("evaluate", False),
        ("test_on_batch", False),
    ):
        getattr(model, name)(*DATA)
        assert seen["steps"] == is_training, name
        assert (name, model) in seen["runs"]
        assert model in seen["entries"]
    for name in ("predict", "predict_on_batch"):
        getattr(model, name)(DATA[0])
        assert model in seen["entries"]
    assert not keras_internals.is_in_training_step()
    assert keras_internals.running_trainers() == []
    assert keras_internals.entry_models() == []


def test_functions_within_functions():
    here, inside = keras_internals.trace_state(), []

    def function(x):
        inside.append(keras_internals.trace_state())
        return x

    x = keras.ops.convert_to_tensor(DATA[0])
    keras.ops.vectorized_map(function, x)
    assert inside[-1] != here
    assert keras_internals.trace_state() == here
    keras.ops.cond(keras.ops.convert_to_tensor(True), lambda: 1, lambda: 2)
    assert keras_internals.trace_state() == here


@pytest.mark.parametrize("jit_compile", [False, True][: 1 + (BACKEND == "jax")])
def test_a_step_that_leaves_variables_as_they_are(jit_compile):
    class Model(keras.Sequential):
        def train_step(self, *args):
            kept = [self.layers[0].kernel]
            step = super().train_step
            return keras_internals.without_moving(kept, self, step, args)

    model = Model([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(
        keras.optimizers.SGD(0.1, weight_decay=0.1),
        "mse",
        jit_compile=jit_compile,
    )
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in model.weights)
    model.fit(*DATA, verbose=0)
    found = [keras.ops.convert_to_numpy(w) for w in model.weights]
    np.testing.assert_array_equal(found[0], kernel)
    assert not np.array_equal(found[1], bias)


@pytest.mark.parametrize("steps", [0, 3])
def test_values_are_kept_when_a_fit_raises(steps):
    class Raises(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == steps:
                raise KeyError

    model = make_model()
    for _ in range(2):
        before = [keras.ops.convert_to_numpy(w) for w in model.weights]
        with pytest.raises(KeyError), keras_internals.values_kept(model):
            model.fit(*DATA, batch_size=1, verbose=0, callbacks=[Raises()])
        after = [keras.ops.convert_to_numpy(w) for w in model.weights]
        assert all(map(np.array_equal, before, after)) == (steps == 0)
        model.fit(*DATA, verbose=0)


def test_keras_old_format(tmp_path):
    seen = []

    class Model(keras.Sequential):
        def get_config(self):
            seen.append(keras_internals.is_saving_to_h5())
            return super().get_config()

    model = Model([keras.Input((3,)), keras.layers.Dense(2)])
    keras.saving.save_model(model, tmp_path / "model.h5")
    model.save(tmp_path / "model.keras")
    assert seen[0] and not seen[-1]


@pytest.mark.parametrize("suffix", [".weights.h5", ".weights.json", ".keras"])
def test_what_is_in_a_file_of_weights(suffix, tmp_path):
    class Marked(keras.layers.Dense):
        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["mark"] = np.ones(())

    model = keras.Sequential([keras.Input((3,)), Marked(2), Marked(2)])
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
    elif suffix == ".weights.json":
        model.save_weights(path, max_shard_size=1e-3)
    else:
        model.save_weights(path)
    assert keras_internals.count_saved("mark", path) == 2
    assert keras_internals.count_saved("no", path) == 0


def test_a_class_that_no_module_has_can_be_pickled():
    class Dense(keras_internals.Pickled, keras.layers.Dense):
        pass

    keras.saving.register_keras_serializable("keras_internals_test")(Dense)
    layer = Dense(2)
    layer.build((None, 3))
    found = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(found.kernel),
        keras.ops.convert_to_numpy(layer.kernel),
    )


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("is_einsum", [False, True])
def test_float_kernel(is_einsum, mode, rng):
    if is_einsum:
        layer = keras.layers.EinsumDense("bxy,xyuv->buv", (3, 4))
        inputs, shape = np.eye(6).reshape(6, 2, 3), (2, 3, 3, 4)
    else:
        layer = keras.layers.Dense(12, use_bias=False)
        inputs, shape = np.eye(6), (6, 12)
    layer.build(inputs.shape)
    if mode is not None:
        layer.quantize(mode)
    found = to_numpy(keras_internals.float_kernel(layer))
    assert found.shape == shape
    # What the layer makes of each unit vector is a row of its kernel.
    rows = to_numpy(layer(inputs))
    np.testing.assert_allclose(
        found.reshape(6, 12), rows.reshape(6, 12), rtol=1e-4, atol=1e-6
    )


def test_float_kernel_in_full_precision():
    layer = keras.layers.Dense(3, dtype="mixed_bfloat16")
    layer.build((None, 4))
    found = []

    class Reader(keras.layers.Layer):
        def call(self, x):
            # Here Keras casts what is read.
            for full_precision in (False, True):
                kernel = keras_internals.float_kernel(layer, full_precision)
                found.append(dtype_of(kernel))
            return x

    Reader(dtype="mixed_bfloat16")(np.ones((1, 4)))
    assert found == ["bfloat16", "float32"]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Muon"])
def test_what_is_added_to_an_update_sees_what_was_used(name):
    """Once for each update, with the mean gradient, after the step."""
    seen = []
    variable = keras.Variable(np.ones((2, 3), "float32"))
    optimizer = getattr(keras.optimizers, name)(
        0.1, gradient_accumulation_steps=2
    )
    optimizer.build([variable])
    keras_internals.add_to_update(
        optimizer,
        lambda gradients, variables: seen.append(
            (to_numpy(gradients[0]), to_numpy(variables[0]))
        ),
    )
    before = to_numpy(variable)
    if BACKEND != "jax":
        for gradient in (1.0, 3.0):
            optimizer.apply([keras.ops.full((2, 3), gradient)], [variable])
        ((gradient, after),) = seen
        np.testing.assert_allclose(gradient, np.full((2, 3), 2.0))
        np.testing.assert_allclose(after, to_numpy(variable))
        assert np.abs(after - before).max() > 1e-3
    keras_internals.restore_update(optimizer)
    optimizer.apply([keras.ops.ones((2, 3))], [variable])
    optimizer.apply([keras.ops.ones((2, 3))], [variable])
    assert len(seen) <= 1


def test_variables_of_an_optimizer_can_be_taken_out():
    optimizer = keras.optimizers.Adam()
    optimizer.build([keras.Variable(np.ones(3))])
    before = [v.path for v in optimizer.variables]
    added = optimizer.add_variable((2,), name="added")
    assert any(v is added for v in optimizer.variables)
    keras_internals.untrack_optimizer_variable(optimizer, added)
    assert [v.path for v in optimizer.variables] == before


def test_what_is_saved_apart_hinders_no_optimizer(tmp_path):
    """It is in the file, and read where there is room for it."""

    def compiled(value):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        inner = keras.optimizers.Adam(gradient_accumulation_steps=2)
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        if value is None:
            return model, None
        added = inner.add_variable((2,), name="added")
        added.assign([value, value])
        keras_internals.save_apart([optimizer, inner], {"part": [added]})
        return model, added

    path = tmp_path / "model.weights.h5"
    model, added = compiled(3.0)
    model.fit(np.ones((6, 2)), np.ones((6, 1)), batch_size=2, verbose=0)
    inner = model.optimizer.inner_optimizer
    assert keras_internals.num_steps_of(inner) == 3
    assert int(inner.iterations) == 1
    model.save_weights(path)
    for value, expected in ((None, None), (5.0, 3.0)):
        other, read = compiled(value)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            other.load_weights(path)
        other_inner = other.optimizer.inner_optimizer
        assert keras_internals.num_steps_of(other_inner) == 3
        if value is not None:
            assert to_numpy(read).tolist() == [expected, expected]
    keras_internals.save_apart([model.optimizer, inner], {})
    # From a file without it, it stays what it is.
    other, read = compiled(5.0)
    keras_internals.untrack_optimizer_variable(inner, added)
    model.save_weights(path)
    other.load_weights(path)
    assert to_numpy(read).tolist() == [5.0, 5.0]
    assert keras_internals.num_steps_of(other.optimizer.inner_optimizer) == 3


def test_what_runs_in_this_thread():
    seen = []

    class Nested(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(keras_internals.running_method())
            self.model.predict(np.ones((1, 2)), callbacks=[again], verbose=0)

    again = keras.callbacks.LambdaCallback(
        on_predict_begin=lambda logs: seen.append(
            keras_internals.running_method()
        )
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), callbacks=[Nested()], verbose=0)
    assert seen == ["fit", "predict"]
    assert keras_internals.running_method() is None


class RecordingOptimizer(keras_internals.JointOptimizer):
    """Keeps what the last step got."""

    def joint_step(self, gradients, learning_rate):
        self.seen = gradients, float(learning_rate)


def test_a_joint_step_gets_what_became_of_the_gradients():
    variables = [
        keras.Variable(np.ones(2, "float32"), name=name) for name in "abc"
    ]
    optimizer = RecordingOptimizer(
        0.5, weight_decay=0.1, clipvalue=2.0, gradient_accumulation_steps=2
    )
    optimizer.exclude_from_weight_decay(var_names=["a"])
    optimizer.build(variables)
    assert optimizer.optimized_variables == variables
    for numbers in ([1.0, 3.0], [3.0, 5.0]):
        gradients = [keras.ops.full((2,), number) for number in numbers]
        # In another order, and none for the second.
        optimizer.apply(gradients, [variables[2], variables[0]])
    (a, b, c), learning_rate = optimizer.seen
    assert to_numpy(a).tolist() == to_numpy(c).tolist() == [2, 2]
    assert b is None
    assert learning_rate == 0.5
    assert [optimizer.weight_decay_of(v) for v in variables] == [0, 0.1, 0.1]
    # Decay is left to the step, too.
    assert all(to_numpy(v).tolist() == [1, 1] for v in variables)


def test_gradients_that_are_never_clipped():
    variables = [
        keras.Variable(np.ones(1, "float32"), name=name) for name in "abc"
    ]
    optimizer = RecordingOptimizer(0.5, global_clipnorm=1.0)
    optimizer.build(variables)
    optimizer.never_clipped = (1,)
    gradients = [keras.ops.full((1,), number) for number in (100.0, 3.0, 4.0)]
    # In another order.
    optimizer.apply(gradients, [variables[i] for i in (1, 0, 2)])
    seen = [float(gradient[0]) for gradient in optimizer.seen[0]]
    np.testing.assert_allclose(seen, [0.6, 100.0, 0.8], rtol=1e-6)


def test_the_losses_that_a_layer_has_added():
    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.ActivityRegularization(l1=1.0)
            self.weight = self.add_weight(shape=(2,), regularizer="l2")

        def call(self, x):
            self.inner(x)
            self.add_loss(3.0 + 0.0 * keras.ops.sum(x))
            self.seen = len(keras_internals.added_losses(self))
            return x

    layer = Outer()
    for _ in range(2):
        layer(np.ones((2, 3), "float32"))
        assert layer.seen == 1
    assert len(layer.losses) == 3
