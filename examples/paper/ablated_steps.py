"""Callbacks that change how a run of the ablation takes its steps."""

import keras
import numpy as np

from keras_fvae.model.lookup import adapted_layers


class ClipEachVariable(keras.callbacks.Callback):
    """Clips the gradient of each variable by itself, and not their whole."""

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        optimizer.clipnorm = optimizer.global_clipnorm
        optimizer.global_clipnorm = None


class OtherRateBesideQ1(keras.callbacks.Callback):
    """Another learning rate for q2 and the decoder of each FVAE.

    It is for JAX: where PyTorch's optimizers update all variables at once,
    they ask for no variable's own rate.

    Args:
        factor: Float, by what the learning rate is multiplied.
    """

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def on_train_begin(self, logs=None):
        if keras.config.backend() != "jax":
            raise ValueError(
                "Learning rates of parts of a variable are for JAX: set "
                f"KERAS_BACKEND=jax. Received: {keras.config.backend()}."
            )
        factors = {}
        for layer in adapted_layers(self.model):
            fvae = layer.adapter.fvae
            for variable, packing in (
                (fvae.feature_weights, fvae.networks.feature_packing),
                (fvae.latent_weights, fvae.networks.latent_packing),
            ):
                factors[variable.path] = self._factors(packing)
        optimizer = self.model.optimizer
        update_step = optimizer.update_step

        def update_by_parts(gradient, variable, learning_rate):
            factor = factors.get(variable.path, 1.0)
            update_step(gradient, variable, learning_rate * factor)

        optimizer.update_step = update_by_parts

    def _factors(self, packing):
        """Of each weight in a variable, 1 or `factor`."""
        arrays = {
            name: np.full(shape, self.factor, "float32")
            for name, shape in packing.shapes.items()
        }
        for name, array in arrays.items():
            if name.startswith("encoder"):
                # The first trunk is that of q1.
                array[..., 0, :] = 1.0
        return keras.ops.convert_to_numpy(packing.pack(arrays))
