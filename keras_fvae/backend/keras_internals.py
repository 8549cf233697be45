"""The private parts of Keras that this package cannot do without.

Everything else uses the public API. `tests/keras_internals_test.py` fails
when Keras changes one of these.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import json
import pathlib
import sys
import types
import zipfile
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import h5py
import keras
import numpy as np
from keras import ops
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import AutocastScope
from keras.src.models.functional import Functional
from keras.src.quantizers.quantizers import dequantize_with_sz_map
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable

from keras_fvae.backend.types import Tensor

# The methods of a model that run steps, one after the other.
RUNS = (
    "fit",
    "evaluate",
    "predict",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
)


STEPS = ("train_step", "test_step", "predict_step")


def layers_of(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds itself, a list."""
    return layer._layers


def attributes_of(layer: keras.Layer) -> dict[str, Any]:
    """Dict of name to value, of what was set on a layer."""
    attributes = dict(vars(layer))
    if keras.config.backend() == "torch":
        # PyTorch keeps the layers among them elsewhere.
        attributes |= dict(layer.named_children())
    return attributes


def state_of(layer: keras.Layer) -> list[keras.Variable]:
    """The weights of a layer's own that were never meant for a gradient."""
    return layer._non_trainable_variables


def optimized_variables(model: keras.Layer) -> list[keras.Variable]:
    """The variables that the optimizer of a model was built for, a list."""
    return variables_to_optimize(getattr(model, "optimizer", None))


def variables_to_optimize(optimizer: Any) -> list[keras.Variable]:
    """Those that an optimizer was built for, a list."""
    return getattr(optimizer, "_trainable_variables", [])


def backend_name() -> str:
    """String, the backend, for messages."""
    return keras.config.backend()


def lists_variables_as_parameters() -> bool:
    """Whether a layer's `variables` are those that PyTorch optimizes."""
    return keras.config.backend() == "torch"


def is_compiling() -> bool:
    """Whether `torch.compile` is tracing, which knows little but tensors."""
    if keras.config.backend() != "torch":
        return False
    import torch

    return torch.compiler.is_compiling()


def is_in_training_step() -> bool:
    """Whether a model's `train_step` is running, as the call stack has it.

    The innermost step counts: a model may evaluate another one in its own.
    """
    if is_compiling():
        # There is no stack of Python's then.
        return False
    for frame in stack_of_calls():
        if frame.f_code.co_name in STEPS and isinstance(
            frame.f_locals.get("self"), keras.Model
        ):
            return frame.f_code.co_name == "train_step"
    return False


def stack_of_calls(
    frame: types.FrameType | None = None,
) -> Iterator[types.FrameType]:
    """Yields the frames of Python's calls, from the innermost on."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def running_trainers() -> list[tuple[str, keras.Model]]:
    """Pairs of a method's name and the model that is in the middle of it.

    Of `fit` and its like, in any thread.
    """
    names = _run_names()
    pairs = []
    for innermost in sys._current_frames().values():
        for frame in stack_of_calls(innermost):
            if frame.f_code in names:
                pairs.append((names[frame.f_code], frame.f_locals["self"]))
    return pairs


def running_method() -> str | None:
    """The name of the innermost of `fit` and its like in this thread."""
    names = _run_names()
    for frame in stack_of_calls():
        if frame.f_code in names:
            return names[frame.f_code]
    return None


def _run_names():
    """Dict of the code of `fit` and its like to the name of the method."""
    return {inspect.unwrap(getattr(keras.Model, n)).__code__: n for n in RUNS}


def fetch_state(model: keras.Model) -> None:
    """Puts into variables the values that they have inside a running `fit`.

    Which JAX has elsewhere between an epoch's first step and its last.
    """
    if keras.config.backend() == "jax":
        model.jax_state_sync()


def hide_from_progress_bar(
    model: keras.Model, prefixes: tuple[str, ...]
) -> None:
    """Keeps entries of the logs out of what a running `fit` prints.

    Args:
        model: `keras.Model` that is in the middle of `fit`, in this thread.
        prefixes: Tuple of strings that the names of such entries begin with.
    """
    fit = inspect.unwrap(keras.Model.fit).__code__
    for frame in stack_of_calls(sys._getframe()):
        if frame.f_code is fit and frame.f_locals["self"] is model:
            bar = frame.f_locals["callbacks"]._progbar
            if bar is None:
                return
            bar.on_epoch_end = functools.partial(
                _print_epoch_without, bar.on_epoch_end, prefixes
            )


def _print_epoch_without(on_epoch_end, prefixes, epoch, logs=None):
    shown = {n: v for n, v in logs.items() if not n.startswith(prefixes)}
    on_epoch_end(epoch, shown)


def output_layers(model: keras.Layer) -> list[keras.Layer] | None:
    """List of the last layers with weights before the outputs of a model.

    `None` if it is a subclass, which does not say what it calls.
    """
    within = model_within(model) or model
    if not isinstance(within, Functional):
        return None
    found, seen_ids = [], set()
    waiting = keras.tree.flatten(within.outputs)
    while waiting:
        tensor = waiting.pop()
        operation, node_index, _ = tensor._keras_history
        if id(tensor) in seen_ids:
            continue
        seen_ids.add(id(tensor))
        if not getattr(operation, "weights", ()):
            if node_index < len(operation._inbound_nodes):
                node = operation._inbound_nodes[node_index]
                waiting += keras.tree.flatten(node.input_tensors)
        elif isinstance(operation, (Functional, keras.Sequential)) and not (
            # A backbone is no head.
            hasattr(operation, "default_lora_layer_names")
        ):
            found += output_layers(operation)
        else:
            found.append(operation)
    return found


def model_within(model: keras.Layer) -> keras.Layer | None:
    """The functional model that a `keras.Sequential` makes of its layers.

    `None` for other models, or before it is built.
    """
    return getattr(model, "_functional", None)


def is_saving_to_h5() -> bool:
    """Whether Keras writes or reads a whole model in its old format."""
    return bool(global_state.get_global_attribute("use_legacy_config"))


def is_described_by_layers(model_class: type) -> bool:
    """Whether the config of a model has those of its layers in it."""
    return model_class in (Functional, keras.Sequential)


class NotRematerialized:
    """A layer that `keras.RematScope` does not compute a second time.

    It would draw other noise then, and its losses would count twice, or on JAX
    be out of reach.
    """

    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        return layer_call


class JointOptimizer(keras.optimizers.Optimizer):
    """An optimizer whose step is one of all its variables together.

    Keras's own step one variable after the other, in `update_step`; one that
    derives from this class overrides `joint_step`. All else is as in Keras:
    until then the gradients have been unscaled, accumulated and clipped. But
    weight decay is left to `joint_step`, which is to see the variables as they
    were before the step.

    Attributes:
        never_clipped: Set of integers, where in `optimized_variables` are those
            whose gradients are neither clipped nor part of a norm.
    """

    never_clipped: Collection[int] = frozenset()

    def joint_step(
        self, gradients: list[Tensor | None], learning_rate: Tensor
    ) -> None:
        """Assigns new values to the variables, and to those of the optimizer.

        Args:
            gradients: List of tensors, in the order of `optimized_variables`.
                `None` for a variable that the loss does not depend on. With
                several replicas of TensorFlow, those of one.
            learning_rate: Scalar tensor or variable.
        """
        raise NotImplementedError

    @property
    def optimized_variables(self) -> list[keras.Variable]:
        """List of `keras.Variable` that the optimizer was built for."""
        return self._trainable_variables

    def weight_decay_of(self, variable: keras.Variable) -> float:
        """Float, the weight decay of a variable, which may be excluded."""
        if self.weight_decay is None or not self._use_weight_decay(variable):
            return 0.0
        return self.weight_decay

    def _backend_apply_gradients(self, grads, trainable_variables):
        # Past Keras's tracking. To clip, it is told the gradients alone.
        vars(self)["is_clipped"] = [
            self._get_variable_index(variable) not in self.never_clipped
            for variable in trainable_variables
        ]
        super()._backend_apply_gradients(grads, trainable_variables)

    def _clip_gradients(self, grads):
        clipped = iter(
            super()._clip_gradients(
                [*itertools.compress(grads, self.is_clipped)]
            )
        )
        return [
            next(clipped) if is_clipped else gradient
            for gradient, is_clipped in zip(grads, self.is_clipped)
        ]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        gradients = [None] * len(self._trainable_variables)
        for gradient, variable in zip(grads, trainable_variables):
            gradients[self._get_variable_index(variable)] = gradient
        with no_gradients():
            self.joint_step(gradients, learning_rate)

    def _apply_weight_decay(self, variables):
        pass


class Pickled:
    """A model or layer that `pickle` takes, whatever its class is called.

    As Keras's own, by the content of a `.keras` file; but theirs name the
    class, which must then be found in a module.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        saving_lib._save_model_to_fileobj(self, file, "h5")
        return load_pickled, (file.getvalue(),)


def load_pickled(content: bytes) -> keras.Layer:
    """What `pickle` makes of a `Pickled`."""
    return saving_lib._load_model_from_fileobj(
        io.BytesIO(content), custom_objects=None, compile=True, safe_mode=False
    )


def count_saved(name: str, filepath: pathlib.Path) -> int:
    """How many layers saved a variable of that name in a file of weights.

    Args:
        name: String.
        filepath: Path of a file that `load_weights` takes.

    Returns:
        Integer.
    """
    if filepath.suffix == ".json":
        shards = json.loads(filepath.read_text())["weight_map"].values()
        names = {n for s in shards for n in ([s] if isinstance(s, str) else s)}
        return sum(count_saved(name, filepath.with_name(n)) for n in names)
    if filepath.suffix == ".keras":
        with zipfile.ZipFile(filepath) as archive:
            content = io.BytesIO(archive.read(saving_lib._VARS_FNAME_H5))
    else:
        content = filepath
    count = 0

    def visit(path):
        nonlocal count
        count += path.split("/")[-1] == name

    with h5py.File(content, "r") as file:
        file.visit(visit)
    return count


def flatten_layers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer and all layers inside it, each once, in their order."""
    return [layer for _, layer in walk_layers(layer)]


def walk_layers(layer: keras.Layer) -> list[tuple[str, keras.Layer]]:
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


def outermost_first(layers: Iterable[keras.Layer]) -> list[keras.Layer]:
    """The layers, each after all those that it is in.

    So `trainable` can be set on one after the other: what holds a layer sets
    it, too, and in the order of `flatten_layers` may come after it, where
    several hold the layer.
    """
    return sorted(
        layers, key=lambda layer: len(flatten_layers(layer)), reverse=True
    )


@contextlib.contextmanager
def unlocked(layer: keras.Layer) -> Iterator[None]:
    """Lets a built layer take new sublayers."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def untrack(layer: keras.Layer, sublayer: keras.Layer) -> None:
    """Makes a layer forget a sublayer that it keeps track of."""
    layer._tracker.untrack(sublayer)


def update_call_signature(layer: keras.Layer) -> None:
    """Makes known what `call` of a layer takes, after its class has changed.

    Keras looks when the layer is made, and passes `training` to those that
    took it then.
    """
    signature = inspect.signature(layer.call)
    names = [*signature.parameters]
    # Past what keeps track of a layer's attributes.
    vars(layer).update(
        _call_signature=signature,
        call_signature_parameters=names,
        _call_has_training_arg="training" in names,
        _call_has_context_arg={
            name: name in names for name in layer._call_context_args
        },
    )


def publish_weights(layer: keras.Layer) -> None:
    """Makes new weights known to what a backend keeps beside Keras's lists.

    A `torch.nn.Module` has parameters of its own, which `zero_grad` clears.
    """
    layer._post_build()


def kernel_of(layer: keras.Layer) -> keras.Variable:
    """The variable that holds the kernel of a layer that can be adapted."""
    return layer._kernel


def has_value(variable: keras.Variable) -> bool:
    """Whether a variable has its value yet; one in a `StatelessScope` has not.

    To ask such a one for it would compute it.
    """
    return variable._value is not None


def layout_of(
    variable: keras.Variable,
) -> keras.distribution.TensorLayout | None:
    """The `keras.distribution.TensorLayout` of a variable, or `None`."""
    return variable._layout


def set_layout(
    variable: keras.Variable, layout: keras.distribution.TensorLayout
) -> None:
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


def layout_map_of(distribution: Any) -> keras.distribution.LayoutMap | None:
    """The `LayoutMap` of a `keras.distribution.ModelParallel`, or `None`."""
    return getattr(distribution, "_layout_map", None)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Variables that are made inside the block never get a value."""
    name = "uninitialized_variables"
    previous = [*global_state.get_global_attribute(name, [])]
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(name, previous)


def added_losses(layer: keras.Layer) -> list[Tensor]:
    """The losses that a layer itself has added in this step, a list."""
    return layer._get_own_losses()


def clear_losses(layer: keras.Layer) -> None:
    """Forgets the losses that a layer and those inside it have added."""
    layer._clear_losses()


@contextlib.contextmanager
def losses_kept(layer: keras.Layer) -> Iterator[None]:
    """The losses of a layer, or `None`, are after the block as before."""
    layers = [] if layer is None else flatten_layers(layer)
    kept = [(layer, [*layer._losses]) for layer in layers]
    try:
        yield
    finally:
        for layer, losses in kept:
            layer._losses.clear()
            layer._losses.extend(losses)


def entry_layer() -> keras.Layer | None:
    """The outermost layer that is being called, or `None`."""
    context = global_state.get_global_attribute("current_call_ctx")
    return None if context is None else context.entry_layer


def entry_models() -> list[keras.Model]:
    """The models that were called, but for those inside of them, a list."""
    entries = [entry_layer()]
    if keras.config.backend() == "jax":
        # Of those whose `call` is called in place of themselves, Keras knows
        # nothing.
        entries += [
            frame.f_locals.get("self")
            for frame in stack_of_calls()
            if frame.f_code.co_name == "stateless_call"
        ]
    return [entry for entry in entries if isinstance(entry, keras.Model)]


def trace_state() -> Any:
    """What differs where a backend traces a function within another one."""
    if keras.config.backend() == "jax":
        import jax
        from jax.extend import core

        # Before JAX 0.10 it was elsewhere.
        if not hasattr(core, "get_opaque_trace_state"):
            core = jax.core
        return core.get_opaque_trace_state()
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # `tf.vectorized_map` traces into the same graph, for one element.
        is_mapped = any(
            "/parallel_for/" in frame.f_code.co_filename
            for frame in stack_of_calls()
        )
        return tf.compat.v1.get_default_graph(), is_mapped
    if is_compiling():
        return None
    import torch

    return torch._C._functorch.maybe_current_level()


def to_features(x: Tensor, dtype: str) -> Tensor:
    """Dense floats, of any tensor that Keras's layers take.

    Args:
        x: Tensor, dense or sparse.
        dtype: String, of what is made of integers and booleans.
    """
    if _is_sparse(x):
        x = ops.convert_to_tensor(x, sparse=False)
    if not keras.backend.is_float_dtype(x.dtype):
        x = ops.cast(x, dtype)
    return x


def _is_sparse(x):
    if keras.config.backend() == "jax":
        from jax.experimental import sparse

        return isinstance(x, sparse.JAXSparse)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return isinstance(x, tf.SparseTensor)
    return False


def without_moving(
    variables: Sequence[keras.Variable],
    model: keras.Model,
    step: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    """Calls a training step, and leaves some variables as they were before it.

    Args:
        variables: List of `keras.Variable` of the model, which train.
        model: `keras.Model`.
        step: Function, its `train_step`.
        arguments: Tuple, what it is called with.

    Returns:
        What the step returned.
    """
    if keras.config.backend() == "jax":
        kept_ids = {id(variable) for variable in variables}
        logs, (after, *state) = step(*arguments)
        values = [
            old if id(variable) in kept_ids else new
            for variable, old, new in zip(
                model.trainable_variables, arguments[0][0], after
            )
        ]
        return logs, (values, *state)
    values = [ops.copy(variable.value) for variable in variables]
    logs = step(*arguments)
    with no_gradients():
        for variable, value in zip(variables, values):
            variable.assign(value)
    return logs


@contextlib.contextmanager
def values_kept(model: keras.Model) -> Iterator[None]:
    """Gives a model its values back if what runs inside the block raises.

    On JAX Keras takes them while `fit` runs, and forgets them then.
    """
    if keras.config.backend() != "jax":
        yield
        return
    purge, purged = model._purge_model_variables, []

    def remember_and_purge(**kinds):
        optimizer = getattr(model, "optimizer", None)
        purged[:] = [
            (variable, variable.value)
            for variable in [
                *model.variables,
                *(optimizer.variables if optimizer else ()),
                *model.metrics_variables,
            ]
        ]
        purge(**kinds)

    vars(model)["_purge_model_variables"] = remember_and_purge
    try:
        yield
    except BaseException:
        # Of the last step, if there was one.
        with contextlib.suppress(RuntimeError):
            model.jax_state_sync()
        for variable, value in purged:
            if not has_value(variable) and not value.is_deleted():
                variable.assign(value)
        raise
    finally:
        del vars(model)["_purge_model_variables"]


def no_gradients() -> AbstractContextManager[Any]:
    """Context in which PyTorch records nothing for gradients."""
    if keras.config.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def add_to_update(
    optimizer: keras.optimizers.Optimizer, function: Callable[..., None]
) -> None:
    """Has a function called after each update of an optimizer, in the step.

    Args:
        optimizer: `keras.optimizers.Optimizer` that wraps no other.
        function: Function of the list of gradients and that of variables.
    """
    update = optimizer._backend_update_step

    def update_and_call(gradients, variables, learning_rate):
        update(gradients, variables, learning_rate)
        with no_gradients():
            function(gradients, variables)

    # Keras would track what is set the usual way.
    vars(optimizer)["_backend_update_step"] = update_and_call


def restore_update(optimizer: keras.optimizers.Optimizer) -> None:
    """Takes away what `add_to_update` added."""
    vars(optimizer).pop("_backend_update_step", None)


def untrack_optimizer_variable(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> None:
    """Takes a variable out of those that an optimizer saves and restores."""
    optimizer._untrack_variable(variable)


def num_steps_of(optimizer: keras.optimizers.Optimizer) -> int:
    """Integer, the steps that an optimizer has seen: its updates or more."""
    return int(ops.convert_to_numpy(optimizer._iterations))


class SavedApart(KerasSaveable):
    """Variables that are saved and loaded under an attribute of their own.

    Args:
        variables: List of `keras.Variable`.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self.variables = variables

    def save_own_variables(self, store: Any) -> None:
        for index, variable in enumerate(self.variables):
            store[str(index)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        if len(store.keys()) == len(self.variables):
            for index, variable in enumerate(self.variables):
                variable.assign(store[str(index)])

    def _obj_type(self):
        return "Optimizer"


def save_apart(
    optimizers: Sequence[keras.optimizers.Optimizer],
    parts: Mapping[str, Sequence[keras.Variable]],
) -> None:
    """Has some variables of an optimizer saved beside it, and not in it.

    Where they are gone, or not there yet, it loads its own none the less.

    Args:
        optimizers: List of `keras.optimizers.Optimizer`, of which each wraps
            the next, and the last one has the variables.
        parts: Dict of a name in the file to a list of `keras.Variable`. None
            for an optimizer as it was.
    """
    ids = {id(variable) for part in parts.values() for variable in part}
    for optimizer in optimizers:
        # Past Keras's tracking.
        attributes = vars(optimizer)
        for name in ("save_own_variables", "load_own_variables"):
            attributes.pop(name, None)
            if parts:
                attributes[name] = functools.partial(
                    _call_without, name, optimizer, ids
                )
    attributes = vars(optimizers[-1])
    for name in [n for n, v in attributes.items() if isinstance(v, SavedApart)]:
        del attributes[name]
    for name, variables in parts.items():
        attributes[name] = SavedApart(variables)


def _call_without(name, optimizer, left_out_ids, store):
    """Saves or loads an optimizer as if it did not have some variables."""
    optimizer_class = type(optimizer)

    class Without(optimizer_class):
        @property
        def variables(self):
            return [
                variable
                for variable in super().variables
                if id(variable) not in left_out_ids
            ]

    view = object.__new__(Without)
    object.__setattr__(view, "__dict__", vars(optimizer))
    getattr(optimizer_class, name)(view, store)


def get_keras_mask(x: Tensor) -> Tensor | None:
    """The Keras mask that travels with a tensor, or `None`."""
    return backend.get_keras_mask(x)


def trace_makes_state(model: keras.Model) -> bool:
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


def make_state(
    model: keras.Model, iterator: Any = None, data_batch: Any = None
) -> None:
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


def float_kernel(layer: keras.Layer, full_precision: bool = False) -> Tensor:
    """The kernel of a layer in its own shape, dequantized.

    Args:
        layer: Layer with one kernel, quantized in the modes `"int8"` or
            `"int4"`, or not.
        full_precision: Boolean. Whether it is of the dtype in which the kernel
            is stored, float32 where that is of integers.

    Returns:
        Tensor, of the layer's compute dtype otherwise.
    """
    if full_precision:
        with AutocastScope(None):
            kernel = _float_kernel(layer)
            # TensorFlow would read a variable later.
            is_variable = isinstance(kernel, keras.Variable)
            return kernel.value if is_variable else kernel
    return ops.cast(_float_kernel(layer), layer.compute_dtype)


def _float_kernel(layer):
    mode = layer.quantization_mode
    kernel = layer.kernel
    if mode is None:
        return kernel
    shape, scale = kernel.shape, layer.kernel_scale
    if mode == "int4":
        # A matrix, as it is packed.
        kernel = ops.reshape(kernel, (-1, scale.shape[-1]))
    elif isinstance(layer, keras.layers.EinsumDense):
        scale = layer._adjust_scale_for_dequant(scale)
    if getattr(layer, "kernel_zero", None) is not None:
        kernel = dequantize_with_sz_map(
            kernel, scale, layer.kernel_zero, layer.g_idx, group_axis=0
        )
    else:
        kernel = ops.divide(ops.cast(kernel, "float32"), scale)
    return ops.reshape(kernel, shape)
