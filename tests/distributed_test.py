"""Several processes that train one model together."""

import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
from distributed.common import CONFIG
from distributed.common import fit
from distributed.common import make_backbone
from distributed.common import make_batch
from helpers import BACKEND
from helpers import ROOT
from helpers import environment
from short_training import LABELS
from short_training import TOKENS
from short_training import make_adapted
from short_training import make_attention_model

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

FOLDER = ROOT / "tests" / "distributed"


def only(backend):
    return pytest.mark.skipif(
        backend != BACKEND, reason=f"what only {backend} has"
    )


@pytest.mark.slow
@only("jax")
def test_two_processes_of_jax(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"no HDF5")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, FOLDER / "processes.py", address]
    processes = [
        subprocess.Popen(
            [*command, str(process_id), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment("jax", devices=4),
        )
        for process_id in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output

    backbone = make_backbone("llama")
    backbone.enable_fvae_lora(**CONFIG)
    expected = fit(backbone, make_batch())
    for process_id in range(2):
        losses = np.load(tmp_path / f"losses-{process_id}.npz")
        for kind in ("data", "model"):
            np.testing.assert_allclose(losses[kind], expected, rtol=1e-4)


@only("torch")
def test_two_workers_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run"]
    options = ["--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, *options, FOLDER / "workers.py", tmp_path],
        capture_output=True,
        text=True,
        env=environment("torch"),
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    workers = np.load(tmp_path / "workers.npz")
    # Of the frozen weights nothing is sent.
    assert workers["exchanged"] == workers["trained"]

    model = make_adapted()
    model.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = [
        model.train_on_batch(x, y)
        for x, y in [*zip(TOKENS.reshape(2, 8, -1), LABELS.reshape(2, 8))] * 2
    ]
    np.testing.assert_allclose(workers["losses"], losses, rtol=1e-5)
    loaded = make_attention_model()
    path = tmp_path / "workers.safetensors"
    keras_fvae.load_adapter(loaded, path)
    for layer, expected in zip(adapted_layers(loaded), adapted_layers(model)):
        for name, array in layer.adapter.get_arrays().items():
            np.testing.assert_allclose(
                array, expected.adapter.get_arrays()[name], atol=1e-5
            )
