"""The layers of Wav2Vec2, and the arithmetic of its frames.

The waveform's convolutions make a frame of every 320 samples or so, and all
that follows works on frames.

Reference: [wav2vec 2.0: A Framework for Self-Supervised Learning of Speech
Representations](https://arxiv.org/abs/2006.11477).
"""

import itertools

import keras
from keras import ops

register = keras.saving.register_keras_serializable(package="wav2vec2")

# Of the norms in the feature encoder, whatever that of the others.
FEATURE_NORM_EPSILON = 1e-5


def num_frames(num_samples, kernel_sizes, strides):
    """How many frames the convolutions make of a number of samples.

    Args:
        num_samples: Integer or integer tensor.
        kernel_sizes: Sequence of integers, in the order of the convolutions.
        strides: Sequence of integers, likewise.

    Returns:
        The same type, 0 or less if the samples are too few for one frame.
    """
    for kernel_size, stride in zip(kernel_sizes, strides):
        num_samples = (num_samples - kernel_size) // stride + 1
    return num_samples


def receptive_field(kernel_sizes, strides):
    """How many samples the convolutions see for one frame.

    Args:
        kernel_sizes: Sequence of integers, in the order of the convolutions.
        strides: Sequence of integers, likewise.

    Returns:
        Integer, the least number of samples that makes a frame.
    """
    num_samples = 1
    for kernel_size, stride in zip(kernel_sizes[::-1], strides[::-1]):
        num_samples = (num_samples - 1) * stride + kernel_size
    return num_samples


def draw_time_mask(padding_mask, mask_prob, mask_length, min_masks, seed):
    """Draws the frames to mask: spans of one length, which may overlap.

    An utterance of `n` frames gets `int(mask_prob * n / mask_length + u)`
    spans, where u is uniform in [0, 1) and the same for the whole batch, but
    at least `min_masks`, and no more than fit. They start at different frames
    among the first `n - mask_length + 1`. All shapes are static.

    Args:
        padding_mask: Boolean tensor of shape `(batch, frames)`, `True` for
            real frames.
        mask_prob: Float, the share of frames that would be masked if no spans
            overlapped.
        mask_length: Integer, frames in a span.
        min_masks: Integer, the least number of spans.
        seed: `keras.random.SeedGenerator`.

    Returns:
        Boolean tensor of shape `(batch, frames)`, `True` where masked.
    """
    batch_size, max_length = ops.shape(padding_mask)
    # (batch, 1)
    lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=1, keepdims=True)
    num_starts = lengths - mask_length + 1
    u = keras.random.uniform((), dtype="float32", seed=seed)
    num_masks = mask_prob * ops.cast(lengths, "float32") / mask_length + u
    num_masks = ops.maximum(ops.cast(num_masks, "int32"), min_masks)
    num_masks = ops.minimum(num_masks, max_length // mask_length)
    num_masks = ops.minimum(num_masks, num_starts)
    # The starts are those of the smallest keys, so that none is drawn twice.
    keys = keras.random.uniform(
        (batch_size, max_length), dtype="float32", seed=seed
    )
    keys = ops.where(ops.arange(max_length) < num_starts, keys, 1.0)
    ranks = ops.argsort(ops.argsort(keys, axis=1), axis=1)
    starts = ops.cast(ranks < num_masks, "int32")
    # A frame is masked if a span starts in the `mask_length` frames up to it.
    counts = ops.cumsum(ops.pad(starts, ((0, 0), (mask_length, 0))), axis=1)
    return counts[:, mask_length:] > counts[:, :-mask_length]


@register
class FeatureEncoder(keras.layers.Layer):
    """Convolutions over the waveform, each followed by GELU.

    With the group norm, the first convolution's outputs are normalized, each
    channel over all time, so that padding counts a little; with layer norms,
    those of every convolution are, each frame over its channels.

    Args:
        filters: Sequence of integers, the channels of each convolution.
        kernel_sizes: Sequence of integers, likewise.
        strides: Sequence of integers, likewise.
        norm: `"group"` or `"layer"`.
        use_bias: Boolean, whether the convolutions have biases.

    Call arguments:
        audio: Tensor of shape `(batch, samples)`.

    Returns:
        Tensor of shape `(batch, frames, filters[-1])`.
    """

    def __init__(
        self, filters, kernel_sizes, strides, norm, use_bias, **kwargs
    ):
        super().__init__(**kwargs)
        self.kernel_sizes = kernel_sizes
        self.strides = strides
        self.convolutions = [
            keras.layers.Conv1D(
                channels,
                kernel_size,
                strides=stride,
                use_bias=use_bias,
                kernel_initializer="he_normal",
                dtype=self.dtype_policy,
                name=f"convolution_{i}",
            )
            for i, (channels, kernel_size, stride) in enumerate(
                zip(filters, kernel_sizes, strides)
            )
        ]
        if norm == "group":
            self.norms = [
                keras.layers.GroupNormalization(
                    groups=filters[0],
                    epsilon=FEATURE_NORM_EPSILON,
                    dtype=self.dtype_policy,
                    name="norm_0",
                )
            ]
        else:
            self.norms = [
                keras.layers.LayerNormalization(
                    epsilon=FEATURE_NORM_EPSILON,
                    dtype=self.dtype_policy,
                    name=f"norm_{i}",
                )
                for i in range(len(filters))
            ]

    def build(self, input_shape):
        shape = (*input_shape, 1)
        for convolution, norm in self._convolutions_and_norms():
            convolution.build(shape)
            shape = (*input_shape, convolution.filters)
            if norm is not None:
                norm.build(shape)

    def call(self, audio):
        x = ops.expand_dims(audio, axis=-1)
        for convolution, norm in self._convolutions_and_norms():
            x = convolution(x)
            if norm is not None:
                x = norm(x)
            x = keras.activations.gelu(x)
        return x

    def compute_output_shape(self, input_shape):
        batch_size, length = input_shape
        if length is not None:
            length = num_frames(length, self.kernel_sizes, self.strides)
        return batch_size, length, self.convolutions[-1].filters

    def _convolutions_and_norms(self):
        return itertools.zip_longest(self.convolutions, self.norms)


@register
class FramePaddingMask(keras.layers.Layer):
    """Which frames are real: those that see real samples only.

    Args:
        kernel_sizes: Sequence of integers, as those of `FeatureEncoder`.
        strides: Sequence of integers, likewise.

    Call arguments:
        padding_mask: Tensor of shape `(batch, samples)`, 1 for the samples of
            an utterance and 0 for the padding behind them.

    Returns:
        Boolean tensor of shape `(batch, frames)`.
    """

    def __init__(self, kernel_sizes, strides, **kwargs):
        super().__init__(**kwargs)
        self.kernel_sizes = kernel_sizes
        self.strides = strides

    def call(self, padding_mask):
        num_samples = ops.sum(ops.cast(padding_mask, "int32"), axis=1)
        max_length = self._num_frames(ops.shape(padding_mask)[1])
        lengths = self._num_frames(num_samples)
        return ops.arange(max_length) < ops.expand_dims(lengths, axis=1)

    def compute_output_spec(self, padding_mask):
        batch_size, length = padding_mask.shape
        if length is not None:
            length = self._num_frames(length)
        return keras.KerasTensor((batch_size, length), dtype="bool")

    def _num_frames(self, num_samples):
        return num_frames(num_samples, self.kernel_sizes, self.strides)


@register
class FeatureProjection(keras.layers.Layer):
    """From the features of the waveform to the width of the Transformer.

    Args:
        hidden_dim: Integer, that width.
        dropout: Float, dropout rate behind the projection.
        layer_norm_epsilon: Float, of the norm before it.

    Call arguments:
        inputs: Tensor of shape `(batch, frames, features)`.

    Returns:
        Tensor of shape `(batch, frames, hidden_dim)`.
    """

    def __init__(self, hidden_dim, dropout, layer_norm_epsilon, **kwargs):
        super().__init__(**kwargs)
        self.layer_norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="layer_norm",
        )
        self.projection = keras.layers.Dense(
            hidden_dim, dtype=self.dtype_policy, name="projection"
        )
        self.dropout = keras.layers.Dropout(
            dropout, dtype=self.dtype_policy, name="dropout"
        )

    def build(self, input_shape):
        self.layer_norm.build(input_shape)
        self.projection.build(input_shape)

    def call(self, inputs, training=None):
        x = self.projection(self.layer_norm(inputs))
        return self.dropout(x, training=training)

    def compute_output_shape(self, input_shape):
        return self.projection.compute_output_shape(input_shape)


@register
class TimeMasking(keras.layers.Layer):
    """Puts a learned vector in the place of spans of frames, in training.

    Args:
        mask_prob: Float, the share of frames that would be masked if no spans
            overlapped.
        mask_length: Integer, frames in a span.
        min_masks: Integer, the least number of spans in an utterance.
        seed: Integer or `None`.

    Call arguments:
        inputs: Tensor of shape `(batch, frames, hidden_dim)`.
        padding_mask: Boolean tensor of shape `(batch, frames)`, `True` for
            real frames.

    Returns:
        Tensor of the shape of `inputs`.
    """

    def __init__(self, mask_prob, mask_length, min_masks, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.mask_prob = mask_prob
        self.mask_length = mask_length
        self.min_masks = min_masks
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self.mask_vector = self.add_weight(
            shape=(input_shape[-1],),
            initializer=keras.initializers.RandomUniform(0.0, 1.0),
            name="mask_vector",
        )

    def call(self, inputs, padding_mask, training=None):
        if not training:
            return inputs
        mask = draw_time_mask(
            padding_mask,
            self.mask_prob,
            self.mask_length,
            self.min_masks,
            self.seed_generator,
        )
        mask = ops.expand_dims(mask, axis=-1)
        return ops.where(mask, ops.convert_to_tensor(self.mask_vector), inputs)

    def compute_output_shape(self, input_shape):
        return input_shape


@register
class PositionalConvolution(keras.layers.Layer):
    """Adds to each frame what a wide, grouped convolution makes of its place.

    The original parametrizes the kernel by its norm and direction. Here it is
    one weight, the product of both.

    Args:
        kernel_size: Integer, frames that the convolution sees.
        groups: Integer, into which the channels fall.

    Call arguments:
        inputs: Tensor of shape `(batch, frames, hidden_dim)`.
        padding_mask: Optional boolean tensor of shape `(batch, frames)`. If
            given, the frames of padding are set to 0 first.

    Returns:
        Tensor of the shape of `inputs`.
    """

    def __init__(self, kernel_size, groups, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.groups = groups

    def build(self, input_shape):
        self.convolution = keras.layers.Conv1D(
            input_shape[-1],
            self.kernel_size,
            groups=self.groups,
            dtype=self.dtype_policy,
            name="convolution",
        )
        self.convolution.build(input_shape)

    def call(self, inputs, padding_mask=None):
        x = inputs
        if padding_mask is not None:
            x = ops.where(ops.expand_dims(padding_mask, axis=-1), x, 0.0)
        # An even kernel sees one frame more to the left. The padding "same"
        # would have it see one more to the right.
        padding = (self.kernel_size // 2, (self.kernel_size - 1) // 2)
        positions = self.convolution(ops.pad(x, ((0, 0), padding, (0, 0))))
        return x + keras.activations.gelu(positions)

    def compute_output_shape(self, input_shape):
        return input_shape


@register
class SelfAttention(keras.layers.Layer):
    """Attention of all frames to all frames.

    Query, key, value and output are `Dense` layers of these names, so that
    adapters find them.

    Args:
        num_heads: Integer, among which the width is divided.
        dropout: Float, dropout rate of the attention weights.

    Call arguments:
        inputs: Tensor of shape `(batch, frames, hidden_dim)`.
        attention_mask: Optional boolean tensor that broadcasts to `(batch,
            num_heads, frames, frames)`, `True` where a query may see a key.

    Returns:
        Tensor of the shape of `inputs`.
    """

    def __init__(self, num_heads, dropout, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.softmax = keras.layers.Softmax(dtype=self.dtype_policy)
        self.dropout = keras.layers.Dropout(
            dropout, dtype=self.dtype_policy, name="dropout"
        )

    def build(self, input_shape):
        hidden_dim = input_shape[-1]
        self.head_dim = hidden_dim // self.num_heads

        def projection(name):
            dense = keras.layers.Dense(
                hidden_dim, dtype=self.dtype_policy, name=name
            )
            dense.build(input_shape)
            return dense

        self.query = projection("query")
        self.key = projection("key")
        self.value = projection("value")
        self.attention_output = projection("attention_output")

    def call(self, inputs, attention_mask=None, training=None):
        # (batch, frames, heads, head_dim)
        query = self._split_heads(self.query(inputs) * self.head_dim**-0.5)
        key = self._split_heads(self.key(inputs))
        value = self._split_heads(self.value(inputs))
        scores = ops.einsum("bqhd,bkhd->bhqk", query, key)
        weights = self.softmax(scores, mask=attention_mask)
        weights = self.dropout(weights, training=training)
        x = ops.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.attention_output(ops.reshape(x, ops.shape(inputs)))

    def compute_output_shape(self, input_shape):
        return input_shape

    def _split_heads(self, x):
        batch_size, length, _ = ops.shape(x)
        return ops.reshape(
            x, (batch_size, length, self.num_heads, self.head_dim)
        )


@register
class TransformerBlock(keras.layers.Layer):
    """Self-attention and a feed-forward network, each with a residual.

    Args:
        num_heads: Integer, attention heads.
        intermediate_dim: Integer, width inside the feed-forward network.
        normalize_first: Boolean. Whether a layer norm stands before attention
            and network (pre-norm), or behind their residuals (post-norm).
        dropout: Float, dropout rate of what attention and network add.
        attention_dropout: Float, that of the attention weights.
        activation_dropout: Float, that inside the network.
        layer_norm_epsilon: Float.
        use_padding_mask: Boolean. Whether attention leaves the frames of
            padding out. If not, the mask says which frames count to adapters
            inside the block, and changes nothing else.

    Call arguments:
        inputs: Tensor of shape `(batch, frames, hidden_dim)`.
        padding_mask: Boolean tensor of shape `(batch, frames)`, `True` for
            real frames.

    Returns:
        Tensor of the shape of `inputs`.
    """

    def __init__(
        self,
        num_heads,
        intermediate_dim,
        normalize_first,
        dropout,
        attention_dropout,
        activation_dropout,
        layer_norm_epsilon,
        use_padding_mask,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.normalize_first = normalize_first
        self.use_padding_mask = use_padding_mask
        self.attention = SelfAttention(
            num_heads,
            attention_dropout,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.attention_norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="attention_norm",
        )
        self.feedforward_intermediate_dense = keras.layers.Dense(
            intermediate_dim,
            activation=keras.activations.gelu,
            dtype=self.dtype_policy,
            name="feedforward_intermediate_dense",
        )
        self.activation_dropout = keras.layers.Dropout(
            activation_dropout,
            dtype=self.dtype_policy,
            name="activation_dropout",
        )
        self.feedforward_norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="feedforward_norm",
        )
        self.dropout = keras.layers.Dropout(
            dropout, dtype=self.dtype_policy, name="dropout"
        )

    def build(self, input_shape):
        *batch_shape, hidden_dim = input_shape
        self.attention.build(input_shape)
        self.attention_norm.build(input_shape)
        self.feedforward_intermediate_dense.build(input_shape)
        self.feedforward_output_dense = keras.layers.Dense(
            hidden_dim,
            dtype=self.dtype_policy,
            name="feedforward_output_dense",
        )
        intermediate_dim = self.feedforward_intermediate_dense.units
        self.feedforward_output_dense.build((*batch_shape, intermediate_dim))
        self.feedforward_norm.build(input_shape)

    def call(self, inputs, padding_mask, training=None):
        attention_mask = None
        if self.use_padding_mask:
            attention_mask = padding_mask[:, None, None, :]
        x = inputs
        if self.normalize_first:
            y = self.attention_norm(x)
            x = x + self._attend(y, attention_mask, training)
            return x + self._feed_forward(self.feedforward_norm(x), training)
        x = self.attention_norm(x + self._attend(x, attention_mask, training))
        return self.feedforward_norm(x + self._feed_forward(x, training))

    def compute_output_shape(self, input_shape):
        return input_shape

    def _attend(self, x, attention_mask, training):
        x = self.attention(x, attention_mask, training=training)
        return self.dropout(x, training=training)

    def _feed_forward(self, x, training):
        x = self.feedforward_intermediate_dense(x)
        x = self.activation_dropout(x, training=training)
        x = self.feedforward_output_dense(x)
        return self.dropout(x, training=training)
