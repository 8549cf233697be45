"""Labels from speech: a head for Wav2Vec2, its loss, decoding, error rate.

CTC (connectionist temporal classification) sums the probabilities of all the
ways in which the frames can say the labels, with blanks in between.

Reference: Graves et al., "Connectionist Temporal Classification: Labelling
Unsegmented Sequence Data with Recurrent Neural Networks", ICML 2006.
"""

import itertools

import keras
import keras_hub
import numpy as np
from keras import ops

from examples.paper.wav2vec2 import layers
from examples.paper.wav2vec2.backbone import Wav2Vec2Backbone

# The class of frames that say no label, and what pads the labels.
BLANK = 0


def ctc_losses(labels, logits, num_frames):
    """-log p(labels | frames) of each utterance, in nats.

    Args:
        labels: Integer tensor of shape `(batch, max_labels)`, padded by 0.
        logits: Tensor of shape `(batch, max_frames, vocabulary)`.
        num_frames: Integer tensor of shape `(batch,)`, the real frames, 1 or
            more. Those behind them do not count.

    Returns:
        Float32 tensor of shape `(batch,)`. It is 0, and has no gradient, for
        an utterance that has too few frames for its labels, whose loss would
        be infinite.
    """
    labels = ops.cast(labels, "int32")
    num_frames = ops.cast(num_frames, "int32")
    is_label = labels != BLANK
    num_labels = ops.sum(ops.cast(is_label, "int32"), axis=1)
    # Equal labels in a row need a blank between them.
    repeats = ops.logical_and(labels[:, 1:] == labels[:, :-1], is_label[:, 1:])
    num_repeats = ops.sum(ops.cast(repeats, "int32"), axis=1)
    is_possible = num_labels + num_repeats <= num_frames
    # Without labels every loss is finite, and so is its gradient.
    losses = ops.ctc_loss(
        labels,
        ops.cast(logits, "float32"),
        ops.where(is_possible, num_labels, 0),
        num_frames,
        mask_index=BLANK,
    )
    return ops.where(is_possible, losses, 0.0)


@layers.register
class CTCLoss(keras.losses.Loss):
    """The loss of `Wav2Vec2CTC`: that of `ctc_losses`.

    By default the sum over the utterances is divided by their number, not by
    the number of labels.

    Call arguments:
        y_true: Integer tensor of shape `(batch, max_labels + 1)`: the labels,
            padded by 0, and in the last place the number of real frames, which
            `Wav2Vec2CTC` puts there.
        y_pred: Tensor of shape `(batch, max_frames, vocabulary)`, logits.

    Args:
        reduction: `"sum_over_batch_size"` (default), `"sum"` or `None`.
        name: String.
    """

    def __init__(
        self, reduction="sum_over_batch_size", name="ctc_loss", **kwargs
    ):
        super().__init__(name=name, reduction=reduction, **kwargs)

    def call(self, y_true, y_pred):
        return ctc_losses(y_true[:, :-1], y_pred, y_true[:, -1])


@layers.register
class Wav2Vec2CTC(keras_hub.models.Task):
    """Wav2Vec2 that labels speech, such as with phonemes.

    The loss counts the real frames of each utterance, also where the backbone
    takes padding for silence.

    Args:
        backbone: `Wav2Vec2Backbone`.
        vocabulary_size: Integer, the labels with the blank, which is 0.
        dropout: Float, dropout rate of the hidden states. Defaults to `0.1`.
        preprocessor: `None`. Utterances are prepared by
            `audio.pad_utterances`.

    Call arguments:
        inputs: Dict of `"audio"` and `"padding_mask"`, as for the backbone.

    Returns:
        Float32 tensor of shape `(batch, frames, vocabulary_size)`, logits.

    Example:

    >>> task = Wav2Vec2CTC(backbone, vocabulary_size=40)
    >>> task.compile(keras.optimizers.AdamW(1e-4))
    >>> task.fit(inputs, labels)  # (utterances, max_labels), padded by 0
    >>> num_frames = backbone.num_frames(inputs["padding_mask"].sum(axis=1))
    >>> predictions = greedy_decode(task.predict(inputs), num_frames)
    """

    backbone_cls = Wav2Vec2Backbone

    def __init__(
        self,
        backbone,
        vocabulary_size,
        dropout=0.1,
        preprocessor=None,
        **kwargs,
    ):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.output_dropout = keras.layers.Dropout(
            dropout, dtype=backbone.dtype_policy, name="output_dropout"
        )
        self.output_dense = keras.layers.Dense(
            vocabulary_size, dtype="float32", name="logits"
        )

        # === Functional Model ===
        inputs = backbone.input
        x = self.output_dropout(backbone(inputs))
        super().__init__(inputs=inputs, outputs=self.output_dense(x), **kwargs)

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.dropout = dropout

    def compile(self, optimizer="auto", loss="auto", **kwargs):
        """Configures the task for training.

        Args:
            optimizer: As `keras.Model.compile` takes it. `"auto"` (default)
                means `keras.optimizers.Adam(1e-4)`.
            loss: `"auto"` (default) means `CTCLoss()`. Another must take
                `y_true` as that does.
            **kwargs: Further arguments of `keras.Model.compile`.
        """
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(1e-4)
        if loss == "auto":
            loss = CTCLoss()
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def compile_from_config(self, config):
        # What Keras does for a model whose `compile` is its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        num_samples = ops.sum(ops.cast(x["padding_mask"], "int32"), axis=1)
        num_frames = ops.expand_dims(self.backbone.num_frames(num_samples), 1)
        y = ops.concatenate([ops.cast(y, "int32"), num_frames], axis=1)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def get_config(self):
        config = super().get_config()
        config.update(
            {"vocabulary_size": self.vocabulary_size, "dropout": self.dropout}
        )
        return config


def greedy_decode(logits, num_frames):
    """The labels that the best class of each frame spells.

    Args:
        logits: Array of shape `(utterances, max_frames, vocabulary)`.
        num_frames: Array of integers, the real frames of each utterance.

    Returns:
        List of a list of labels (integers) for each utterance: repetitions
        are merged, then blanks are dropped.
    """
    best = np.argmax(logits, axis=-1)
    return [
        [
            label
            for label, _ in itertools.groupby(classes[:length].tolist())
            if label != BLANK
        ]
        for classes, length in zip(best, num_frames)
    ]


def edit_distance(reference, prediction):
    """The fewest insertions, deletions and substitutions between sequences.

    Args:
        reference: Sequence.
        prediction: Sequence.

    Returns:
        Integer.
    """
    # distances[j] is that of the reference so far to prediction[:j].
    distances = list(range(len(prediction) + 1))
    for i, label in enumerate(reference):
        previous = distances
        distances = [i + 1]
        for j, predicted in enumerate(prediction):
            distances.append(
                min(
                    previous[j] + (label != predicted),
                    previous[j + 1] + 1,
                    distances[j] + 1,
                )
            )
    return distances[-1]


def phoneme_error_rate(references, predictions):
    """The edit distances over a data set, for each phoneme of the references.

    Args:
        references: List of lists of labels, without padding.
        predictions: List of lists of labels, as `greedy_decode` returns.

    Returns:
        Float, 0 if all are right. It may exceed 1.

    Raises:
        ValueError: If there are more of one than of the other, or if the
            references have no labels at all.
    """
    if len(references) != len(predictions):
        raise ValueError(
            "There must be a prediction for each reference. Received: "
            f"{len(references)} references, {len(predictions)} predictions."
        )
    num_labels = sum(map(len, references))
    if num_labels == 0:
        raise ValueError(
            "The references have no labels, so that no rate is defined. "
            f"Received: {len(references)} references, all of them empty."
        )
    return sum(map(edit_distance, references, predictions)) / num_labels
