import keras
import numpy as np
import pytest
from backbones import BACKBONES
from helpers import JIT_COMPILE
from helpers import move_adapters
from helpers import remove_latent_noise
from helpers import text_inputs
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.layers import masking

SMALL = {"rank": 2, "decoder_units": (4,), "dropout": 0.0, "elbo_weight": 1.0}


def elbo(model, inputs):
    model(inputs, training=True)
    return sum(to_numpy(loss) for loss in model.losses)


def adapt(model, rng, **options):
    keras_fvae.enable_fvae_lora(model, **SMALL, **options)
    # A weight moved at random, and latents with hardly any noise (the log
    # variance is clipped at -20): what differs then by more than 1e-4,
    # differs because of the padding.
    move_adapters(model, rng)
    remove_latent_noise(model)


def pad(inputs, length):
    """Fills up with token 0, which the mask leaves out."""
    missing = length - inputs["token_ids"].shape[1]
    return {
        name: np.pad(value, [(0, 0), (0, missing)])
        for name, value in inputs.items()
    }


def test_padding_of_a_kerashub_model_counts_for_nothing(bert, rng):
    inputs = text_inputs(rng, (3, 12))
    for row, length in enumerate([12, 5, 9]):
        inputs["token_ids"][row, length:] = 0
        inputs["padding_mask"][row, length:] = 0
    adapt(bert.backbone, rng)
    # The task around the backbone passes the mask on, too.
    for model in (bert.backbone, bert):
        short, long = (elbo(model, pad(inputs, n)) for n in (16, 64))
        np.testing.assert_allclose(long, short, rtol=1e-5)
    everything = dict(inputs, padding_mask=np.ones_like(inputs["token_ids"]))
    assert not np.isclose(elbo(bert, everything), short, rtol=1e-4)


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_padding_counts_for_nothing_in_fit(make_bert, jit_compile, rng):
    inputs = text_inputs(rng, (4, 6))
    inputs["padding_mask"][1, 3:] = 0
    losses = []
    for length in (16, 64):
        keras.utils.set_random_seed(1)
        bert = make_bert()
        adapt(bert.backbone, np.random.default_rng(0), seed=0)
        bert.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
        )
        history = bert.fit(
            pad(inputs, length), np.arange(4) % 3, epochs=2, verbose=0
        ).history
        losses.append(history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.one_backend
def test_a_keras_mask_reaches_into_attention(attention_model, rng):
    tokens = rng.integers(1, 50, (3, 6))
    tokens[1, 2:] = 0
    adapt(attention_model, rng)
    short = elbo(attention_model, np.pad(tokens, [(0, 0), (0, 2)]))
    long = elbo(attention_model, np.pad(tokens, [(0, 0), (0, 20)]))
    np.testing.assert_allclose(long, short, rtol=1e-5)


@pytest.mark.one_backend
def test_cross_attention_takes_the_mask_of_each_side(rng):
    embedding = keras.layers.Embedding(50, 8, mask_zero=True)
    queries = keras.Input((None,), dtype="int32")
    values = keras.Input((None,), dtype="int32")
    attention = keras.layers.MultiHeadAttention(2, 4)
    outputs = attention(embedding(queries), embedding(values))
    model = keras.Model([queries, values], outputs)
    adapt(model, rng, target_layer_names=["query", "key", "value"])
    tokens = rng.integers(1, 50, (2, 2, 5))
    reference = elbo(model, list(tokens))
    # As long as each other, so that only the names tell the masks apart.
    for padded in [((0, 3), (0, 3)), ((0, 0), (0, 3)), ((0, 3), (0, 0))]:
        inputs = [
            np.pad(side, [(0, 0), width]) for side, width in zip(tokens, padded)
        ]
        np.testing.assert_allclose(elbo(model, inputs), reference, rtol=1e-5)


class Block(keras.layers.Layer):
    """Loses the mask on the way to its projection."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.query = keras.layers.Dense(8, name="query")

    def build(self, input_shape):
        self.query.build(input_shape)

    def call(self, x):
        return self.query(ops.multiply(x, 2.0))


def test_a_layer_knows_the_mask_of_its_own_input(rng):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(50, 8, mask_zero=True)(inputs)
    model = keras.Model(inputs, Block()(x))
    adapt(model, rng)
    tokens = rng.integers(1, 50, (2, 5))
    np.testing.assert_allclose(
        elbo(model, np.pad(tokens, [(0, 0), (0, 7)])),
        elbo(model, tokens),
        rtol=1e-5,
    )


def test_every_row_counts_where_the_mask_is_of_other_tokens(bert, rng):
    inputs = text_inputs(rng)
    inputs["padding_mask"][:, 4:] = 0
    keras_fvae.enable_fvae_lora(bert, target_layer_names="logits", **SMALL)
    remove_latent_noise(bert)
    pooled = bert.backbone(inputs)["pooled_output"]
    logits = bert.get_layer("logits")
    expected = to_numpy(logits.adapter.fvae(pooled).loss)
    np.testing.assert_allclose(elbo(bert, inputs), expected, rtol=1e-5)


def test_a_model_inside_a_model_has_other_tokens(rng):
    """As an image encoder in a language model, with as many patches."""
    patches = keras.Input((5, 8))
    encoder = keras.Model(patches, keras.layers.Dense(8, name="query")(patches))
    images = keras.Input((5, 8), name="images")
    padding_mask = keras.Input((5,), name="padding_mask")
    outputs = encoder(images) * padding_mask[..., None]
    model = keras.Model(
        {"images": images, "padding_mask": padding_mask}, outputs
    )
    adapt(model, rng)
    x = rng.normal(size=(2, 5, 8)).astype("float32")
    mask = np.ones((2, 5), "float32")
    whole = elbo(model, {"images": x, "padding_mask": mask})
    mask[:, 2:] = 0
    np.testing.assert_allclose(
        elbo(model, {"images": x, "padding_mask": mask}), whole, rtol=1e-5
    )


@pytest.mark.shared_out
@pytest.mark.parametrize(
    "name", ["BartBackbone", "T5Backbone", "T5GemmaBackbone"]
)
def test_sequences_of_equal_length_have_their_own_padding(name, rng):
    model = BACKBONES[name]()
    adapt(model, rng)

    def inputs(encoder_length, decoder_length):
        padded = {}
        for side, length in [
            ("encoder", encoder_length),
            ("decoder", decoder_length),
        ]:
            tokens = text_inputs(np.random.default_rng(0), (2, 6))
            tokens["padding_mask"][0, 2 if side == "encoder" else 4 :] = 0
            for key in ("token_ids", "padding_mask"):
                width = [(0, 0), (0, length - 6)]
                padded[f"{side}_{key}"] = np.pad(tokens[key], width)
        return padded

    # Here the lengths tell them apart.
    expected = elbo(model, inputs(9, 6))
    assert np.isfinite(expected)
    np.testing.assert_allclose(elbo(model, inputs(9, 9)), expected, rtol=1e-4)


def test_find_masks():
    embedded = keras.layers.Embedding(5, 2, mask_zero=True)(
        np.array([[1, 2, 0]])
    )
    mask, other = np.ones((1, 3)), np.ones((1, 3, 3))
    [(sequence, found), (_, missing)] = masking.find_masks(
        {
            "inputs": embedded,
            "padding_mask": None,
            "decoder_padding_mask": None,
            "attention_mask": other,
            "training": True,
        }
    )
    assert sequence is embedded
    assert to_numpy(found).tolist() == [[True, True, False]]
    assert missing is None
    inputs = {"token_ids": mask, "padding_mask": mask}
    assert masking.find_masks({"inputs": inputs}) == [(None, mask)]
    assert masking.find_masks({}) == []


def test_find_masks_in_the_order_of_the_sequences():
    one, two, cache = np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.ones((2, 3))
    mask = np.ones((2, 3))

    def find(**arguments):
        return [
            (sequence is one, sequence is two, found is mask)
            for sequence, found in masking.find_masks(arguments)
        ]

    both = [(True, False, False), (False, True, True)]
    assert both == find(
        x=one,
        cache=cache,
        encoder_outputs=two,
        padding_mask=None,
        encoder_padding_mask=mask,
    )
    assert both == find(
        inputs=[one, two], self_padding_mask=None, cross_padding_mask=mask
    )
    # Nothing is known of the queries where the mask is that of the keys.
    keys_mask = np.ones((2, 1, 3))
    assert find(query=one, value=two, attention_mask=keys_mask) == [
        (True, False, False),
        (False, True, False),
    ]
    [(_, found)] = masking.find_masks({"x": one, "attention_mask": keys_mask})
    assert found.shape == (2, 3)


def test_find_token_mask_takes_the_innermost_that_fits():
    outer, inner = np.ones((2, 5)), np.ones((2, 7))
    with masking.known_masks([(None, outer)]):
        with masking.known_masks([(None, inner)]):
            inputs = np.ones((2, 7, 3))
            assert masking.find_token_mask(inputs, 2) is inner
            # Of this one it is known that there is none.
            with masking.known_masks([(None, np.ones((2, 7))), (inputs, None)]):
                assert masking.find_token_mask(inputs, 2) is inner
            inputs = np.ones((2, 5, 3))
            assert masking.find_token_mask(inputs, 2) is outer
            assert masking.find_token_mask(inputs, 1) is None
        with masking.known_masks([], inherit=False):
            assert masking.find_token_mask(inputs, 2) is None
    assert masking.find_token_mask(inputs, 2) is None


@pytest.mark.parametrize("num_heads, length", [(3, 3), (3, 5), (5, 3)])
def test_a_mask_of_tokens_is_none_of_heads(num_heads, length):
    """Inside attention there may be as many heads as tokens."""
    mask = np.ones((2, length))
    with masking.known_masks([(None, mask)]):
        by_head = np.ones((2, num_heads, length, 4))
        assert masking.find_token_mask(by_head, 3) is None
        by_token = np.ones((2, length, num_heads, 4))
        found = masking.find_token_mask(by_token, 3)
        assert (found is None) == (num_heads == length)
        # Of these tokens it is known.
        with masking.known_masks([(by_token, mask)]):
            assert masking.find_token_mask(by_token, 3) is mask


class HeadsFirst(keras.layers.Layer):
    """Projects each head's tokens, as some attention does."""

    def __init__(self, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = keras.layers.Dense(4, name="query")

    def build(self, input_shape):
        self.query.build((None, self.num_heads, input_shape[1], 4))

    def call(self, x, padding_mask=None):
        heads = ops.reshape(x, (-1, x.shape[1], self.num_heads, 4))
        heads = self.query(ops.transpose(heads, (0, 2, 1, 3)))
        return ops.mean(heads, axis=(1, 2))


@pytest.mark.parametrize("num_heads", [3, 6])
def test_as_many_heads_as_tokens(num_heads, rng):
    """Then the loss is what it is with more tokens than heads."""
    length = 6
    x = rng.normal(size=(2, length, 4 * num_heads)).astype("float32")
    inputs = {
        "x": keras.Input((length, 4 * num_heads)),
        "padding_mask": keras.Input((length,), dtype="int32"),
    }
    outputs = HeadsFirst(num_heads)(inputs["x"], inputs["padding_mask"])
    model = keras.Model(inputs, outputs)
    adapt(model, rng)
    mask = np.ones((2, length), "int32")
    mask[0, 2:] = 0
    losses = [
        elbo(model, {"x": x, "padding_mask": m})
        for m in (mask, np.ones_like(mask))
    ]
    # Nobody knows which of the axes is that of the tokens: all of them count.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
