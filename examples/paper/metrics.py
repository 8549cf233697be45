"""What is measured of a classifier's predictions."""

import numpy as np
import scipy.optimize
import scipy.special
import sklearn.metrics

NUM_BINS = 15


def classification_metrics(probabilities, labels):
    """Accuracy, and how good the probabilities are.

    Args:
        probabilities: Array of shape `(examples, classes)`.
        labels: Array of shape `(examples,)`, the classes as integers.

    Returns:
        Dict of floats: `accuracy`; `negative_log_likelihood`, the mean in
        nats; `calibration_error`, the expected one of 15 bins (Guo et al.,
        2017); `brier_score`, the mean of the squared distances from the
        one-hot labels.
    """
    probabilities = np.asarray(probabilities, "float64")
    chosen = probabilities[np.arange(len(labels)), labels]
    one_hot = np.eye(probabilities.shape[1])[labels]
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "negative_log_likelihood": float(
            -np.mean(np.log(np.maximum(chosen, np.finfo("float64").tiny)))
        ),
        "calibration_error": calibration_error(probabilities, labels),
        "brier_score": float(
            np.mean(np.sum((probabilities - one_hot) ** 2, axis=1))
        ),
    }


def calibration_error(probabilities, labels, num_bins=NUM_BINS):
    """The mean distance of confidence from accuracy, over bins of confidence.

    Each bin counts by the examples in it.

    Args:
        probabilities: Array of shape `(examples, classes)`.
        labels: Array of shape `(examples,)`, the classes as integers.
        num_bins: Integer. Defaults to `15`.

    Returns:
        Float, the expected calibration error (Guo et al., 2017).
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    distances = np.bincount(bins, confidence - is_right, num_bins)
    return float(np.abs(distances).sum() / len(labels))


def best_temperature(logits, labels):
    """What to divide logits by, for the best likelihood of other labels.

    Args:
        logits: Array of shape `(examples, classes)`.
        labels: Array of shape `(examples,)`, the classes as integers.

    Returns:
        Float between 0.05 and 20, the temperature of Guo et al. (2017).
    """

    def loss(log_temperature):
        log_probabilities = scipy.special.log_softmax(
            logits / np.exp(log_temperature), axis=1
        )
        return -log_probabilities[np.arange(len(labels)), labels].mean()

    found = scipy.optimize.minimize_scalar(
        loss, bounds=(-np.log(20), np.log(20)), method="bounded"
    )
    return float(np.exp(found.x))


def foreign_auroc(probabilities, foreign_probabilities):
    """How well the largest probability tells inputs from foreign ones.

    Args:
        probabilities: Array of shape `(examples, classes)`, of inputs like
            those of training.
        foreign_probabilities: Array of shape `(others, classes)`, of inputs
            that belong to no class.

    Returns:
        Float, the area under the curve of true over false positives: 0.5 is
        chance.
    """
    confidence = np.concatenate(
        [probabilities.max(axis=1), foreign_probabilities.max(axis=1)]
    )
    is_own = np.arange(len(confidence)) < len(probabilities)
    return float(sklearn.metrics.roc_auc_score(is_own, confidence))
