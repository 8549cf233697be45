"""Notices when Keras changes the private parts that the package uses."""

import keras
import numpy as np
import pytest
from helpers import BACKEND

from keras_fvae import keras_internals


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
            with keras_internals.losses_kept():
                self._clear_losses()
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
