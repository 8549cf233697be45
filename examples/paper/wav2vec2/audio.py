"""Utterances as Wav2Vec2 takes them: normalized and padded."""

import numpy as np


def normalize(audio):
    """Shifts and scales an utterance to a mean of 0 and a variance of 1.

    Args:
        audio: Array of shape `(samples,)`, without padding. Integers are
            taken as they are: the scale is divided out.

    Returns:
        Float32 array of shape `(samples,)`.
    """
    audio = np.asarray(audio, "float64")
    audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
    return audio.astype("float32")


def pad_utterances(utterances, num_samples, min_samples):
    """Normalizes utterances and pads them by zeros to one length.

    Args:
        utterances: Dict of name to array of shape `(samples,)`, mono, of
            16 kHz.
        num_samples: Integer, the length to pad to.
        min_samples: Integer, the least length that makes a frame: the
            backbone's `receptive_field`.

    Returns:
        Dict of `"audio"`, float32 array of shape `(utterances, num_samples)`,
        and `"padding_mask"`, int32 array of the same shape: 1 for the samples
        of the utterance. In the order of the dict.

    Raises:
        ValueError: If an utterance is not of one axis, is too short for a
            frame, or is longer than `num_samples`.
    """
    for name, audio in utterances.items():
        _check(name, np.shape(audio), num_samples, min_samples)
    shape = (len(utterances), num_samples)
    padded, mask = np.zeros(shape, "float32"), np.zeros(shape, "int32")
    for row, audio in enumerate(utterances.values()):
        padded[row, : len(audio)] = normalize(audio)
        mask[row, : len(audio)] = 1
    return {"audio": padded, "padding_mask": mask}


def _check(name, shape, num_samples, min_samples):
    if len(shape) != 1:
        raise ValueError(
            f"Utterance '{name}' has shape {shape}. It must have one axis, of "
            "samples: mix its channels into one."
        )
    if shape[0] < min_samples:
        raise ValueError(
            f"Utterance '{name}' has {shape[0]} samples, too few for one frame "
            f"of the model, which sees {min_samples}. Leave it out."
        )
    if shape[0] > num_samples:
        raise ValueError(
            f"Utterance '{name}' has {shape[0]} samples, more than the "
            f"{num_samples} to pad to. Cut it, or pad to more."
        )
