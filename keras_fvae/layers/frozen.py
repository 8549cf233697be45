"""One call of a frozen layer, as its adapter sees it."""

from keras import ops

from keras_fvae.backend import fast_ops
from keras_fvae.backend import keras_internals
from keras_fvae.layers import masking
from keras_fvae.layers.contraction import analyze_equation


class FrozenCall:
    """One call of a frozen layer: what goes in, what it would give.

    Tokens are the vectors that the kernel is applied to, whatever axes these
    have in the layer's input; outputs are as the layer has them.

    Args:
        layer: Adapted layer.
        compute_outputs: Function without arguments, which returns what the
            frozen layer computes before its activation.
        inputs: Tensor, the layer's input.
    """

    def __init__(self, layer, compute_outputs, inputs):
        self.layer = layer
        self.outputs = compute_outputs
        self.inputs = inputs
        self.contraction = analyze_equation(
            layer.adapter.equation, len(inputs.shape)
        )
        self.kernel_shape = layer.adapter.kernel_shape
        # Of shape `(..., d)`.
        self.tokens = self.contraction.to_tokens(inputs, self.kernel_shape)

    @property
    def token_shape(self):
        """Tuple, the shape of the tokens without their last axis."""
        return self.contraction.token_shape(self.inputs)

    def find_mask(self):
        """Tensor that says which tokens count, or `None` if all do.

        Of the shape of the first axes of the tokens.
        """
        return masking.find_token_mask(
            self.inputs, self.contraction.num_leading_token_axes
        )

    @property
    def is_quantized(self):
        """Boolean, whether the frozen kernel is of integers."""
        return self.layer.quantization_mode is not None

    def kernel(self, full_precision=False):
        """Tensor of shape `(d, k)`, the frozen kernel, dequantized.

        Args:
            full_precision: Boolean. Whether it is of the dtype in which the
                kernel is stored, and not of the compute dtype.
        """
        return self.contraction.to_matrix(
            keras_internals.float_kernel(self.layer, full_precision)
        )

    def bias(self):
        """Tensor that broadcasts to the outputs, or `None`."""
        return self.layer.bias

    def project(self, matrix):
        """The tokens times a matrix, in the compute dtype.

        Args:
            matrix: Variable or tensor of shape `(d, rank)`.

        Returns:
            Tensor of shape `(..., rank)`.
        """
        return fast_ops.matmul(self.tokens, matrix)

    def add_product(self, outputs, projected, matrix):
        """Adds a map of tokens to outputs.

        Args:
            outputs: Tensor, what `outputs()` returned. On PyTorch it may be
                changed in place.
            projected: Tensor of shape `(..., rank)`, a vector for each token.
            matrix: Tensor of shape `(rank, k)`.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        return self.contraction.add_product(
            outputs, projected, matrix, self.inputs, self.kernel_shape
        )

    def multiply(self, matrix):
        """Outputs by another kernel than the frozen one, and no bias.

        Args:
            matrix: Tensor of shape `(d, k)`.

        Returns:
            Tensor of the shape of the outputs.
        """
        return self.contraction.from_tokens(
            self.project(matrix), self.inputs, self.kernel_shape
        )

    def for_units(self, values):
        """Values `(k,)`, one for each unit, that broadcast to the outputs."""
        shape = self.contraction.bias_shape(self.kernel_shape)
        return ops.reshape(values, shape)
