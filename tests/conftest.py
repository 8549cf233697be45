import keras
import numpy as np
import pytest
import zoo

import keras_fvae


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
    return zoo.make_text_classifier


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
