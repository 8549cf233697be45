"""Every term against numerical integration or scipy's densities."""

import numpy as np
import pytest
import scipy.stats
from helpers import to_numpy
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.token_mean import token_mean
from keras_fvae.methods.fvae import objective

PRIORS = [(0.0, 1.0), (1.5, 1.0), (-0.75, 2.0)]


@pytest.fixture
def gaussians(rng):
    """Means and log variances of two Gaussians for each of five tokens."""
    shape = (5, 4)
    return [rng.normal(size=shape).astype("float32") for _ in range(4)]


def expectation(function, mean, log_variance):
    """E[function(z)] of normal z, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    std = np.exp(0.5 * log_variance.astype("float64"))[..., None]
    values = function(mean[..., None] + std * nodes, std)
    return (values * weights).sum(-1) / np.sqrt(2 * np.pi)


@pytest.mark.parametrize("prior", PRIORS)
def test_kl_divergence(gaussians, prior):
    mean, log_variance, *_ = gaussians

    def log_ratio(z, std):
        log_q = scipy.stats.norm.logpdf(z, mean[..., None], std)
        return log_q - scipy.stats.norm.logpdf(z, *prior)

    expected = expectation(log_ratio, mean, log_variance).sum(-1)
    distance = objective.squared_distance(mean, log_variance, prior[0])
    kl = objective.kl_divergence(distance, log_variance, prior[1])
    np.testing.assert_allclose(to_numpy(kl), expected, rtol=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_expected_log_density(gaussians, prior):
    mean, log_variance, *_ = gaussians
    expected = expectation(
        lambda z, std: scipy.stats.norm.logpdf(z, *prior), mean, log_variance
    ).sum(-1)
    distance = objective.squared_distance(mean, log_variance, prior[0])
    value = objective.log_density(distance, prior[1])
    np.testing.assert_allclose(to_numpy(value), expected, rtol=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_log_density(gaussians, prior):
    z = gaussians[0]
    expected = scipy.stats.norm.logpdf(z, *prior).sum(-1)
    value = objective.log_density(np.square(z - prior[0]), prior[1])
    np.testing.assert_allclose(to_numpy(value), expected, rtol=1e-5)


def test_wasserstein(gaussians):
    mean1, log_variance1, mean2, log_variance2 = gaussians
    # In one dimension, the distance between the quantile functions.
    levels = (np.arange(200_000) + 0.5) / 200_000
    quantiles = scipy.stats.norm.ppf(levels)
    difference = (mean1 - mean2)[..., None] + (
        np.exp(log_variance1 / 2) - np.exp(log_variance2 / 2)
    )[..., None] * quantiles
    expected = np.square(difference).mean(-1).sum(-1)
    value = objective.wasserstein(*gaussians)
    np.testing.assert_allclose(to_numpy(value), expected, rtol=1e-4)


def test_negative_log_likelihood(rng):
    x, reconstruction = rng.normal(size=(2, 7, 5)).astype("float32")
    scale = rng.uniform(0.1, 2, size=5).astype("float32")
    expected = -scipy.stats.norm.logpdf(x, reconstruction, scale).sum(-1)
    squared_error = np.square(x - reconstruction)
    each = objective.negative_log_likelihood(squared_error, scale)
    np.testing.assert_allclose(to_numpy(each), expected, rtol=1e-5)
    mean = objective.negative_log_likelihood(squared_error.mean(0), scale)
    np.testing.assert_allclose(to_numpy(mean), expected.mean(), rtol=1e-5)


def test_objectives():
    log_likelihood, kl_z1, kl_z2, log_p1, log_p2 = -3.0, 0.5, 0.7, -2.0, -1.5
    fvae = objective.fvae(
        log_likelihood, kl_z1, log_p1, log_p2, 0.1, 10.0, (0.25, 2.0)
    )
    assert fvae == pytest.approx(-0.3 - 5.0 + 2.0 * -1.5 - 0.25 * -2.0)
    vae2lat = objective.vae2lat(log_likelihood, kl_z1, kl_z2)
    assert vae2lat == pytest.approx(-4.2)
    beta = objective.beta_vae2lat(log_likelihood, kl_z1, kl_z2, 2.0)
    assert beta == pytest.approx(-5.4)


def test_token_mean_counts_only_the_tokens_of_the_mask(rng):
    values = rng.normal(size=(2, 6, 3)).astype("float32")
    mask = np.array([1, 0, 1, 1, 0, 0])
    kept = values[:, mask == 1]
    for feature_axes, expected in [
        (0, kept[..., 0].mean()),
        (1, kept.mean((0, 1))),
    ]:
        argument = values if feature_axes else values[..., 0]
        weights = replicas.token_weights(mask, 6)
        mean = token_mean(argument, weights, feature_axes)
        np.testing.assert_allclose(to_numpy(mean), expected, rtol=1e-5)
    everything = token_mean(values[..., 0])
    np.testing.assert_allclose(
        to_numpy(everything), values[..., 0].mean(), rtol=1e-5
    )


def test_token_mean_without_any_token_is_zero():
    weights = replicas.token_weights(np.zeros(4), 4)
    mean = token_mean(np.ones((4, 3)), weights, feature_axes=1)
    assert to_numpy(mean).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computed_in_float32(dtype):
    mean = ops.full((2, 300), 30.0, dtype=dtype)
    log_variance = ops.zeros_like(mean)
    distance = objective.squared_distance(mean, log_variance)
    kl = objective.kl_divergence(distance, log_variance)
    # Beyond float16's largest number, and beyond bfloat16's precision.
    assert to_numpy(kl).tolist() == [135_000.0, 135_000.0]
    assert str(to_numpy(kl).dtype) == "float32"
