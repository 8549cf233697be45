"""Short fits, of which can be told what they must come to."""

import functools

import keras
import numpy as np
from helpers import move_adapters
from helpers import remove_latent_noise
from helpers import to_numpy

import keras_fvae
from keras_fvae.model.lookup import adapted_layers

SMALL = {"rank": 2, "decoder_units": (4,)}
TOKENS = np.random.default_rng(0).integers(1, 50, (16, 6))
LABELS = np.arange(16) % 3


def make_attention_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None,), dtype="int32")
    # With vectors as small as they are by default, attention hardly trains.
    initializer = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(50, 8, initializer, name="embedding")(inputs)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def make_adapted():
    """The same adapted model each time; its draws are the means."""
    model = make_attention_model()
    adapt_without_dropout(model, trainable_layer_names=["head"])
    return model


def adapt_without_dropout(model, **options):
    keras_fvae.enable_fvae_lora(
        model, dropout=0.0, elbo_weight=0.5, **SMALL, **options
    )
    move_adapters(model, np.random.default_rng(0))
    remove_latent_noise(model)


def train(model, optimizer=None, data=(TOKENS, LABELS), fit=None, **compile):
    """Fits a model, and checks that nothing moves but what is to train.

    Returns:
        The losses of the epochs, and how far each weight went that trains.
    """
    model.compile(
        **{
            "optimizer": optimizer or keras.optimizers.SGD(0.01),
            "loss": cross_entropy,
            **compile,
        }
    )
    start = [to_numpy(w) for w in model.weights]
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **(fit or {})}
    losses = next(iter(model.fit(*data, **options).history.values()))
    assert np.isfinite(losses).all()
    moves = [to_numpy(w) - value for w, value in zip(model.weights, start)]
    for weight, move in zip(model.weights, moves):
        # Bit for bit, what is frozen; and nothing that trains stays.
        assert np.any(move) == weight.trainable, weight.path
    return losses, [m for w, m in zip(model.weights, moves) if w.trainable]


class Recorder(keras.callbacks.Callback):
    """The weights that train, at first and after each step."""

    def on_train_begin(self, logs=None):
        self.weights = [self._values()]

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self._values())

    def _values(self):
        return [to_numpy(w) for w in self.model.trainable_weights]


@functools.cache
def plain_run():
    """Four steps: losses, moves, the weights at first and after each."""
    recorder = Recorder()
    losses, moves = train(make_adapted(), fit={"callbacks": [recorder]})
    return losses, moves, recorder.weights


@functools.cache
def plain_step():
    """How far the weights go in a step with all data, and where they start."""
    model = make_adapted()
    start = [to_numpy(w) for w in model.trainable_weights]
    fit = {"batch_size": 16}
    return train(model, keras.optimizers.SGD(1.0), fit=fit)[1], start


def cross_entropy(y_true, y_pred):
    return keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )


def assert_same_moves(actual, expected, tolerance=2e-3):
    for move, expected_move in zip(actual, expected, strict=True):
        error = np.linalg.norm(move - expected_move)
        assert error <= tolerance * np.linalg.norm(expected_move)


def elbo_of(model, inputs):
    """The loss of the adapters of a quiet model with these inputs to all."""
    layers = adapted_layers(model)
    losses = [to_numpy(layer.adapter.fvae(inputs).loss) for layer in layers]
    return 0.5 * np.mean(losses)


def make_nested():
    """A model in a model in a model, each with a layer to adapt."""
    inputs = keras.Input((5,))
    inner = keras.layers.Dense(5, activation="tanh", name="query")(inputs)
    model = keras.Model(inputs, inner, name="inner")
    for name in ("middle", "outer"):
        inputs = keras.Input((5,))
        x = keras.layers.Dense(5, activation="tanh", name="value")(
            model(inputs)
        )
        model = keras.Model(inputs, x, name=name)
    inputs = keras.Input((5,))
    outputs = keras.layers.Dense(3, name="head")(model(inputs))
    return keras.Model(inputs, outputs)
