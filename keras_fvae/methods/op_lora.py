"""LoRA for OPLoRA, with the gradient of the whole kernel."""

import dataclasses

import numpy as np
from keras import ops

from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.methods.lora import LoRAConfig


@ops.custom_gradient
def zero_product(x, kernel):
    """0 for each token, with the gradient that `x kernel` has for the kernel.

    Args:
        x: Tensor of shape `(..., d)`, which has no gradient.
        kernel: Tensor of shape `(d, k)`, whatever it is.

    Returns:
        Tensor of shape `(..., k)` and of the dtype of `x`.
    """

    def gradients(*arguments, upstream=None):
        # PyTorch passes it by its name.
        upstream = arguments[-1] if upstream is None else upstream
        product = ops.matmul(ops.transpose(_rows(x)), _rows(upstream))
        return None, ops.cast(product, kernel.dtype)

    shape = (*ops.shape(x)[:-1], kernel.shape[-1])
    return ops.zeros(shape, x.dtype), gradients


def _rows(x):
    return ops.reshape(x, (-1, x.shape[-1]))


class OPLoRAAdapter(LowRankAdapter):
    """LoRA's update, and in training x times a kernel that counts as 0.

    The gradient of that kernel is the one that the frozen kernel would have.
    """

    weight_axes = {
        **LowRankAdapter.weight_axes,
        "zero_kernel": ("input", "output"),
    }

    def build(self, linear_map, kernel_shape, read_kernel=None):
        super().build(linear_map, kernel_shape, read_kernel)
        if not self.finalized:
            shape = (self.width, self.units)
            self.zero_kernel = self.add_adapter_weight(
                "zero_kernel", shape, lambda: np.zeros(shape)
            )

    def adapt(self, frozen, training):
        outputs = super().adapt(frozen, training)
        if not training:
            return outputs
        zeros = zero_product(
            ops.stop_gradient(frozen.tokens), self.zero_kernel.value
        )
        return frozen.add_for_tokens(outputs, zeros)

    @property
    def saved_weights(self):
        return [self.kernel_a, self.kernel_b]

    @property
    def inference_config(self):
        """The LoRA that it is."""
        return LoRAConfig(self.config.rank, seed=self.config.seed)

    def save_own_variables(self, store):
        for index, weight in enumerate(self.saved_weights):
            store[f"{index}"] = weight

    def load_own_variables(self, store):
        for index, weight in enumerate(self.saved_weights):
            weight.assign(store[f"{index}"])


@dataclasses.dataclass(frozen=True)
class OPLoRAConfig(AdapterConfig):
    """Settings of LoRA for the optimizer OPLoRA: `y = x W + b + x A B`.

    `keras_fvae.optimizers.OPLoRA` needs the gradient of the whole kernel. So
    there is a weight more beside each kernel, `zero_kernel`, as large as that
    and always 0, of which that is the gradient. It changes no output, is in
    no file, and gone when the adapter is finalized, merged or removed. All
    else is LoRA without dropout and with a scale of 1, which OPLoRA is
    defined for. Other optimizers train it as LoRA, and pay for the gradient in
    vain.

    Learning rate: as `keras_fvae.optimizers.OPLoRA` says. Cost: in training,
    two float32 arrays as large as the kernel for each adapted layer, the zeros
    and their gradient (one more with gradient accumulation or moving
    averages), and a product as large as the layer's own; else, and merged,
    LoRA's. `model.summary()` counts `zero_kernel` among what trains.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        seed: Non-negative integer. Seed of A. `None` (default) draws one,
            which `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> layer = keras_fvae.AdaptedDense(8, keras_fvae.OPLoRAConfig(rank=4))
    >>> tuple(layer(np.ones((2, 32))).shape)
    (2, 8)
    >>> [weight.name for weight in layer.trainable_weights]
    ['kernel_a', 'kernel_b', 'zero_kernel']

    Reference: [OPLoRA](https://arxiv.org/abs/2509.19977).
    """

    alpha: None = dataclasses.field(default=None, init=False)

    adapter_class = OPLoRAAdapter
    method_name = "OPLoRA"
