"""Wav2Vec2 as a backbone in KerasHub's style."""

import keras
import keras_hub

from examples.paper.wav2vec2 import layers

# What both Large variants have in common.
LARGE = {
    "num_layers": 24,
    "num_heads": 16,
    "hidden_dim": 1024,
    "intermediate_dim": 4096,
}
VARIANTS = {
    # Pre-trained on 960 hours of LibriSpeech.
    "wav2vec2-large": {
        **LARGE,
        "feature_norm": "group",
        "conv_use_bias": False,
        "normalize_first": False,
        "use_padding_mask": False,
    },
    # Pre-trained on 60,000 hours of Libri-Light.
    "wav2vec2-large-lv60": {
        **LARGE,
        "feature_norm": "layer",
        "conv_use_bias": True,
        "normalize_first": True,
        "use_padding_mask": True,
    },
}


@layers.register
class Wav2Vec2Backbone(keras_hub.models.Backbone):
    """A Wav2Vec2 encoder of speech.

    Convolutions turn a waveform of 16 kHz into a frame of features for every
    20 ms; a Transformer turns these into hidden states. In training, spans of
    frames are masked by a learned vector.

    The original's LayerDrop, which skips whole layers in training, and its
    masking of features are left out. The kernel of the positional convolution
    is one weight, where the original trains its norm and direction.

    Args:
        num_layers: Integer, Transformer blocks.
        num_heads: Integer, attention heads in each of them. It must divide
            `hidden_dim`.
        hidden_dim: Integer, width of the hidden states.
        intermediate_dim: Integer, width inside the feed-forward networks.
        conv_filters: Sequence of integers, the channels of each convolution
            of the feature encoder. Defaults to seven times `512`.
        conv_kernel_sizes: Sequence of integers, likewise.
        conv_strides: Sequence of integers, likewise.
        conv_use_bias: Boolean, whether these convolutions have biases.
            Defaults to `False`.
        feature_norm: `"group"` (default): the first convolution's outputs are
            normalized over time. `"layer"`: those of each convolution are
            normalized over the channels.
        normalize_first: Boolean. Whether layer norms stand before attention
            and feed-forward networks, with one more behind the last block, or
            behind their residuals, with one more before the first block.
            Defaults to `False`.
        position_kernel_size: Integer, frames that the positional convolution
            sees. Defaults to `128`.
        position_groups: Integer, its groups of channels. It must divide
            `hidden_dim`. Defaults to `16`.
        dropout: Float, dropout rate of what is added to the hidden states.
            Defaults to `0.1`.
        attention_dropout: Float, that of the attention weights. Defaults to
            `0.1`.
        activation_dropout: Float, that inside the feed-forward networks.
            Defaults to `0.1`.
        feature_dropout: Float, that of the projected features. Defaults to
            `0.0`.
        mask_prob: Float, the share of frames to mask in training, if no spans
            overlapped. At `0` there is no masking and no vector for it.
            Defaults to `0.05`.
        mask_length: Integer, frames in a span. Defaults to `10`.
        min_masks: Integer, the least number of spans in an utterance. Defaults
            to `2`.
        layer_norm_epsilon: Float, of all layer norms behind the feature
            encoder. Defaults to `1e-5`.
        use_padding_mask: Boolean. Whether the encoder leaves padding out.
            Checkpoints with `feature_norm="group"` were trained without: they
            see padding as silence. Masking and adapters take real frames
            alone into account, whatever this is. Defaults to `True`.
        dtype: String or `keras.DTypePolicy`. Norms compute in float32.

    Call arguments:
        inputs: Dict of `"audio"`, float tensor of shape `(batch, samples)`,
            and `"padding_mask"`, integer tensor of the same shape: 1 for the
            samples of an utterance, 0 for the padding behind them. See
            `audio.pad_utterances`.

    Returns:
        Tensor of shape `(batch, frames, hidden_dim)`, the hidden states.

    Raises:
        ValueError: If an argument has a value that is not allowed.

    Example:

    >>> backbone = Wav2Vec2Backbone(
    ...     num_layers=2, num_heads=2, hidden_dim=32, intermediate_dim=64
    ... )
    >>> audio = np.random.normal(size=(1, 16_000))
    >>> mask = np.ones((1, 16_000), "int32")
    >>> backbone({"audio": audio, "padding_mask": mask}).shape
    (1, 49, 32)

    Reference: [wav2vec 2.0](https://arxiv.org/abs/2006.11477).
    """

    def __init__(
        self,
        num_layers,
        num_heads,
        hidden_dim,
        intermediate_dim,
        conv_filters=(512,) * 7,
        conv_kernel_sizes=(10, 3, 3, 3, 3, 2, 2),
        conv_strides=(5, 2, 2, 2, 2, 2, 2),
        conv_use_bias=False,
        feature_norm="group",
        normalize_first=False,
        position_kernel_size=128,
        position_groups=16,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        feature_dropout=0.0,
        mask_prob=0.05,
        mask_length=10,
        min_masks=2,
        layer_norm_epsilon=1e-5,
        use_padding_mask=True,
        dtype=None,
        **kwargs,
    ):
        _check_choice("feature_norm", feature_norm, ("group", "layer"))
        _check_divides("num_heads", num_heads, hidden_dim)
        _check_divides("position_groups", position_groups, hidden_dim)
        if not len(conv_filters) == len(conv_kernel_sizes) == len(conv_strides):
            raise ValueError(
                "`conv_filters`, `conv_kernel_sizes` and `conv_strides` must "
                "have one number for each convolution. Received: "
                f"{conv_filters}, {conv_kernel_sizes}, {conv_strides}."
            )

        # === Layers ===
        self.feature_encoder = layers.FeatureEncoder(
            conv_filters,
            conv_kernel_sizes,
            conv_strides,
            feature_norm,
            conv_use_bias,
            dtype=dtype,
            name="feature_encoder",
        )
        self.frame_padding_mask = layers.FramePaddingMask(
            conv_kernel_sizes,
            conv_strides,
            dtype=dtype,
            name="frame_padding_mask",
        )
        self.feature_projection = layers.FeatureProjection(
            hidden_dim,
            feature_dropout,
            layer_norm_epsilon,
            dtype=dtype,
            name="feature_projection",
        )
        self.time_masking = None
        if mask_prob > 0:
            self.time_masking = layers.TimeMasking(
                mask_prob,
                mask_length,
                min_masks,
                dtype=dtype,
                name="time_masking",
            )
        self.positional_convolution = layers.PositionalConvolution(
            position_kernel_size,
            position_groups,
            dtype=dtype,
            name="positional_convolution",
        )
        self.encoder_layer_norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="encoder_layer_norm"
        )
        self.embeddings_dropout = keras.layers.Dropout(
            dropout, dtype=dtype, name="embeddings_dropout"
        )
        self.transformer_layers = [
            layers.TransformerBlock(
                num_heads,
                intermediate_dim,
                normalize_first,
                dropout,
                attention_dropout,
                activation_dropout,
                layer_norm_epsilon,
                use_padding_mask,
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            for i in range(num_layers)
        ]

        # === Functional Model ===
        audio_input = keras.Input((None,), dtype="float32", name="audio")
        padding_mask_input = keras.Input(
            (None,), dtype="int32", name="padding_mask"
        )
        # (batch, frames)
        padding_mask = self.frame_padding_mask(padding_mask_input)
        # (batch, frames, hidden_dim)
        x = self.feature_projection(self.feature_encoder(audio_input))
        if self.time_masking is not None:
            x = self.time_masking(x, padding_mask)
        x = self.positional_convolution(
            x, padding_mask if use_padding_mask else None
        )
        if not normalize_first:
            x = self.encoder_layer_norm(x)
        x = self.embeddings_dropout(x)
        for transformer_layer in self.transformer_layers:
            x = transformer_layer(x, padding_mask)
        if normalize_first:
            x = self.encoder_layer_norm(x)
        super().__init__(
            inputs={"audio": audio_input, "padding_mask": padding_mask_input},
            outputs=x,
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.conv_filters = conv_filters
        self.conv_kernel_sizes = conv_kernel_sizes
        self.conv_strides = conv_strides
        self.conv_use_bias = conv_use_bias
        self.feature_norm = feature_norm
        self.normalize_first = normalize_first
        self.position_kernel_size = position_kernel_size
        self.position_groups = position_groups
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.feature_dropout = feature_dropout
        self.mask_prob = mask_prob
        self.mask_length = mask_length
        self.min_masks = min_masks
        self.encoder_layer_norm_epsilon = layer_norm_epsilon
        self.use_padding_mask = use_padding_mask

    @classmethod
    def from_variant(cls, variant, **options):
        """Makes a published variant, with random weights.

        Args:
            variant: `"wav2vec2-large"` or `"wav2vec2-large-lv60"`.
            **options: Arguments of the constructor that replace the variant's.

        Returns:
            A `Wav2Vec2Backbone`.

        Raises:
            ValueError: If there is no such variant.
        """
        _check_choice("variant", variant, VARIANTS)
        return cls(**{**VARIANTS[variant], **options})

    @property
    def receptive_field(self):
        """Integer, how many samples one frame sees, and the least allowed."""
        return layers.receptive_field(self.conv_kernel_sizes, self.conv_strides)

    def num_frames(self, num_samples):
        """How many frames come of a number of samples.

        Args:
            num_samples: Integer or integer tensor.

        Returns:
            The same type.
        """
        return layers.num_frames(
            num_samples, self.conv_kernel_sizes, self.conv_strides
        )

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_layers": self.num_layers,
                "num_heads": self.num_heads,
                "hidden_dim": self.hidden_dim,
                "intermediate_dim": self.intermediate_dim,
                "conv_filters": self.conv_filters,
                "conv_kernel_sizes": self.conv_kernel_sizes,
                "conv_strides": self.conv_strides,
                "conv_use_bias": self.conv_use_bias,
                "feature_norm": self.feature_norm,
                "normalize_first": self.normalize_first,
                "position_kernel_size": self.position_kernel_size,
                "position_groups": self.position_groups,
                "dropout": self.dropout,
                "attention_dropout": self.attention_dropout,
                "activation_dropout": self.activation_dropout,
                "feature_dropout": self.feature_dropout,
                "mask_prob": self.mask_prob,
                "mask_length": self.mask_length,
                "min_masks": self.min_masks,
                "layer_norm_epsilon": self.encoder_layer_norm_epsilon,
                "use_padding_mask": self.use_padding_mask,
            }
        )
        return config


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {list(choices)}. Received: {value!r}."
        )


def _check_divides(name, value, hidden_dim):
    if hidden_dim % value != 0:
        raise ValueError(
            f"`{name}` must divide `hidden_dim`, which is {hidden_dim}. "
            f"Received: {value}."
        )
