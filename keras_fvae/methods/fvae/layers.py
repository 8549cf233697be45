"""Dense layers whose update comes from an FVAE."""

from __future__ import annotations

from typing import Any

import keras

from keras_fvae.layers.adapted import AdaptedDense
from keras_fvae.layers.adapted import AdaptedEinsumDense
from keras_fvae.layers.adapted import in_place_class
from keras_fvae.layers.config import DEFAULT_RANK
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.config import resolve_config


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAELoRADense(AdaptedDense):
    """`keras.layers.Dense`, frozen, with an FVAE-LoRA update.

    `output = activation(dot(input, kernel) + bias + scale * dot(z1, B))`,
    where z1 is drawn from the posterior that an FVAE gives each input vector
    in training, and is the posterior's mean at inference. Only the FVAE and B
    are trained; in training the layer adds the FVAE's loss.

    Args:
        units: Positive integer, dimensionality of the output space.
        rank: Positive integer, width of the latents. Defaults to `16`.
        config: Optional `keras_fvae.FVAELoRAConfig` with all settings, whose
            `rank` then counts.
        **kwargs: Every argument of `keras.layers.Dense`, but for LoRA's. The
            `kernel_regularizer` applies to B; the `kernel_constraint` has
            nothing to act on, since the kernel is frozen.

    Input shape:
        N-D tensor with shape `(batch_size, ..., input_dim)`. Each vector
        along the last axis is a token of the FVAE.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units)`.

    Raises:
        ValueError: If `rank` is not a positive integer, or not that of
            `config`, or a LoRA argument is given.

    Example:

    >>> layer = keras_fvae.FVAELoRADense(8, rank=4, activation="relu")
    >>> tuple(layer(np.ones((2, 10, 32))).shape)
    (2, 10, 8)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(
        self,
        units: int,
        rank: int = DEFAULT_RANK,
        config: FVAELoRAConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(units, resolve_config(rank, config), **kwargs)


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAELoRAEinsumDense(AdaptedEinsumDense):
    """`keras.layers.EinsumDense`, frozen, with an FVAE-LoRA update.

    As `keras_fvae.FVAELoRADense`, for any equation in which each kernel axis
    is either contracted with the input or carried to the output. A token is
    the vector of all contracted axes, of width d; B is `(rank, k)`, with k
    the number of elements of all carried axes.

    Args:
        equation: String, an einsum equation such as `"abc,cde->abde"`.
        output_shape: Integer or tuple, as in `keras.layers.EinsumDense`.
        rank: Positive integer, width of the latents. Defaults to `16`.
        config: Optional `keras_fvae.FVAELoRAConfig` with all settings, whose
            `rank` then counts.
        **kwargs: Every argument of `keras.layers.EinsumDense`, but for
            LoRA's. The `kernel_regularizer` applies to B; the
            `kernel_constraint` has nothing to act on, since the kernel is
            frozen.

    Raises:
        ValueError: If `rank` is not a positive integer, or not that of
            `config`, a LoRA argument is given, or (when the layer is built)
            the equation cannot be adapted.

    Example:

    >>> layer = keras_fvae.FVAELoRAEinsumDense(
    ...     "abc,cde->abde", output_shape=(None, 2, 8), rank=4, bias_axes="de"
    ... )
    >>> tuple(layer(np.ones((2, 10, 32))).shape)
    (2, 10, 2, 8)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(
        self,
        equation: str,
        output_shape: int | tuple[int | None, ...],
        rank: int = DEFAULT_RANK,
        config: FVAELoRAConfig | None = None,
        **kwargs: Any,
    ) -> None:
        config = resolve_config(rank, config)
        super().__init__(equation, output_shape, config, **kwargs)


# A file may name them before one was made.
in_place_class(FVAELoRADense)
in_place_class(FVAELoRAEinsumDense)
