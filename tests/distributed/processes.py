"""One of two processes of JAX, each with four devices, that train together.

`distributed_test.py` runs it: `processes.py ADDRESS PROCESS_ID DIRECTORY`.
"""

import pathlib
import sys

import keras

address, process_id, directory = sys.argv[1:]
process_id, directory = int(process_id), pathlib.Path(directory)
# Before anything else asks JAX for its devices.
keras.distribution.initialize(address, 2, process_id)

import jax
import numpy as np
import pytest
import tensorflow as tf
from distributed.common import BACKBONES
from distributed.common import CONFIG
from distributed.common import make_backbone
from distributed.common import make_batch
from distributed.common import model_parallel

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

KINDS = ("data", "model")


def distribution(kind):
    """Over batches, or over a model that neither process has all of."""
    if kind == "data":
        return keras.distribution.DataParallel()
    mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"))
    return model_parallel(BACKBONES["llama"][0].get_layout_map(mesh))


def main(kind, dataset):
    keras.utils.clear_session(free_memory=False)
    path = directory / f"{kind}.safetensors"
    keras.distribution.set_distribution(distribution(kind))
    backbone = make_backbone("llama")
    backbone.enable_fvae_lora(**CONFIG)
    backbone.compile(keras.optimizers.Adam(1e-2), "mse")
    # Of a batch, Keras gives each process its part.
    history = backbone.fit(dataset, epochs=2, verbose=0)
    # Every process calls it; the first one writes.
    keras_fvae.save_adapter(backbone, path)
    assert path.exists() or process_id > 0

    loaded = make_backbone("llama")
    keras_fvae.load_adapter(loaded, path)
    for layer, saved in zip(adapted_layers(loaded), adapted_layers(backbone)):
        features = layer.adapter.fvae.feature_weights.value
        assert not features.is_fully_addressable
        assert features.is_fully_replicated == (kind == "data")
        arrays = saved.adapter.get_arrays()
        for name, array in layer.adapter.get_arrays().items():
            np.testing.assert_array_equal(array, arrays[name])
    for name, error in (("damaged", ValueError), ("lost", OSError)):
        # In both processes, of which neither must wait for the other.
        with pytest.raises(error):
            path = directory / f"{name}.safetensors"
            keras_fvae.load_adapter(backbone, path)
    return history.history["loss"]


if __name__ == "__main__":
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    dataset = tf.data.Dataset.from_tensor_slices(make_batch())
    losses = {kind: main(kind, dataset.batch(8)) for kind in KINDS}
    np.savez(directory / f"losses-{process_id}.npz", **losses)
