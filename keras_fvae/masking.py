"""Which tokens count: what the layers around an adapted layer know of it.

The tokens that padding fills must not count in the terms of the VAE. An
adapted layer sits deep inside a model, where Keras masks do not reach and a
`padding_mask` input is not passed on. So the layers around it say, for the
time of their call, which masks they were called with.
"""

import contextlib
import contextvars

from keras import ops

from keras_fvae import keras_internals

# From the outermost layer being called to the innermost: its masks by name.
_known_masks = contextvars.ContextVar("known_masks", default=())


@contextlib.contextmanager
def known_masks(masks, inherit=True):
    """Makes masks known to the adapted layers called inside the block.

    Args:
        masks: Dict of name to tensor, as `find_masks` returns.
        inherit: Boolean. Whether the masks that are known outside the block
            stay known. Not so in a model inside a model, such as an image
            encoder in a language model: its tokens are others.
    """
    outer = _known_masks.get() if inherit else ()
    token = _known_masks.set((*outer, masks))
    try:
        yield
    finally:
        _known_masks.reset(token)


def find_masks(arguments):
    """The masks among a layer's call arguments that say which tokens count.

    Args:
        arguments: Dict of name to value, the arguments of `call`.

    Returns:
        Dict of name to tensor: arguments, or entries of a dict of inputs,
        that are named `mask`, `query_mask`, `key_mask`, `value_mask` or end
        in `padding_mask`, and the Keras mask of the first argument.
    """
    masks = {}
    for value in arguments.values():
        mask = keras_internals.get_keras_mask(value)
        if mask is not None:
            masks["mask"] = mask
        break
    for name, value in arguments.items():
        named = value.items() if isinstance(value, dict) else [(name, value)]
        for name, value in named:
            if value is not None and _is_token_mask(name):
                masks[name] = value
    return masks


def find_token_mask(inputs, num_token_axes, layer_name):
    """The mask for the tokens of an adapted layer's inputs.

    Args:
        inputs: Tensor, what the layer is called on.
        num_token_axes: Integer, how many of its first axes are token axes.
        layer_name: String, the layer's name. Of several masks that fit, the
            one of that name is taken: `value_mask` for the layer `value`.

    Returns:
        A tensor whose shape is that of the first axes of `inputs`, or `None`
        if nothing is known: then every token counts.
    """
    own_mask = keras_internals.get_keras_mask(inputs)
    scopes = (*_known_masks.get(), {"mask": own_mask})
    for masks in reversed(scopes):
        fitting = {
            name: mask
            for name, mask in masks.items()
            if mask is not None and _fits(mask, inputs, num_token_axes)
        }
        for name, mask in fitting.items():
            if name == f"{layer_name}_mask":
                return mask
        if fitting:
            return next(iter(fitting.values()))
    return None


def flatten_mask(mask, token_shape):
    """A mask of the first token axes, as one value for each token.

    Args:
        mask: Tensor of the shape of the first axes of `token_shape`, or
            `None`.
        token_shape: Tuple of integers or scalar tensors.

    Returns:
        Tensor of shape `(number of tokens,)`, or `None`.
    """
    if mask is None:
        return None
    missing_axes = len(token_shape) - len(mask.shape)
    if missing_axes > 0:
        mask = ops.reshape(mask, (*ops.shape(mask), *[1] * missing_axes))
        mask = ops.broadcast_to(mask, token_shape)
    return ops.reshape(mask, (-1,))


def _is_token_mask(name):
    # Not `attention_mask` and its like, which relate pairs of tokens.
    return name.endswith("padding_mask") or name in (
        "mask",
        "query_mask",
        "key_mask",
        "value_mask",
    )


def _fits(mask, inputs, num_token_axes):
    if not hasattr(mask, "shape"):
        return False
    rank = len(mask.shape)
    return 1 <= rank <= num_token_axes and all(
        None in (given, needed) or given == needed
        for given, needed in zip(mask.shape, inputs.shape)
    )
