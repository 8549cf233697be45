"""Copies of a model that train together, each on its part of a batch.

Keras runs a step once for each replica of a `tf.distribute` strategy. On JAX a
step sees the whole batch, on however many devices and processes it is; only
what is read from the model, or from files, knows of the processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend.types import Tensor


def token_weights(mask: Tensor | None, num_tokens: Any) -> Tensor | None:
    """What each token weighs in the mean over the tokens that count.

    Where a batch is shared among replicas, the mean is that of the batch: the
    replicas' weights sum to their number, since Keras takes the mean over the
    replicas after.

    Args:
        mask: Optional tensor of shape `(tokens,)`, 1 or `True` for the tokens
            that count. `None` counts them all.
        num_tokens: Integer or scalar tensor.

    Returns:
        Float32 tensor of shape `(tokens,)`, or `None` if all weigh the same.
        If none counts, all weigh nothing.
    """
    if mask is None and _replica_context() is None:
        return None
    counts = (
        ops.ones((num_tokens,)) if mask is None else ops.cast(mask, "float32")
    )
    return ops.divide_no_nan(counts, mean_over_replicas(ops.sum(counts)))


def mean_over_replicas(value: Tensor) -> Tensor:
    """The mean of a tensor over the replicas; the tensor, if there is one."""
    context = _replica_context()
    if context is None:
        return value
    import tensorflow as tf

    # Meanwhile other replicas may call the same layers, in their threads.
    with keras_internals.losses_kept(keras_internals.entry_layer()):
        return context.all_reduce(tf.distribute.ReduceOp.MEAN, value)


def sum_over_replicas(values: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over the replicas; the tensors, if there is one.

    Args:
        values: List of tensors.
    """
    context = _replica_context()
    if context is None:
        return values
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def assign(
    variables: Sequence[keras.Variable], values: Sequence[Tensor]
) -> None:
    """Assigns to each variable its value, on each replica its own.

    Keras's variables would refuse that, because they cannot know that the
    replicas have come to the same.

    Args:
        variables: List of `keras.Variable`.
        values: List of tensors.
    """
    context = _replica_context()
    if context is None:
        for variable, value in zip(variables, values):
            variable.assign(value)
        return

    def assign_all(strategy, values):
        for variable, value in zip(variables, values):
            strategy.extended.update(
                variable.value,
                lambda variable, value: variable.assign(value),
                args=(value,),
                group=False,
            )

    context.merge_call(assign_all, args=(values,))


def are_several() -> bool:
    """Whether this is one of several replicas of `tf.distribute`."""
    return _replica_context() is not None


def replica_index() -> Tensor:
    """Which replica this is: integer, or scalar tensor; 0 if there is one."""
    context = _replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


def scope_of(variable: keras.Variable) -> AbstractContextManager[Any]:
    """The scope in which new variables are on the replicas a variable is on.

    Args:
        variable: `keras.Variable`.

    Returns:
        Context manager, which does nothing but on TensorFlow.
    """
    strategy = _strategy_of(variable)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def has_replicas(variable: keras.Variable) -> bool:
    """Whether a variable is on several replicas of `tf.distribute`."""
    strategy = _strategy_of(variable)
    return strategy is not None and strategy.num_replicas_in_sync > 1


def spans_processes(variables: Sequence[keras.Variable]) -> bool:
    """Whether some variables lie on devices of several processes."""
    return keras.config.backend() == "jax" and not all(
        variable.value.is_fully_addressable for variable in variables
    )


def is_first_process() -> bool:
    """Whether this process is the one to write what all of them share."""
    import jax

    return jax.process_index() == 0


def to_numpy(value: Tensor) -> np.ndarray:
    """NumPy array of a tensor or variable, wherever its shards are.

    Where they lie with several processes, all of these must call this.
    """
    value = ops.convert_to_tensor(value)
    if keras.config.backend() == "jax" and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)
    return ops.convert_to_numpy(value)


def from_first_process(read: Callable[[], bytes]) -> bytes:
    """What the first process reads, for all processes, which must call this.

    Args:
        read: Function without arguments that returns bytes.

    Returns:
        Bytes.

    Raises:
        OSError: If the function raised one.
    """
    from jax.experimental import multihost_utils

    def broadcast(array):
        return np.asarray(multihost_utils.broadcast_one_to_all(array))

    content, error = b"", OSError("The first process could not read it.")
    if is_first_process():
        try:
            content, error = read(), None
        except OSError as raised:
            error = raised
    size = int(broadcast(np.int32(-1 if error else len(content))))
    if size < 0:
        raise error
    array = np.zeros(size, "uint8")
    if is_first_process():
        array = np.frombuffer(content, "uint8")
    return broadcast(array).astype("uint8").tobytes()


def _strategy_of(variable):
    """The `tf.distribute` strategy of a variable, if there is one."""
    is_tensorflow = keras.config.backend() == "tensorflow"
    if not (is_tensorflow and keras_internals.has_value(variable)):
        return None
    return getattr(variable.value, "distribute_strategy", None)


def _replica_context():
    """That of `tf.distribute`, if this is one of several replicas."""
    if keras.config.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context
