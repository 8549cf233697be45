"""Results that are computed once more for the gradient, and not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_fvae.backend.types import Tensor


def rematerialize(
    draw: Callable[..., Any],
    function: Callable[..., Any],
    inputs: dict[str, Tensor],
    seed: Tensor | None,
) -> Any:
    """Calls a function, and keeps for its gradient little but its arguments.

    As `keras.remat`, whose second computation XLA joins with the first one on
    CPUs, and with TensorFlow on GPUs as well, so that all is kept after all.
    Here it begins with the gradient that arrives: it can neither be joined with
    the first nor be done early.

    On PyTorch `keras.remat` does what it says, and what was drawn is kept.

    Args:
        draw: Function of the two last arguments, or of `inputs` alone, that
            returns a dict of what the function needs besides.
        function: Function of keyword arguments: `inputs`, and what was drawn.
            It returns nested float tensors, not all of them scalars.
        inputs: Dict of name to float tensor, which has a gradient. What is
            made of vectors alone may be kept.
        seed: Integer tensor, what `draw` draws from, or `None`.

    Returns:
        What `function` returned.
    """
    if keras.config.backend() == "torch":
        return keras.remat(function)(**inputs, **draw(inputs, seed))
    outputs = None

    def flat_function(*arguments):
        nonlocal outputs
        given = dict(zip(inputs, arguments))
        outputs = function(**given, **draw(given, *arguments[len(inputs) :]))
        return tuple(keras.tree.flatten(outputs))

    @ops.custom_gradient
    def compute(*arguments):
        floats, seeds = arguments[: len(inputs)], arguments[len(inputs) :]

        def gradient(*upstream):
            # JAX passes one tuple, TensorFlow the tensors in it.
            upstream = tuple(keras.tree.flatten(upstream))
            # Compilers don't take it for 0: of what is not finite it is not.
            # What arrives for scalars, they may know beforehand.
            zero = sum(
                ops.sum(0.0 * each) for each in upstream if len(each.shape) > 0
            )

            def wait(tensor):
                return tensor + ops.cast(zero, tensor.dtype)

            def once_more(*floats):
                # What is made of a vector is small enough to be kept, and the
                # code to make it once more is not.
                return flat_function(
                    *(f if len(f.shape) == 1 else wait(f) for f in floats),
                    *map(wait, seeds),
                )

            gradients = _gradients(once_more, floats, upstream)
            return (*gradients, *(None for _ in seeds))

        return flat_function(*arguments), gradient

    seeds = () if seed is None else (seed,)
    flat_outputs = compute(*inputs.values(), *seeds)
    return keras.tree.pack_sequence_as(outputs, flat_outputs)


def _gradients(function, arguments, upstream):
    """The gradients with respect to the arguments of a function.

    Args:
        function: Function of the arguments, which returns a tuple of tensors.
        arguments: Tuple of tensors.
        upstream: Tuple of tensors, those with respect to the results.

    Returns:
        Sequence of tensors; on TensorFlow `None` where nothing depends on an
        argument.
    """
    if keras.config.backend() == "jax":
        import jax

        _, gradients_of = jax.vjp(function, *arguments)
        return gradients_of(upstream)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(arguments)
        results = function(*arguments)
    return tape.gradient(results, arguments, output_gradients=upstream)
