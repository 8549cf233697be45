"""What the latents of a trained model hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_fvae.analysis import extras
from keras_fvae.layers import masking
from keras_fvae.layers.config import check_boolean
from keras_fvae.methods.fvae.adapter import recorded_posteriors
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.model.lookup import check_can_predict
from keras_fvae.model.lookup import require_active_layers
from keras_fvae.model.training import forget_compiled_functions
from keras_fvae.model.tree import numbered

LATENTS = ("z1", "z2")


class LayerLatents(NamedTuple):
    """The posteriors of an adapted layer's tokens, as NumPy arrays.

    Args:
        z1_mean: Array of shape `(examples, ..., rank)`, the mean of q1.
        z1_log_variance: Array of that shape, its log variance.
        z2_mean: Array of that shape, the mean of q2.
        z2_log_variance: Array of that shape, its log variance.
        mask: Boolean array of shape `(examples, ...)`, which tokens count.
    """

    z1_mean: np.ndarray
    z1_log_variance: np.ndarray
    z2_mean: np.ndarray
    z2_log_variance: np.ndarray
    mask: np.ndarray


def latents(
    model: keras.Model,
    x: Any,
    batch_size: int | None = None,
    steps: int | None = None,
    average_tokens: bool = False,
) -> dict[str, LayerLatents]:
    """The posteriors that a model's adapted layers give their tokens.

    Args:
        model: `keras.Model` with layers adapted by FVAE-LoRA.
        x: Anything that `model.predict` takes: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a `torch.utils.data.DataLoader`, or raw
            data for a KerasHub task with a preprocessor.
        batch_size: Optional integer, as in `model.predict`.
        steps: Optional integer, as in `model.predict`.
        average_tokens: Boolean. Whether to average over the tokens of each
            example that count, which takes less memory. Defaults to `False`.

    Returns:
        Dict of layer path to `LayerLatents`. Where a layer
        is called several times, the others are under its path with `:2` and
        so on.

    Raises:
        ValueError: If no layer is adapted, the adapters are finalized or
            turned off by `adapter_disabled`, or `average_tokens` is no boolean.
        TypeError: If `model` is no `keras.Model`.

    Example:

    >>> inputs = keras.Input((10, 4))
    >>> outputs = keras.layers.Dense(3, name="query")(inputs)
    >>> model = keras.Model(inputs, outputs)
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> latents = keras_fvae.latents(model, np.ones((8, 10, 4)))
    >>> latents["query"].z1_mean.shape
    (8, 10, 2)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """
    layers = require_active_layers(model, FVAELoRAConfig)
    check_can_predict(model)
    check_boolean("average_tokens", average_tokens)
    paths = {id(layer.adapter): layer.path for layer in layers}

    def collect(records):
        return numbered(
            (paths[id(record.adapter)], _tensors(record, average_tokens))
            for record in records
        )

    with _outputs_replaced(model, collect):
        outputs = model.predict(
            x, batch_size=batch_size, steps=steps, verbose=0
        )
    return {path: LayerLatents(**output) for path, output in outputs.items()}


@dataclasses.dataclass(frozen=True)
class Probe:
    """How well a linear model reads an attribute from a latent of a layer.

    Args:
        layer: String, the path of the layer.
        latent: `"z1"` or `"z2"`.
        attribute: String, what is read.
        accuracy: Float, the share of examples that it gets right.
        low: Float, the lower end of the 95 % confidence interval.
        high: Float, its upper end.
        chance: Float, the accuracy of always guessing the commonest class.
    """

    layer: str
    latent: str
    attribute: str
    accuracy: float
    low: float
    high: float
    chance: float


class Probes(tuple[Probe, ...]):
    """All `Probe`s of a model; `print` it to read them as a table."""

    def __str__(self) -> str:
        width = max(len(probe.layer) for probe in self)
        names = max(len(probe.attribute) for probe in self)
        lines = [
            f"{probe.layer:<{width}}  {probe.attribute:<{names}}  "
            f"{probe.latent}  {probe.accuracy:.3f} "
            f"[{probe.low:.3f}, {probe.high:.3f}]  chance {probe.chance:.3f}"
            for probe in self
        ]
        return "\n".join(lines)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns a list of dicts, such as `pandas.DataFrame` takes."""
        return [dataclasses.asdict(probe) for probe in self]


def probe_latents(
    model: keras.Model,
    x: Any,
    y: npt.ArrayLike,
    attributes: Mapping[str, npt.ArrayLike] | None = None,
    *,
    batch_size: int | None = None,
    num_folds: int = 5,
) -> Probes:
    """Linear probes: what can be read from z1, and what from z2.

    For each adapted layer, latent and attribute a logistic regression is
    trained on the posterior means, averaged over the tokens of an example, and
    tested on the examples that it did not see, by cross-validation. If the
    latents are factorized as they are meant to be, the label is read from z1
    and what is not of the task from z2. Takes scikit-learn.

    Args:
        model: `keras.Model` with layers adapted by FVAE-LoRA.
        x: Anything that `model.predict` takes, in a fixed order.
        y: Array of shape `(examples,)`, the labels.
        attributes: Optional dict of name to array of shape `(examples,)`:
            other attributes, such as a background or a speaker.
        batch_size: Optional integer, as in `model.predict`.
        num_folds: Integer of at least 2, into how many parts the examples are
            split. Defaults to `5`.

    Returns:
        `Probes`, with a `Probe` for each layer, latent and
        attribute; the labels are the attribute `"label"`. The confidence
        interval is Wilson's, for the number of examples.

    Raises:
        TypeError: If `attributes` is no dict.
        ValueError: If an attribute has not one value for each example, has
            only one class, or one with fewer examples than `num_folds`.

    Example:

    >>> inputs = keras.Input((10, 4))
    >>> outputs = keras.layers.Dense(3, name="query")(inputs)
    >>> model = keras.Model(inputs, outputs)
    >>> summary = keras_fvae.enable_fvae_lora(model, rank=2)
    >>> x, y = np.random.normal(size=(20, 10, 4)), np.arange(20) % 2
    >>> probes = keras_fvae.probe_latents(model, x, y)
    >>> [(probe.attribute, probe.latent, probe.chance) for probe in probes]
    [('label', 'z1', 0.5), ('label', 'z2', 0.5)]

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640): z1 is to hold what the task needs.
    """
    attributes = attributes or {}
    if not isinstance(attributes, dict):
        raise TypeError(
            "`attributes` must be a dict of name to array. "
            f"Received: attributes={attributes!r}"
        )
    if "label" in attributes:
        raise ValueError("`attributes` must not have a 'label': that is `y`.")
    targets = {"label": y, **attributes}
    targets = {name: np.asarray(value) for name, value in targets.items()}
    for name, target in targets.items():
        _check_target(name, target, len(targets["label"]), num_folds)
    posteriors = latents(model, x, batch_size, average_tokens=True)
    probes = []
    for path, layer_latents in posteriors.items():
        for latent in LATENTS:
            features = getattr(layer_latents, f"{latent}_mean")
            features = _one_each(features, len(targets["label"]), path)
            for name, target in targets.items():
                result = _probe(features, target, num_folds)
                probes.append(Probe(path, latent, name, *result))
    return Probes(probes)


def _probe(features, target, num_folds):
    with extras.needed("analysis"):
        import scipy.stats
        import sklearn.linear_model
        import sklearn.model_selection
        import sklearn.pipeline
        import sklearn.preprocessing

    probe = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(),
        sklearn.linear_model.LogisticRegression(max_iter=1000),
    )
    predicted = sklearn.model_selection.cross_val_predict(
        probe,
        features,
        target,
        cv=sklearn.model_selection.StratifiedKFold(
            num_folds, shuffle=True, random_state=0
        ),
    )
    num_right, num_all = int((predicted == target).sum()), len(target)
    interval = scipy.stats.binomtest(num_right, num_all).proportion_ci(
        method="wilson"
    )
    _, counts = np.unique(target, return_counts=True)
    chance = counts.max() / num_all
    return (
        num_right / num_all,
        float(interval.low),
        float(interval.high),
        float(chance),
    )


def _check_target(name, target, num_examples, num_folds):
    if target.shape != (num_examples,):
        raise ValueError(
            f"The attribute '{name}' must have one value for each example, "
            f"so shape ({num_examples},). Received: shape {target.shape}."
        )
    _, counts = np.unique(target, return_counts=True)
    if len(counts) < 2 or counts.min() < num_folds:
        raise ValueError(
            f"The attribute '{name}' must have two classes at least, each with "
            f"{num_folds} examples or more (`num_folds`). Received: "
            f"{len(counts)} classes, with {counts.tolist()} examples."
        )


def _one_each(features, num_examples, path):
    """A row for each example, where a layer may see it in several windows."""
    if len(features) % num_examples:
        raise ValueError(
            f"`x` and `y` must have as many examples. Received: {num_examples} "
            f"labels, and layer '{path}' saw {len(features)}."
        )
    rows = features.reshape(num_examples, -1, features.shape[-1])
    return rows.mean(axis=1)


def _tensors(record, average_tokens):
    """The tensors of a record by the fields of `LayerLatents`."""
    (z1_mean, z1_log_variance), (z2_mean, z2_log_variance) = record[1:3]
    token_shape = ops.shape(z1_mean)[:-1]
    if record.mask is None:
        mask = ops.ones(token_shape, "bool")
    else:
        mask = masking.flatten_mask(record.mask, token_shape)
        mask = ops.reshape(ops.cast(mask, "bool"), token_shape)
    tensors = {
        "z1_mean": z1_mean,
        "z1_log_variance": z1_log_variance,
        "z2_mean": z2_mean,
        "z2_log_variance": z2_log_variance,
    }
    if average_tokens:
        axes = tuple(range(1, len(token_shape)))
        weights = ops.cast(mask, "float32")[..., None]
        tensors = {
            name: ops.divide_no_nan(
                ops.sum(tensor * weights, axis=axes),
                ops.sum(weights, axis=axes),
            )
            for name, tensor in tensors.items()
        }
        mask = ops.any(mask, axis=axes)
    return {**tensors, "mask": mask}


@contextlib.contextmanager
def _outputs_replaced(model, collect):
    """Makes a model's outputs `collect` of the posteriors, for a while.

    `predict` then brings them out of its compiled steps, whatever the model,
    the backend and the data.
    """
    model_class = type(model)
    is_inside = False

    @functools.wraps(model_class.call)
    def call(self, *args, **kwargs):
        nonlocal is_inside
        if is_inside:
            return model_class.call(self, *args, **kwargs)
        is_inside = True
        try:
            with recorded_posteriors() as records:
                model_class.call(self, *args, **kwargs)
        finally:
            is_inside = False
        return collect(records)

    def forget():
        forget_compiled_functions(model, kinds=("predict",))

    forget()
    model.__class__ = type(model_class.__name__, (model_class,), {"call": call})
    try:
        yield
    finally:
        model.__class__ = model_class
        forget()
