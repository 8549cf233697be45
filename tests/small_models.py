"""One small model of each kind, for what must hold for all of them."""

import keras
import keras_hub
import numpy as np
from backbones import BACKBONES

NUM_SAMPLES = 8
LABELS = np.arange(NUM_SAMPLES) % 3


@keras.saving.register_keras_serializable(package="small_models")
class Encoder(keras.layers.Layer):
    """Layers inside layers: attributes, a list, attention."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [
            keras.layers.MultiHeadAttention(2, 4, name=f"attention_{i}")
            for i in range(2)
        ]
        self.feedforward = keras.Sequential(
            [
                keras.layers.Dense(16, activation="relu", name="up"),
                keras.layers.Dense(8, name="down"),
            ],
            name="feedforward",
        )

    def build(self, input_shape):
        for block in self.blocks:
            block.build(input_shape, input_shape)
        self.feedforward.build(input_shape)

    def call(self, x):
        for block in self.blocks:
            x = x + block(x, x)
        return self.feedforward(x)


@keras.saving.register_keras_serializable(package="small_models")
class Subclassed(keras.Model):
    """A model that makes its layers itself, some without a name."""

    def __init__(self, num_classes=3, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.encoder = Encoder(name="encoder")
        self.hidden = keras.layers.Dense(8)
        self.head = keras.layers.Dense(num_classes, name="head")

    def call(self, x):
        return self.head(self.hidden(self.encoder(x)))[:, 0]

    def get_config(self):
        return {**super().get_config(), "num_classes": self.num_classes}


def make_subclassed():
    model = Subclassed()
    model(np.ones((1, 5, 8)))
    return model


def make_functional():
    """Attention, a nested model and a Dense layer of its own."""
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(50, 8, mask_zero=True)(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(8)])(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(8, name="query")(x)
    return _widen(
        keras.Model(inputs, keras.layers.Dense(3, name="head")(x)),
        names=["embeddings"],
    )


def make_sequential():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="relu", name="query"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def make_text_classifier():
    return _widen(
        keras_hub.models.BertTextClassifier(
            BACKBONES["BertBackbone"](),
            num_classes=3,
            preprocessor=None,
            dropout=0.0,
        )
    )


def make_image_classifier():
    return _widen(
        keras_hub.models.ViTImageClassifier(
            BACKBONES["ViTBackbone"](), num_classes=3, preprocessor=None
        )
    )


def make_causal_lm():
    return keras_hub.models.LlamaCausalLM(make_backbone(), preprocessor=None)


def make_backbone():
    return _widen(BACKBONES["LlamaBackbone"](), names=["kernel", "embeddings"])


MODELS = {
    "functional": make_functional,
    "sequential": make_sequential,
    "subclassed": make_subclassed,
    "text_classifier": make_text_classifier,
    "image_classifier": make_image_classifier,
    "causal_lm": make_causal_lm,
    "backbone": make_backbone,
}


def data(name):
    """Inputs and targets for the model of that name."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (NUM_SAMPLES, 6))
    padding_mask = np.ones((NUM_SAMPLES, 6), "int32")
    padding_mask[::2, 4:] = 0
    text = {"token_ids": tokens, "padding_mask": padding_mask}
    features = rng.normal(size=(NUM_SAMPLES, 6, 8)).astype("float32")
    return {
        "functional": (tokens, LABELS),
        "sequential": (features[:, 0], LABELS),
        "subclassed": (features, LABELS),
        "text_classifier": (
            {**text, "segment_ids": np.zeros_like(tokens)},
            LABELS,
        ),
        "image_classifier": (
            rng.normal(size=(NUM_SAMPLES, 16, 16, 3)).astype("float32"),
            LABELS,
        ),
        "causal_lm": (text, np.roll(tokens, -1, axis=1)),
        "backbone": (text, features),
    }[name]


def compile_model(model, name, learning_rate=0.03):
    """For a fit that depends on nothing but the seeds."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.Adam(learning_rate),
        "mse" if name == "backbone" else loss,
        # The quicker for so few steps.
        jit_compile=keras.config.backend() == "jax",
    )


def fit(model, name, epochs=1):
    x, y = data(name)
    return model.fit(
        x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0
    )


def predict(model, name):
    # Not by `model.predict`, which would compile anew for each model.
    return keras.ops.convert_to_numpy(model(data(name)[0], training=False))


def _widen(model, names=("kernel",)):
    """Their initializers are for wide layers: nothing would move here."""
    for weight in model.weights:
        if weight.name in names:
            weight.assign(10 * weight)
    return model
