"""Operations whose gradients need their results, and not what went into them.

XLA computes in the backward pass again what is cheap to compute, and keeps
what that begins with: here the random bits, several times as large as what
came of them.
"""

import keras
from keras import ops


def relu_and_dropout(x, is_kept, rate):
    """ReLU, and then dropout.

    Args:
        x: Float tensor.
        is_kept: Boolean tensor of the same shape, the units that stay.
        rate: Float in `(0, 1)`, the share of those that don't.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    scale = 1 / (1 - rate)

    def forward(x, is_kept):
        return ops.where(is_kept, ops.relu(x * scale), 0)

    def gradients(y, upstream, x, is_kept):
        # Neither ReLU nor dropout lets through where nothing came.
        return ops.where(y > 0, upstream * scale, 0), None

    return _differentiate(forward, gradients, x, is_kept)


def add_noise(mean, log_variance, noise):
    """mean + standard deviation * noise.

    Args:
        mean: Float32 tensor.
        log_variance: Float32 tensor of the same shape.
        noise: Float32 tensor of the same shape. It has no gradient.

    Returns:
        Float32 tensor of the same shape.
    """

    def forward(mean, log_variance, noise):
        return mean + ops.exp(0.5 * log_variance) * noise

    def gradients(z, upstream, mean, log_variance, noise):
        return upstream, 0.5 * upstream * (z - mean), None

    return _differentiate(forward, gradients, mean, log_variance, noise)


def _differentiate(forward, gradients, *arguments):
    """Calls a function whose gradients are given.

    Args:
        forward: Function of the arguments, which returns a tensor.
        gradients: Function of that tensor, the gradient with respect to it
            and the arguments, which returns the gradients with respect to
            these.
    """
    if keras.config.backend() != "jax":
        # There it makes no difference to what is kept.
        return forward(*arguments)

    @ops.custom_gradient
    def compute(*arguments):
        result = forward(*arguments)

        def gradient(upstream):
            return gradients(result, upstream, *arguments)

        return result, gradient

    return compute(*arguments)
