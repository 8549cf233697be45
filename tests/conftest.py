import gc
import os

# For the tests on several devices, which a backend counts when it starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import keras
import numpy as np
import pytest
import small_models
from helpers import BACKEND
from helpers import BACKENDS
from helpers import ONE_BACKEND

import keras_fvae

if BACKEND == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )

# What only one backend has.
collect_ignore = [
    name
    for name, backend in {
        "mesh_test.py": "jax",
        "replicas_test.py": "tensorflow",
    }.items()
    if backend != BACKEND
]


# Of the paper's examples, what computes by itself.
ON_EACH_BACKEND = ("wav2vec2_test.py", "efficientnet_lite0_test.py")


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="the long tail, too, and nearly all tests on each backend",
    )


def pytest_ignore_collect(collection_path, config):
    # All of it is for one backend, or slow, and imports for seconds.
    is_read = config.getoption("--all") or BACKEND == ONE_BACKEND
    is_paper = collection_path.parent.name == "paper"
    is_everywhere = collection_path.name in ON_EACH_BACKEND
    if is_paper and not is_read and not is_everywhere:
        return True
    return None


def pytest_collection_modifyitems(config, items):
    marks, marks_elsewhere = set(), {"always_one_backend"}
    if not config.getoption("--all"):
        marks.add("slow")
        marks_elsewhere.add("one_backend")
    if BACKEND != ONE_BACKEND:
        marks |= marks_elsewhere
    left_out = [
        item
        for item in items
        if marks & {mark.name for mark in item.iter_markers()}
        or (not config.getoption("--all") and is_for_another_backend(item))
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def is_for_another_backend(item):
    """Whether a case of a test that is shared out is another backend's."""
    if item.get_closest_marker("shared_out") is None:
        return False
    # As a set, because the arguments of one `parametrize` have one index.
    number = sum({*item.callspec.indices.values()})
    return BACKENDS[number % len(BACKENDS)] != BACKEND


def pytest_collection_finish(session):
    # Keras collects garbage wherever a layer loses a weight, and what was
    # imported is none.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def fresh_heap():
    """What the modules before have left is not looked through any more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state():
    """The same names and random numbers in every test, in any order."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def config():
    """A small adapter, without dropout."""
    return keras_fvae.FVAELoRAConfig(rank=3, decoder_units=(8,), dropout=0.0)


@pytest.fixture
def make_bert():
    """Makes a BERT classifier of a few units, with a head of three classes."""
    return small_models.make_text_classifier


@pytest.fixture
def bert(make_bert):
    return make_bert()


@pytest.fixture
def make_attention_model():
    """Makes a functional model: embeddings with a mask, attention, a head."""

    def make():
        inputs = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(50, 8, mask_zero=True, name="embedding")(
            inputs
        )
        attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
        x = attention(x, x)
        x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))

    return make


@pytest.fixture
def attention_model(make_attention_model):
    return make_attention_model()
