"""Which tokens count: what the layers around an adapted layer know of it.

The tokens that padding fills must not count in the terms of the VAE. An
adapted layer sits deep inside a model, where Keras masks do not reach and a
`padding_mask` input is not passed on. So the layers around it say, for the
time of their call, which masks they were called with.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend.scoped import ScopedValue
from keras_fvae.backend.types import Tensor

# From the outermost layer being called to the innermost: what `find_masks`
# returned for each.
_known_masks = ScopedValue(default=())


def known_masks(
    masks: list[tuple[Tensor, Tensor]], inherit: bool = True
) -> AbstractContextManager[None]:
    """Makes masks known to the adapted layers called inside the block.

    Args:
        masks: List of pairs, as `find_masks` returns.
        inherit: Boolean. Whether the masks that are known outside the block
            stay known. Not so in a model inside a model, such as an image
            encoder in a language model: its tokens are others.
    """
    outer = _known_masks.value if inherit else ()
    return _known_masks.set_to((*outer, masks))


def find_masks(arguments: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The masks among a layer's call arguments that say which tokens count.

    Args:
        arguments: Dict of name to value, the arguments of `call` in the order
            of its signature, with those that are left at their defaults.

    Returns:
        List of pairs of a sequence and its mask, of which one may be `None`.
        Sequences are the first argument and others of as many axes. Masks are
        the arguments, or entries of a dict of inputs, that are named `mask`,
        `query_mask`, `key_mask`, `value_mask` or end in `padding_mask`, else
        those `attention_mask`s that are the same for each query. Layers take
        them in the order of the sequences.
    """
    sequences = _sequences(
        value for name, value in arguments.items() if not name.endswith("mask")
    )
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        entries = value if isinstance(value, dict) else {name: value}
        named |= {str(name): value for name, value in entries.items()}
    masks = [named[name] for name in named if _is_token_mask(name)]
    if not masks:
        masks = [
            _drop_query_axis(mask)
            for name, mask in named.items()
            if name.endswith("attention_mask")
        ]
        # A single one of attention between two sequences is of the second.
        if len(masks) < len(sequences):
            masks = []
    pairs = list(itertools.zip_longest(sequences, masks))
    if sequences and pairs[0][1] is None:
        keras_mask = keras_internals.get_keras_mask(sequences[0])
        pairs[0] = sequences[0], keras_mask
    return pairs


def find_token_mask(inputs: Tensor, num_token_axes: int) -> Tensor | None:
    """The mask for the tokens of an adapted layer's inputs.

    Args:
        inputs: Tensor, what the layer is called on.
        num_token_axes: Integer, how many of its first axes are token axes.

    Returns:
        A tensor whose shape is that of the first axes of `inputs`, or `None`
        if nothing is known: then every token counts.
    """
    own_pair = inputs, keras_internals.get_keras_mask(inputs)
    for pairs in reversed((*_known_masks.value, [own_pair])):
        own_masks = [mask for sequence, mask in pairs if sequence is inputs]
        for mask in own_masks or [mask for _, mask in pairs]:
            if _fits(mask, inputs, num_token_axes) and (
                own_masks or _is_of_the_first_axes(mask, inputs, num_token_axes)
            ):
                return mask
    return None


def flatten_mask(
    mask: Tensor | None, token_shape: Sequence[Any]
) -> Tensor | None:
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


def _sequences(values):
    """The tensors among a layer's arguments with as many axes as the first."""
    sequences = []
    for value in values:
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            is_sequence = len(getattr(tensor, "shape", ())) >= 2 and (
                not sequences or len(tensor.shape) == len(sequences[0].shape)
            )
            if is_sequence and not any(tensor is s for s in sequences):
                sequences.append(tensor)
    return sequences


def _is_token_mask(name):
    # Not `attention_mask` and its like, which relate pairs of tokens.
    return name.endswith("padding_mask") or name in (
        "mask",
        "query_mask",
        "key_mask",
        "value_mask",
    )


def _drop_query_axis(mask):
    """A mask of keys from one of shape `(batch, 1, keys)`, else `None`."""
    shape = getattr(mask, "shape", ())
    if len(shape) == 3 and shape[1] == 1:
        return ops.squeeze(mask, axis=1)
    return None


def _fits(mask, inputs, num_token_axes):
    if not hasattr(mask, "shape"):
        return False
    rank = len(mask.shape)
    return 1 <= rank <= num_token_axes and all(
        None in (given, needed) or given == needed
        for given, needed in zip(mask.shape, inputs.shape)
    )


def _is_of_the_first_axes(mask, inputs, num_token_axes):
    """Whether a mask of another sequence can be of no other axes of these.

    Inside attention the axis after that of the batch is of tokens or of heads,
    and there may be as many of these as of those.
    """
    num_axes = len(mask.shape)
    if num_axes == num_token_axes:
        return True
    sizes = tuple(mask.shape)[1:]
    others = tuple(inputs.shape)[num_axes:num_token_axes]
    return sizes == tuple(inputs.shape)[1:num_axes] and not {*sizes} & {*others}
