"""How the weights of an FVAE lie, and what the authors' code calls them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from keras_fvae.backend.packing import Packing
from keras_fvae.methods.fvae.config import FVAELoRAConfig

REFERENCE_STD = "views_conditionalGaussianDecoders.scale_tril"


def _num_trunks(config):
    """How many MLPs the encoders are, each with its share of four heads."""
    return 2 if config.encoder_shared_trunk else 4


def layout(
    config: FVAELoRAConfig, width: int, finalized: bool
) -> tuple[Packing, Packing]:
    """How the weights of an FVAE lie in its two variables.

    Args:
        config: `FVAELoRAConfig`.
        width: Integer, the width d of the input.
        finalized: Boolean. Whether only what the mean of q1 needs is held.

    Returns:
        Pair of `Packing`: of what has a row for each feature of the input, and
        of what does not grow with the input.
    """
    num_trunks = 1 if finalized else _num_trunks(config)
    num_heads = 1 if finalized else 4 // num_trunks
    feature_shapes: dict[str, tuple[int, ...]] = {}
    latent_shapes: dict[str, tuple[int, ...]] = {}
    widths = [width, *config.hidden_units, num_heads * config.rank]
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        shapes = feature_shapes if level == 0 else latent_shapes
        shapes[f"encoder_kernel_{level}"] = (before, num_trunks, after)
        latent_shapes[f"encoder_bias_{level}"] = (num_trunks, after)
    if not finalized:
        num_latents = 2 if config.latent_fusion == "concat" else 1
        widths = [num_latents * config.rank, *config.decoder_units]
        for level, (before, after) in enumerate(itertools.pairwise(widths)):
            latent_shapes[f"decoder_kernel_{level}"] = (before, after)
            latent_shapes[f"decoder_bias_{level}"] = (after,)
        feature_shapes["decoder_output_kernel"] = (width, widths[-1])
        feature_shapes["decoder_output_bias"] = (width,)
        feature_shapes["log_std"] = (width,)
    return Packing(feature_shapes, num_shared_axes=1), Packing(latent_shapes)


def head_place(config: FVAELoRAConfig, head: int) -> tuple[int, slice]:
    """Where one of the encoders' four heads lies in their last layer.

    Args:
        config: `FVAELoRAConfig`.
        head: Integer: the mean of q1, its log variance, and those of q2.

    Returns:
        Pair of an integer, its trunk, and a slice, its columns.
    """
    trunk, position = divmod(head, 4 // _num_trunks(config))
    return trunk, slice(position * config.rank, (position + 1) * config.rank)


def reference_views(
    config: FVAELoRAConfig, weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Views of an FVAE's weights by the authors' names.

    Args:
        config: `FVAELoRAConfig`.
        weights: Dict of name to NumPy array, the arrays that `layout` names.

    Returns:
        Dict of name to NumPy array, in the layout of PyTorch: the weight of a
        linear layer is of shape `(out, in)`.
    """
    views = {}

    def add_affine(name, kernel, bias):
        views.update({f"{name}.weight": kernel.T, f"{name}.bias": bias})

    depth = len(config.hidden_units)
    for head, (index, trunk_name, head_name) in enumerate(
        [
            (0, "layers_mean", "mean"),
            (0, "layers_logvar", "logvar"),
            (1, "layers_mean", "mean"),
            (1, "layers_logvar", "logvar"),
        ]
    ):
        if config.encoder_shared_trunk:
            trunk_name = "layers"
        prefix = f"views_conditionalGaussianEncoders_list.{index}"
        trunk, columns = head_place(config, head)
        for level in range(depth):
            add_affine(
                f"{prefix}.{trunk_name}.{level}",
                weights[f"encoder_kernel_{level}"][:, trunk],
                weights[f"encoder_bias_{level}"][trunk],
            )
        add_affine(
            f"{prefix}.{head_name}",
            weights[f"encoder_kernel_{depth}"][:, trunk, columns],
            weights[f"encoder_bias_{depth}"][trunk, columns],
        )
    prefix = "views_conditionalGaussianDecoders"
    for level in range(len(config.decoder_units)):
        add_affine(
            f"{prefix}.layers.{level}",
            weights[f"decoder_kernel_{level}"],
            weights[f"decoder_bias_{level}"],
        )
    add_affine(
        f"{prefix}.output_layer",
        weights["decoder_output_kernel"].T,
        weights["decoder_output_bias"],
    )
    views[REFERENCE_STD] = weights["log_std"]
    return views
