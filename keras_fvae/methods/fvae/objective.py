"""The maths of FVAE-LoRA: every term and objective, as pure functions.

All Gaussians are diagonal. A function of latents returns one value for each
token, summed over the latent's width; `token_mean` averages over the tokens
that count. Everything is computed in float32, whatever the compute dtype.

Reference: [Latent Space Factorization in LoRA](
https://arxiv.org/abs/2510.19640), section 3 and its appendix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from keras import ops

from keras_fvae.backend import lean_gradients
from keras_fvae.backend.types import Tensor

LOG_2_PI = math.log(2 * math.pi)


def squared_distance(
    mean: Tensor, log_variance: Tensor, prior_mean: float | Tensor = 0.0
) -> Tensor:
    """E_q[(z - prior_mean)^2] under q = N(mean, exp(log_variance)).

    All that the terms below need to know of a prior's mean.

    Args:
        mean: Tensor of shape `(..., rank)`, the mean of q.
        log_variance: Tensor of shape `(..., rank)`, its log variance.
        prior_mean: Float, or tensor that broadcasts.

    Returns:
        Float32 tensor of shape `(..., rank)`.
    """
    return lean_gradients.squared_distance(
        _float32(mean), _float32(log_variance), _float32(prior_mean)
    )


def kl_divergence(
    squared_distance: Tensor,
    log_variance: Tensor,
    prior_std: float | Tensor = 1.0,
) -> Tensor:
    """KL(q || p) from a Gaussian q to a prior p = N(prior_mean, prior_std^2).

    Linear in both tensors, so their means over tokens give the mean.

    Args:
        squared_distance: Tensor of shape `(..., rank)`, what the function of
            that name returns for q and the mean of p.
        log_variance: Tensor of shape `(..., rank)`, the log variance of q.
        prior_std: Float, or tensor that broadcasts, the standard deviation of
            p.

    Returns:
        Float32 tensor of shape `(...)`.
    """
    prior_std = _float32(prior_std)
    ratio = _float32(squared_distance) / ops.square(prior_std)
    log_ratio = _float32(log_variance) - 2 * ops.log(prior_std)
    return 0.5 * ops.sum(ratio - log_ratio - 1.0, axis=-1)


def log_density(
    squared_distance: Tensor, prior_std: float | Tensor = 1.0
) -> Tensor:
    """log p(z) of a prior p = N(prior_mean, prior_std^2), or E_q[log p(z)].

    Linear in the tensor, so its mean over tokens gives the mean.

    Args:
        squared_distance: Tensor of shape `(..., rank)`: `(z - prior_mean)^2`
            of drawn latents, or its expectation, which the function of that
            name returns.
        prior_std: Float, or tensor that broadcasts, the standard deviation of
            p.

    Returns:
        Float32 tensor of shape `(...)`.
    """
    prior_std = _float32(prior_std)
    ratio = _float32(squared_distance) / ops.square(prior_std)
    return -0.5 * ops.sum(ratio + 2 * ops.log(prior_std) + LOG_2_PI, axis=-1)


def wasserstein(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """Squared 2-Wasserstein distance between two diagonal Gaussians.

    Args:
        mean1: Tensor of shape `(..., rank)`, the mean of the first.
        log_variance1: Tensor of shape `(..., rank)`, its log variance.
        mean2: Tensor of shape `(..., rank)`, the mean of the second.
        log_variance2: Tensor of shape `(..., rank)`, its log variance.

    Returns:
        Float32 tensor of shape `(...)`.
    """
    std1 = ops.exp(0.5 * _float32(log_variance1))
    std2 = ops.exp(0.5 * _float32(log_variance2))
    squares = ops.square(_float32(mean1) - _float32(mean2))
    return ops.sum(squares + ops.square(std1 - std2), axis=-1)


def negative_log_likelihood(squared_error: Tensor, scale: Tensor) -> Tensor:
    """-log p(x | z1, z2) of p = N(reconstruction, diag(scale^2)).

    The scale is the same for every token, so the mean over tokens is taken
    before this function, of the squared error alone.

    Args:
        squared_error: Tensor of shape `(..., d)`: `(x - reconstruction)^2`,
            or its mean over tokens.
        scale: Tensor of shape `(d,)`, the decoder's standard deviation.

    Returns:
        Float32 tensor of shape `(...)`.
    """
    squared_error, scale = _float32(squared_error), _float32(scale)
    return 0.5 * ops.sum(
        squared_error / ops.square(scale) + 2 * ops.log(scale) + LOG_2_PI,
        axis=-1,
    )


def fvae(
    log_likelihood: Tensor,
    kl_z1: Tensor,
    log_p1: Tensor,
    log_p2: Tensor,
    reconstruction_weight: float,
    kl_weight: float | Tensor,
    gamma_weights: Sequence[float | Tensor],
) -> Tensor:
    """The paper's objective: a log p(x|z1, z2) - b KL(q1 || p1) + c gamma.

    Gamma = E[log p2(z2)] - E[log p1(z1)] draws z2 to its own prior and pushes
    z1 off the one that they would otherwise share.

    Args:
        log_likelihood: Scalar tensor, log p(x | z1, z2).
        kl_z1: Scalar tensor, KL(q1 || p1).
        log_p1: Scalar tensor, E[log p1(z1)].
        log_p2: Scalar tensor, E[log p2(z2)].
        reconstruction_weight: Float, a.
        kl_weight: Float or scalar tensor, b.
        gamma_weights: Pair of the same, c for z1 and for z2.

    Returns:
        Scalar tensor, to be maximised.
    """
    gamma = gamma_weights[1] * log_p2 - gamma_weights[0] * log_p1
    return reconstruction_weight * log_likelihood - kl_weight * kl_z1 + gamma


def vae2lat(log_likelihood: Tensor, kl_z1: Tensor, kl_z2: Tensor) -> Tensor:
    """The evidence lower bound of a VAE with two latents: no gamma.

    Args:
        log_likelihood: Scalar tensor, log p(x | z1, z2).
        kl_z1: Scalar tensor, KL(q1 || p1).
        kl_z2: Scalar tensor, KL(q2 || p2).

    Returns:
        Scalar tensor, to be maximised.
    """
    return log_likelihood - kl_z1 - kl_z2


def beta_vae2lat(
    log_likelihood: Tensor,
    kl_z1: Tensor,
    kl_z2: Tensor,
    kl_weight: float | Tensor,
) -> Tensor:
    """As `vae2lat`, with both KL terms weighted by b.

    Args:
        log_likelihood: Scalar tensor, log p(x | z1, z2).
        kl_z1: Scalar tensor, KL(q1 || p1).
        kl_z2: Scalar tensor, KL(q2 || p2).
        kl_weight: Float or scalar tensor, b.

    Returns:
        Scalar tensor, to be maximised.
    """
    return log_likelihood - kl_weight * (kl_z1 + kl_z2)


def _float32(x):
    return ops.cast(x, "float32")
