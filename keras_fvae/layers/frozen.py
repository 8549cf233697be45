"""A frozen layer, and one call of it, as its adapter sees them."""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend.types import Tensor
from keras_fvae.layers import masking
from keras_fvae.layers.contraction import analyze_equation
from keras_fvae.layers.convolution import Convolution
from keras_fvae.layers.linear_map import LinearMap

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
# The layers that can be adapted.
BASES = (keras.layers.Dense, keras.layers.EinsumDense, *CONVOLUTIONS)


def linear_map_of(
    layer: keras.Layer, input_rank: int | None = None
) -> LinearMap:
    """How a layer is a linear map of tokens.

    Args:
        layer: Layer of one of `BASES`.
        input_rank: Integer, the number of axes of its input. `None` (default)
            means as many as a built layer takes, at least.

    Returns:
        A `LinearMap`.

    Raises:
        ValueError: If it is none, or a convolution in groups of channels.
    """
    input_rank = input_rank or input_rank_of(layer)
    if isinstance(layer, keras.layers.Dense):
        return analyze_equation("...d,dk->...k", input_rank)
    if isinstance(layer, keras.layers.EinsumDense):
        return analyze_equation(layer.equation, input_rank)
    if layer.groups > 1:
        raise ValueError(
            "No adapter fits a convolution in several groups of channels. Each "
            "filter sees the channels of its group, and A would see them all: "
            "with many groups, more weights would be added than are adapted. "
            f"Received: groups={layer.groups}, for the layer '{layer.name}'."
        )
    return Convolution(
        size=layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation=layer.dilation_rate,
        data_format=layer.data_format,
    )


def input_rank_of(layer: keras.Layer) -> int:
    """Integer, how many axes the input of a built layer has, at least."""
    return layer.input_spec.ndim or layer.input_spec.min_ndim


class FrozenCall:
    """One call of a frozen layer: what goes in, what it would give.

    Tokens are the vectors that the kernel is applied to, wherever these are in
    the layer's input; outputs are as the layer has them.

    Args:
        layer: Adapted layer.
        compute_outputs: Function without arguments, which returns what the
            frozen layer computes before its activation.
        inputs: Tensor, the layer's input.
    """

    def __init__(
        self,
        layer: keras.Layer,
        compute_outputs: Callable[[], Tensor],
        inputs: Tensor,
    ) -> None:
        self.layer = layer
        self.outputs = compute_outputs
        self.inputs = inputs
        self.linear_map: LinearMap = linear_map_of(layer, len(inputs.shape))
        self.kernel_shape: tuple[int, ...] = layer.adapter.kernel_shape

    @property
    def tokens(self) -> Tensor:
        """Tensor of shape `(..., d)`. Of a convolution, all its patches."""
        return self.linear_map.to_tokens(self.inputs, self.kernel_shape)

    def find_mask(self) -> Tensor | None:
        """Tensor that says which tokens count, or `None` if all do.

        Of the shape of the first axes of the tokens.
        """
        mask = masking.find_token_mask(
            self.inputs, self.linear_map.num_leading_token_axes
        )
        return self.linear_map.mask_tokens(mask, self.inputs)

    @property
    def is_quantized(self) -> bool:
        """Boolean, whether the frozen kernel is of integers."""
        return self.layer.quantization_mode is not None

    def kernel(self, full_precision: bool = False) -> Tensor:
        """Tensor of shape `(d, k)`, the frozen kernel, dequantized.

        Args:
            full_precision: Boolean. Whether it is of the dtype in which the
                kernel is stored, and not of the compute dtype.
        """
        return self.linear_map.to_matrix(
            keras_internals.float_kernel(self.layer, full_precision)
        )

    def bias(self) -> Tensor | None:
        """Tensor that broadcasts to the outputs, or `None`."""
        if self.layer.bias is None:
            return None
        return self.linear_map.broadcast_bias(self.layer.bias)

    def project(self, matrix: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The tokens times a matrix, in the compute dtype.

        Args:
            matrix: Variable or tensor of shape `(d, rank)`.
            inputs: Optional tensor to take in the place of `self.inputs`.

        Returns:
            Tensor of shape `(..., rank)`.
        """
        inputs = self.inputs if inputs is None else inputs
        return self.linear_map.project(inputs, matrix, self.kernel_shape)

    def add_product(
        self, outputs: Tensor, projected: Tensor, matrix: Tensor
    ) -> Tensor:
        """Adds a map of tokens to outputs.

        Args:
            outputs: Tensor, what `outputs()` returned. On PyTorch it may be
                changed in place.
            projected: Tensor of shape `(..., rank)`, a vector for each token.
            matrix: Tensor of shape `(rank, k)`.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        return self.linear_map.add_product(
            outputs, projected, matrix, self.inputs, self.kernel_shape
        )

    def add_for_tokens(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Adds to outputs what there is for each token.

        Args:
            outputs: Tensor, what `outputs()` returned. On PyTorch they change.
            values: Tensor of shape `(..., k)`, a vector for each token.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        outputs += self.linear_map.from_tokens(
            ops.cast(values, outputs.dtype), self.inputs, self.kernel_shape
        )
        return outputs

    def multiply(self, matrix: Tensor) -> Tensor:
        """Outputs by another kernel than the frozen one, and no bias.

        Args:
            matrix: Tensor of shape `(d, k)`.

        Returns:
            Tensor of the shape of the outputs.
        """
        return self.linear_map.multiply(self.inputs, matrix, self.kernel_shape)

    def for_units(self, values: Tensor) -> Tensor:
        """Values `(k,)`, one for each unit, that broadcast to the outputs."""
        shape = self.linear_map.bias_shape(self.kernel_shape)
        return self.linear_map.broadcast_bias(ops.reshape(values, shape))
