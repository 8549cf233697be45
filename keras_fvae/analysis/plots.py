"""Pictures of what FVAE-LoRA does, as matplotlib figures.

Each function returns a figure, which a notebook shows and `figure.savefig`
writes. Takes matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_fvae.analysis import extras
from keras_fvae.analysis.probes import LATENTS
from keras_fvae.analysis.probes import LayerLatents
from keras_fvae.analysis.probes import Probe
from keras_fvae.methods.fvae import objective
from keras_fvae.methods.fvae.totals import ACTIVE_UNIT_VARIANCE
from keras_fvae.methods.fvae.totals import NAMES

with extras.needed("analysis"):
    import matplotlib.figure
    import matplotlib.ticker

# Okabe and Ito's colours, which colour-blind readers can tell apart, and marks
# for those who print in grey.
COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
    "#F0E442",
)
MARKERS = "osD^vPX*<>"


def plot_latents(
    layer_latents: LayerLatents, labels: npt.ArrayLike, title: str | None = None
) -> matplotlib.figure.Figure:
    """z1 and z2 of a layer in two dimensions, coloured by class or group.

    The posterior means, averaged over the tokens of an example that count, on
    their first two principal components.

    Args:
        layer_latents: `LayerLatents`, one of those that
            `keras_fvae.latents` returns.
        labels: Array of shape `(examples,)`, a class or group for each.
        title: Optional string above the picture.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there is not one label for each example.

    Example:

    >>> layer_latents = keras_fvae.analysis.probes.LayerLatents(
    ...     *np.random.normal(size=(4, 20, 10, 3)), mask=np.ones((20, 10))
    ... )
    >>> figure = keras_fvae.plots.plot_latents(layer_latents, np.arange(20) % 2)
    >>> len(figure.axes)
    2
    """
    labels = np.asarray(labels)
    num_examples = len(layer_latents.z1_mean)
    if labels.shape != (num_examples,):
        raise ValueError(
            "`labels` must have one value for each of the "
            f"{num_examples} examples. Received: shape {labels.shape}."
        )
    figure, axes = _figure(1, 2, width=9, height=4.2)
    for axis, latent in zip(axes, LATENTS):
        means = getattr(layer_latents, f"{latent}_mean")
        points, shares = _principal_components(
            _average_tokens(means, layer_latents.mask)
        )
        for index, label in enumerate(np.unique(labels)):
            axis.scatter(
                *points[labels == label].T,
                s=18,
                alpha=0.7,
                linewidths=0,
                label=str(label),
                **_style(index),
            )
        axis.set(
            title=f"means of {latent}",
            xlabel=f"component 1 ({shares[0]:.0%} of the variance)",
            ylabel=f"component 2 ({shares[1]:.0%})",
        )
    _legend(figure, axes[-1])
    figure.suptitle(title or "")
    return figure


def plot_layers(
    latents: Mapping[str, LayerLatents],
) -> matplotlib.figure.Figure:
    """KL, Wasserstein distance and active units of each layer.

    Args:
        latents: Dict of layer path to `LayerLatents`, what
            `keras_fvae.latents` returns.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `latents` is empty.

    Example:

    >>> layer_latents = keras_fvae.analysis.probes.LayerLatents(
    ...     *np.random.normal(size=(4, 20, 10, 3)), mask=np.ones((20, 10))
    ... )
    >>> figure = keras_fvae.plots.plot_layers({"query": layer_latents})
    >>> len(figure.axes)
    3
    """
    if not latents:
        raise ValueError("`latents` must have one layer at least.")
    names = _short_names(latents)
    rows = np.arange(len(names))
    height = 1.6 + 0.3 * len(names)
    figure, axes = _figure(1, 3, width=11, height=height, sharey=True)
    statistics = [_layer_statistics(layer) for layer in latents.values()]
    for axis, (name, label) in zip(
        axes,
        [
            ("kl", "KL(q1 || p1) in nats a token"),
            ("wasserstein", "squared 2-Wasserstein distance\nof q1 and q2"),
            ("active_units", "active units, of all"),
        ],
    ):
        values = [statistic[name] for statistic in statistics]
        axis.set_xlabel(label)
        if name == "active_units":
            for index, latent in enumerate(LATENTS):
                axis.barh(
                    rows + 0.2 * (2 * index - 1),
                    [value[index] for value in values],
                    height=0.38,
                    color=COLORS[index],
                    label=latent,
                )
            axis.set_xlim(0, next(iter(latents.values())).z1_mean.shape[-1])
            axis.xaxis.set_major_locator(_whole_numbers())
            _legend(figure, axis)
        else:
            axis.barh(rows, values, height=0.7, color=COLORS[0])
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    return figure


def plot_training(
    history: keras.callbacks.History | Mapping[str, Sequence[float]],
) -> matplotlib.figure.Figure:
    """The terms of the ELBO over the epochs.

    Args:
        history: What `fit` returned, with `keras_fvae.FVAELoRAMonitor` among
            its callbacks, or the dict `history.history`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If the history has no terms of the ELBO.

    Example:

    >>> history = {"loss": [1.0, 0.5], "kl_z1": [0.1, 0.2]}
    >>> figure = keras_fvae.plots.plot_training(history)
    >>> [axis.get_title() for axis in figure.axes]
    ['loss', 'kl_z1']
    """
    logs: Any = getattr(history, "history", history)
    names = [name for name in ("loss", *NAMES) if name in logs]
    if names in ([], ["loss"]):
        raise ValueError(
            "The history has none of the terms of the ELBO. Call `fit` with "
            "`callbacks=[keras_fvae.FVAELoRAMonitor()]`. Received: "
            f"{sorted(logs)}."
        )
    num_columns = min(4, len(names))
    num_rows = -(-len(names) // num_columns)
    figure, axes = _figure(
        num_rows, num_columns, width=2.9 * num_columns, height=2.5 * num_rows
    )
    for axis, name in zip(axes, names):
        epochs = np.arange(1, len(logs[name]) + 1)
        axis.plot(epochs, logs[name], color=COLORS[0], marker="o", markersize=3)
        validation = logs.get(f"val_{name}")
        if validation is not None:
            axis.plot(
                epochs,
                validation,
                color=COLORS[1],
                marker="s",
                markersize=3,
                linestyle="--",
                label="validation",
            )
            axis.legend(frameon=False)
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(_whole_numbers())
    for axis in axes[len(names) :]:
        axis.remove()
    return figure


def plot_ranks(
    history: Sequence[Mapping[str, int]],
) -> matplotlib.figure.Figure:
    """How many ranks AdaLoRA has left of each layer, over the epochs.

    Args:
        history: List of dicts of layer path to rank, one for each epoch: the
            `history` of a `keras_fvae.AdaLoRAAllocator`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `history` is empty.
        TypeError: If it is no list of dicts.

    Example:

    >>> figure = keras_fvae.plots.plot_ranks(
    ...     [{"query": 4, "value": 4}, {"query": 1, "value": 3}]
    ... )
    >>> figure.axes[0].get_xlabel()
    'epoch'
    """
    advice = (
        "Call `fit` with a `keras_fvae.AdaLoRAAllocator` among its callbacks, "
        "and pass its `history`."
    )
    if not isinstance(history, Sequence) or not all(
        isinstance(epoch, Mapping) for epoch in history
    ):
        raise TypeError(
            "`history` must be a list of dicts of layer path to rank. "
            f"{advice} Received: history={history!r} (of type {type(history)})"
        )
    if not history:
        raise ValueError(f"`history` must have one epoch at least. {advice}")
    # An allocator may have served several models, or layers frozen since.
    paths = [*dict.fromkeys(path for epoch in history for path in epoch)]
    ranks = np.array(
        [[epoch.get(path, np.nan) for epoch in history] for path in paths]
    )
    figure, (axis,) = _figure(1, 1, width=6.4, height=1.6 + 0.22 * len(paths))
    image = axis.imshow(ranks, cmap="viridis", vmin=0, aspect="auto")
    bar = figure.colorbar(image, label="ranks")
    bar.locator = _whole_numbers()
    axis.set(xlabel="epoch", yticks=range(len(paths)))
    axis.set_yticklabels(_short_names(paths))
    axis.xaxis.set_major_locator(_whole_numbers())
    axis.xaxis.set_major_formatter(lambda epoch, _: f"{epoch + 1:.0f}")
    return figure


def plot_probes(probes: Sequence[Probe]) -> matplotlib.figure.Figure:
    """How well each attribute is read from z1 and from z2, layer by layer.

    Args:
        probes: `Probes`, what `keras_fvae.probe_latents`
            returns. Bars are the 95 % confidence intervals, dotted lines the
            level of chance.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `probes` is empty.

    Example:

    >>> probe = keras_fvae.analysis.probes.Probe
    >>> probes = [
    ...     probe("query", "z1", "label", 0.9, 0.8, 0.95, 0.5),
    ...     probe("query", "z2", "label", 0.6, 0.5, 0.7, 0.5),
    ... ]
    >>> figure = keras_fvae.plots.plot_probes(probes)
    >>> [axis.get_title() for axis in figure.axes]
    ['label']
    """
    if not probes:
        raise ValueError("`probes` must have one probe at least.")
    attributes = list(dict.fromkeys(probe.attribute for probe in probes))
    layers = list(dict.fromkeys(probe.layer for probe in probes))
    rows = {layer: row for row, layer in enumerate(layers)}
    figure, axes = _figure(
        1,
        len(attributes),
        width=2.5 + 3.5 * len(attributes),
        height=1.6 + 0.35 * len(layers),
        sharey=True,
    )
    for axis, attribute in zip(axes, attributes):
        for index, latent in enumerate(LATENTS):
            chosen = [
                probe
                for probe in probes
                if (probe.attribute, probe.latent) == (attribute, latent)
            ]
            accuracies = np.array([probe.accuracy for probe in chosen])
            interval = np.array([(probe.low, probe.high) for probe in chosen]).T
            axis.errorbar(
                accuracies,
                [rows[probe.layer] + 0.2 * index - 0.1 for probe in chosen],
                xerr=np.abs(interval - accuracies),
                fmt=MARKERS[index],
                color=COLORS[index],
                capsize=2,
                label=latent,
            )
        axis.axvline(
            next(p.chance for p in probes if p.attribute == attribute),
            color="0.4",
            linestyle=":",
            label="chance",
        )
        axis.set(title=attribute, xlabel="accuracy of a linear probe")
    axes[0].set_yticks(range(len(layers)), _short_names(layers))
    axes[0].invert_yaxis()
    _legend(figure, axes[-1])
    return figure


def _figure(num_rows, num_columns, width, height, **options):
    """A figure that no window belongs to, and its axes in a flat list."""
    figure = matplotlib.figure.Figure(
        figsize=(width, height), layout="constrained"
    )
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _whole_numbers():
    return matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)


def _style(index):
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _legend(figure, axis):
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _average_tokens(means, mask):
    """One row for each example: the mean over its tokens that count."""
    rank = means.shape[-1]
    means = means.reshape(len(means), -1, rank)
    weights = np.asarray(mask, "float64").reshape(len(means), -1, 1)
    return (means * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)


def _principal_components(rows):
    """The first two principal components, and their shares of the variance."""
    rows = rows - rows.mean(axis=0)
    left, singular_values, _ = np.linalg.svd(rows, full_matrices=False)
    points = np.zeros((len(rows), 2))
    shares = np.zeros(2)
    count = min(2, len(singular_values))
    points[:, :count] = (left * singular_values)[:, :count]
    total = np.square(singular_values).sum()
    if total > 0:
        shares[:count] = np.square(singular_values[:count]) / total
    return points, shares


def _layer_statistics(layer):
    mask = np.asarray(layer.mask, bool)
    q1 = layer.z1_mean[mask], layer.z1_log_variance[mask]
    q2 = layer.z2_mean[mask], layer.z2_log_variance[mask]

    def mean(values):
        return float(ops.convert_to_numpy(values).mean())

    return {
        "kl": mean(
            objective.kl_divergence(objective.squared_distance(*q1), q1[1])
        ),
        "wasserstein": mean(objective.wasserstein(*q1, *q2)),
        "active_units": [
            int((means.var(axis=0) > ACTIVE_UNIT_VARIANCE).sum())
            for means in (q1[0], q2[0])
        ],
    }


def _short_names(paths):
    """Paths without the folders that all of them begin with."""
    paths = list(paths)
    common = os.path.commonpath(paths) if len(paths) > 1 else ""
    return [os.path.relpath(path, common) if common else path for path in paths]
