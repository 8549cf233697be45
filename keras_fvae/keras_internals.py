"""The private parts of Keras that this package cannot do without.

Everything else uses the public API. `tests/keras_internals_test.py` fails
when Keras changes one of these.
"""

import contextlib

import keras
import numpy as np
from keras.src import backend
from keras.src.backend.common import global_state


def flatten_layers(layer):
    """The layer and all layers inside it, each once, in their order."""
    return [layer for _, layer in walk_layers(layer)]


def walk_layers(layer):
    """Pairs of a path and a layer, for the layer and all layers inside it.

    The path is made of the names of the layers that a layer is in. Unlike
    `layer.path`, it does not depend on what was being built at the time.
    """
    pairs, seen = [], set()

    def visit(layer, path):
        if id(layer) not in seen:
            seen.add(id(layer))
            pairs.append((path, layer))
            for sublayer in layer._layers:
                visit(sublayer, f"{path}/{sublayer.name}".lstrip("/"))

    visit(layer, "")
    return pairs


@contextlib.contextmanager
def unlocked(layer):
    """Lets a built layer take new sublayers."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def untrack(layer, sublayer):
    """Makes a layer forget a sublayer that it keeps track of."""
    layer._tracker.untrack(sublayer)


def publish_weights(layer):
    """Makes new weights known to what a backend keeps beside Keras's lists.

    A `torch.nn.Module` has parameters of its own, which `zero_grad` clears.
    """
    layer._post_build()


def kernel_of(layer):
    """The variable that holds the kernel of a `Dense` or `EinsumDense`."""
    return layer._kernel


def has_value(variable):
    """Whether a variable has its value yet; one in a `StatelessScope` has not.

    To ask such a one for it would compute it.
    """
    return variable._value is not None


def layout_of(variable):
    """The `keras.distribution.TensorLayout` of a variable, or `None`."""
    return variable._layout


def set_layout(variable, layout):
    """Moves a variable to a `keras.distribution.TensorLayout`."""
    previous = variable._layout
    variable._layout = layout
    # One without a value yet is made where its layout says.
    if has_value(variable):
        try:
            variable.assign(variable.value)
        except ValueError:
            variable._layout = previous
            raise


def layout_map_of(distribution):
    """The `LayoutMap` of a `keras.distribution.ModelParallel`, or `None`."""
    return getattr(distribution, "_layout_map", None)


@contextlib.contextmanager
def without_values():
    """Variables that are made inside the block never get a value."""
    name = "uninitialized_variables"
    previous = [*global_state.get_global_attribute(name, [])]
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(name, previous)


@contextlib.contextmanager
def losses_kept():
    """The losses of the layer that is called are after the block as before.

    Inside it other threads may call the same layers: the replicas of a
    `tf.distribute` strategy take turns where they wait for each other.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    layers = [] if context is None else flatten_layers(context.entry_layer)
    kept = [(layer, [*layer._losses]) for layer in layers]
    try:
        yield
    finally:
        for layer, losses in kept:
            layer._losses.clear()
            layer._losses.extend(losses)


def get_keras_mask(x):
    """The Keras mask that travels with a tensor, or `None`."""
    return backend.get_keras_mask(x)


def trace_makes_state(model):
    """Whether TensorFlow would make variables while it traces a step.

    Keras leaves the optimizer's slots and the metrics to the trace, here alone
    of all backends, and TensorFlow traces the whole step a second time where
    the first made variables. Under a strategy Keras makes them before.
    """
    if model.run_eagerly or model._distribute_strategy is not None:
        return False
    return any(
        part is not None and not part.built
        for part in (model.optimizer, model._compile_metrics)
    )


def make_state(model, iterator=None, data_batch=None):
    """Makes what `trace_makes_state` found, before there is a trace.

    Data of which nothing is known beforehand is left to the trace.

    Args:
        model: Compiled `keras.Model`.
        iterator: What Keras's trainer reads batches from, or `None`.
        data_batch: Else one batch of it.
    """
    import tensorflow as tf

    if model._compile_metrics is None:
        # No data is needed to know what there will be.
        model.optimizer.build(model.trainable_variables)
        return
    if iterator is not None:
        data_batch = iterator._get_iterator().element_spec
    nothing = tf.OptionalSpec, tf.NoneTensorSpec
    data_batch = keras.tree.map_structure(
        lambda value: None if isinstance(value, nothing) else value, data_batch
    )
    is_known = all(
        isinstance(array, (np.ndarray, tf.Tensor, tf.TensorSpec))
        and getattr(array.shape, "rank", 0) is not None
        for array in keras.tree.flatten(data_batch)
        if array is not None
    )
    if is_known:
        model._symbolic_build(data_batch=data_batch)


class ToldOfTraining:
    """A model to which Keras's trainers say `training`, whatever `call` takes.

    They leave it out where `call` has no such argument; the layers inside
    would not know that they train.
    """

    @property
    def _call_has_training_arg(self):
        return True

    @_call_has_training_arg.setter
    def _call_has_training_arg(self, value):
        # Keras sets it; it counts again when the model has no adapters.
        vars(self)["_call_has_training_arg"] = value
