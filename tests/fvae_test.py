import json
import pathlib

import keras
import numpy as np
import pytest
import scipy.stats
from helpers import BACKEND
from helpers import dtype_of
from helpers import to_numpy
from helpers import value_and_gradients
from keras import ops

import keras_fvae
from keras_fvae.integrations.peft_fvae import config_from_peft
from keras_fvae.methods.fvae import objective
from keras_fvae.methods.fvae.layout import REFERENCE_STD
from keras_fvae.methods.fvae.layout import reference_views

REFERENCE = pathlib.Path(__file__).parent / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("fvae_*.npz"))


class ReferenceCase:
    """One file of `tests/reference/`, and the FVAE that it is about."""

    def __init__(self, name):
        self.arrays = dict(np.load(REFERENCE / f"{name}.npz"))
        theirs = json.loads(str(self.arrays["config"]))
        self.config = config_from_peft(
            {"lora_alpha": 1, "num_of_z_sampled": 1, **theirs}
        )
        self.fvae = keras_fvae.FVAE(self.config)
        self.fvae.build(self.arrays["x"].shape)
        self.fvae.set_reference_weights(self.named("weight/"))
        self.noise = (self.arrays["eps_z1"], self.arrays["eps_z2"])

    def named(self, prefix):
        return {
            name.removeprefix(prefix): array
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }

    @property
    def loss_constant(self):
        """The log densities' constants, which the authors' loss leaves out."""
        weight_z1, weight_z2 = self.config.gamma_weights
        log_2_pi = np.log(2 * np.pi)
        log_std = np.log(self.config.prior_std)
        return self.config.rank * (
            weight_z2 * (0.5 * log_2_pi + log_std) - weight_z1 * 0.5 * log_2_pi
        )


@pytest.fixture(params=CASES)
def case(request):
    return ReferenceCase(request.param)


def test_there_are_reference_cases():
    assert len(CASES) == 7


def test_values_of_the_reference(case):
    out = case.fvae(case.arrays["x"], training=True, noise=case.noise)
    values = {
        "z1_mean": out.z1_mean,
        "z2_mean": out.z2_mean,
        "z1": out.z1,
        "z2": out.z2,
        "kl_z1": out.terms["kl_z1"],
        "negative_log_likelihood": out.terms["negative_log_likelihood"],
        "loss": out.loss - case.loss_constant,
    }
    for name, value in values.items():
        np.testing.assert_allclose(
            to_numpy(value),
            case.arrays[name],
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )


def test_gradients_of_the_reference(case):
    fvae = case.fvae
    _, gradients, (x_gradient,) = value_and_gradients(
        lambda x: fvae(x, training=True, noise=case.noise).loss,
        [fvae.feature_weights, fvae.latent_weights],
        [case.arrays["x"]],
    )
    # A gradient has the layout of its variable.
    ours = reference_views(fvae.config, fvae.networks.unpack(*gradients))
    # Ours is with respect to the logarithm of theirs.
    ours[REFERENCE_STD] = (
        ours[REFERENCE_STD] / case.arrays[f"weight/{REFERENCE_STD}"]
    )
    theirs = case.named("grad/")
    assert ours.keys() == theirs.keys()
    for name, gradient in {**ours, "x": x_gradient}.items():
        expected = theirs[name] if name in theirs else case.arrays["grad_x"]
        np.testing.assert_allclose(
            gradient,
            expected,
            rtol=1e-4,
            atol=1e-4 * np.abs(expected).max(),
            err_msg=name,
        )


def test_reference_weights_round_trip(case):
    theirs = case.named("weight/")
    ours = case.fvae.get_reference_weights()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, rtol=1e-6, err_msg=name)


def test_a_negative_reference_scale_gives_the_same_density(rng):
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=2))
    fvae.build((None, 3))
    weights = fvae.get_reference_weights()
    weights[REFERENCE_STD] = np.array([0.5, -0.5 - 2e-5, -1e-5], "float32")
    fvae.set_reference_weights(weights)
    scale = fvae.get_reference_weights()[REFERENCE_STD]
    np.testing.assert_allclose(scale, [0.5, 0.5, 0.0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop(REFERENCE_STD),
            f"Missing weight: '{REFERENCE_STD}",
        ),
        (lambda w: w.update(other=1), "Unknown weight: 'other'"),
        (
            lambda w: w.update({REFERENCE_STD: np.ones(4)}),
            r"must have shape \(3,\).*Received: \(4,\)",
        ),
    ],
)
def test_refused_reference_weights_change_nothing(change, message):
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=2))
    fvae.build((None, 3))
    before = fvae.get_reference_weights()
    weights = {name: np.zeros_like(w) for name, w in before.items()}
    change(weights)
    with pytest.raises(ValueError, match=message):
        fvae.set_reference_weights(weights)
    for name, weight in fvae.get_reference_weights().items():
        np.testing.assert_array_equal(weight, before[name])


def test_reference_weights_of_an_unbuilt_fvae_are_refused():
    with pytest.raises(ValueError, match="no weights yet"):
        keras_fvae.FVAE().get_reference_weights()


def perturb(layer, rng, scale=0.3):
    """Moves every weight, so that no zero hides a fault."""
    for variable in layer.trainable_variables:
        noise = rng.normal(scale=scale, size=variable.shape)
        variable.assign(to_numpy(variable) + noise)


@pytest.fixture
def fvae(config, rng):
    fvae = keras_fvae.FVAE(config)
    fvae.build((None, 5))
    perturb(fvae, rng)
    return fvae


def test_gamma_is_mismatch_plus_divergence(fvae, rng):
    terms = fvae(rng.normal(size=(4, 6, 5)), training=True).terms
    terms = {name: float(to_numpy(value)) for name, value in terms.items()}
    assert terms["gamma"] == pytest.approx(
        terms["lambda_mismatch"] + terms["delta_divergence"], rel=1e-5
    )


def test_terms_are_those_of_the_latents(fvae, config, rng):
    out = fvae(rng.normal(size=(4, 6, 5)), training=True)
    q1 = (out.z1_mean, out.z1_log_variance)
    q2 = (out.z2_mean, out.z2_log_variance)
    distance1 = objective.squared_distance(*q1)
    distance2 = objective.squared_distance(*q2, config.prior_mean)
    expected = {
        "kl_z1": objective.kl_divergence(distance1, q1[1]),
        "kl_z2": objective.kl_divergence(distance2, q2[1], config.prior_std),
        "wasserstein": objective.wasserstein(*q1, *q2),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            to_numpy(out.terms[name]), to_numpy(values).mean(), rtol=1e-5
        )


def test_monte_carlo_gamma_estimates_the_closed_form(fvae, config, rng):
    x = rng.normal(size=(1, 5))
    exact = fvae(x).terms["gamma"]
    estimator = keras_fvae.FVAE(
        keras_fvae.FVAELoRAConfig(
            **{
                **config.get_config(),
                "gamma_estimator": "monte_carlo",
                "num_samples": 20_000,
            }
        )
    )
    estimator.build((None, 5))
    estimator.set_reference_weights(fvae.get_reference_weights())
    out = estimator(x, training=True)
    draws = to_numpy(
        objective.log_density(
            ops.square(out.z2 - config.prior_mean), config.prior_std
        )
        - objective.log_density(ops.square(out.z1))
    )
    error_bar = draws.std() / np.sqrt(draws.size)
    assert abs(to_numpy(out.terms["gamma"]) - to_numpy(exact)) < 4 * error_bar


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"reconstruction_weight": 0.1, "kl_weight": 10.0},
            lambda t, c: (
                0.1 * -t["negative_log_likelihood"]
                - 10 * t["kl_z1"]
                + c.gamma_weights[0] * t["gamma"]
            ),
        ),
        (
            {"objective": "vae2lat", "kl_weight": 4.0},
            lambda t, c: (
                -t["negative_log_likelihood"] - t["kl_z1"] - t["kl_z2"]
            ),
        ),
        (
            {"objective": "beta_vae2lat", "kl_weight": 4.0},
            lambda t, c: (
                -t["negative_log_likelihood"] - 4 * (t["kl_z1"] + t["kl_z2"])
            ),
        ),
    ],
)
def test_the_loss_is_the_negated_objective(options, expected, rng):
    config = keras_fvae.FVAELoRAConfig(rank=3, decoder_units=(4,), **options)
    fvae = keras_fvae.FVAE(config)
    fvae.build((None, 5))
    perturb(fvae, rng)
    out = fvae(rng.normal(size=(4, 5)), training=True)
    terms = {name: to_numpy(value) for name, value in out.terms.items()}
    np.testing.assert_allclose(
        to_numpy(out.loss), -expected(terms, config), rtol=1e-5
    )


def draw(weights, index, x, rng, size):
    """Latents of an encoder, and log q - log p1 and log p2 of them."""
    prefix = f"views_conditionalGaussianEncoders_list.{index}"

    def affine(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    hidden = np.maximum(affine(f"{prefix}.layers.0", x), 0)
    mean = affine(f"{prefix}.mean", hidden)
    std = np.exp(0.5 * affine(f"{prefix}.logvar", hidden))
    z = rng.normal(mean, std, (size, *mean.shape))
    return z, scipy.stats.norm.logpdf(z, mean, std).sum(-1)


@pytest.mark.parametrize(
    "name, combine",
    [
        ("fvae", lambda p, kl1, kl2, gamma: 0.5 * p - 2 * kl1 + 0.75 * gamma),
        ("vae2lat", lambda p, kl1, kl2, gamma: p - kl1 - kl2),
        ("beta_vae2lat", lambda p, kl1, kl2, gamma: p - 2 * (kl1 + kl2)),
    ],
)
def test_objectives_against_draws_in_numpy(name, combine, rng):
    size = 20_000
    config = keras_fvae.FVAELoRAConfig(
        rank=2,
        decoder_units=(4,),
        dropout=0.0,
        objective=name,
        reconstruction_weight=0.5,
        kl_weight=2.0,
        gamma_weight=0.75,
        num_samples=size,
    )
    fvae = keras_fvae.FVAE(config)
    fvae.build((None, 5))
    perturb(fvae, rng)
    x = rng.normal(size=(3, 5)).astype("float32")
    value = -to_numpy(fvae(x, training=True).loss)

    weights = fvae.get_reference_weights()
    z1, log_q1 = draw(weights, 0, x, rng, size)
    z2, log_q2 = draw(weights, 1, x, rng, size)
    decoder = "views_conditionalGaussianDecoders"
    hidden = (
        np.concatenate([z1, z2], -1) @ weights[f"{decoder}.layers.0.weight"].T
    )
    hidden = np.maximum(hidden + weights[f"{decoder}.layers.0.bias"], 0)
    reconstruction = (
        hidden @ weights[f"{decoder}.output_layer.weight"].T
        + weights[f"{decoder}.output_layer.bias"]
    )
    scale = weights[REFERENCE_STD] + 1e-5
    log_p = scipy.stats.norm.logpdf(x, reconstruction, scale).sum(-1)
    log_p1 = scipy.stats.norm.logpdf(z1).sum(-1)
    log_p2 = scipy.stats.norm.logpdf(z2, 1.5, 1.0).sum(-1)
    draws = combine(
        log_p, log_q1 - log_p1, log_q2 - log_p2, log_p2 - log_p1
    ).mean(-1)
    # The layer draws as many of its own.
    error_bar = np.sqrt(2) * draws.std() / np.sqrt(size)
    assert abs(draws.mean() - value) < 4 * error_bar
    assert error_bar < 0.02 * abs(value)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rematerialized_results_are_the_same(dropout, rng):
    x = rng.normal(size=(8, 5)).astype("float32")
    mask = np.arange(8) % 3 > 0
    results = []
    for rematerialize in (False, True):
        fvae = keras_fvae.FVAE(
            keras_fvae.FVAELoRAConfig(
                rank=3,
                decoder_units=(8, 4),
                dropout=dropout,
                num_samples=2,
                rematerialize=rematerialize,
                seed=1,
            )
        )
        fvae.build(x.shape)
        perturb(fvae, np.random.default_rng(1))
        results.append(
            value_and_gradients(
                lambda x, fvae=fvae: fvae(x, training=True, mask=mask).loss,
                [fvae.feature_weights, fvae.latent_weights],
                [x],
            )
        )
    (loss, gradients, (x_gradient,)), plain = results[1], results[0]
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    for one, other in zip([*gradients, x_gradient], [*plain[1], *plain[2]]):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch tells what it keeps")
def test_rematerialized_keeps_little_for_the_gradient():
    import torch

    kept = []
    for rematerialize in (False, True):
        fvae = keras_fvae.FVAE(
            keras_fvae.FVAELoRAConfig(rank=2, rematerialize=rematerialize)
        )
        x = torch.randn(1000, 8, requires_grad=True)
        sizes = {}

        def keep(tensor, sizes=sizes):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        fvae.build(x.shape)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            fvae(x, training=True)
        weights = sum(4 * w.value.numel() for w in fvae.weights)
        kept.append(sum(sizes.values()) - weights)
    # Three hidden layers of 128 units, against x and what `call` returns.
    assert kept[0] > 1000 * 4 * 3 * 128
    assert kept[1] < 1000 * 4 * 64


def test_layers_with_the_same_settings_share_their_networks():
    config = keras_fvae.FVAELoRAConfig(rank=2)
    one, other, wider = (keras_fvae.FVAE(config) for _ in range(3))
    seeded = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=2, seed=3))
    for fvae, width in ((one, 5), (other, 5), (seeded, 5), (wider, 6)):
        fvae.build((None, width))
    assert one.networks is other.networks is seeded.networks
    assert one.networks is not wider.networks


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's XLA")
def test_xla_leaves_every_product_to_the_step(fvae, rng):
    import tensorflow as tf

    x = tf.constant(rng.normal(size=(4, 5)), tf.float32)

    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            loss = fvae(x, training=True).loss
        return tape.gradient(loss, fvae.feature_weights.value)

    compiled = step.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    # What it works out while it compiles, it compiles anew for each batch.
    assert compiled.count(" dot(") >= 8


def test_masked_tokens_count_for_nothing(fvae, rng):
    x = rng.normal(size=(2, 6, 5)).astype("float32")
    noise = rng.normal(size=(2, 2, 6, 3)).astype("float32")
    mask = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], bool)
    masked = fvae(x, training=True, mask=mask, noise=tuple(noise))
    kept = fvae(x[mask], training=True, noise=tuple(noise[:, mask]))
    for name, value in kept.terms.items():
        np.testing.assert_allclose(
            to_numpy(masked.terms[name]), to_numpy(value), rtol=1e-5
        )
    np.testing.assert_allclose(
        to_numpy(masked.loss), to_numpy(kept.loss), rtol=1e-5
    )
    _, _, (x_gradient,) = value_and_gradients(
        lambda x: fvae(x, training=True, mask=mask, noise=tuple(noise)).loss,
        [fvae.feature_weights],
        [x],
    )
    assert np.abs(x_gradient[~mask]).max() == 0
    assert np.abs(x_gradient[mask]).min() > 0


def test_a_mask_of_the_first_token_axes_is_enough(fvae, rng):
    x = rng.normal(size=(2, 4, 3, 5))
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    whole = np.repeat(mask[..., None], 3, axis=-1)
    np.testing.assert_allclose(
        to_numpy(fvae(x, mask=mask).loss),
        to_numpy(fvae(x, mask=whole).loss),
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 1, 1), (4,)])
def test_masks_of_other_shapes_are_refused(fvae, shape):
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        fvae(np.ones((2, 4, 5)), mask=np.ones(shape))


def test_several_draws_are_averaged(config, fvae, rng):
    x = rng.normal(size=(4, 6, 5)).astype("float32")
    noise = rng.normal(size=(2, 3, 4, 6, 3)).astype("float32")
    several = keras_fvae.FVAE(
        keras_fvae.FVAELoRAConfig(**{**config.get_config(), "num_samples": 3})
    )
    several.build((None, 5))
    several.set_reference_weights(fvae.get_reference_weights())
    out = several(x, training=True, noise=tuple(noise))
    singles = [
        fvae(x, training=True, noise=tuple(noise[:, i])) for i in range(3)
    ]
    assert tuple(out.z1.shape) == (3, 4, 6, 3)
    np.testing.assert_allclose(
        to_numpy(out.z1),
        np.stack([to_numpy(single.z1) for single in singles]),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        to_numpy(out.loss),
        np.mean([to_numpy(single.loss) for single in singles]),
        rtol=1e-5,
    )


def test_average_fusion(rng):
    config = keras_fvae.FVAELoRAConfig(
        rank=3, decoder_units=(), latent_fusion="average", dropout=0.0
    )
    fvae = keras_fvae.FVAE(config)
    fvae.build((None, 5))
    perturb(fvae, rng)
    x = rng.normal(size=(4, 5)).astype("float32")
    out = fvae(x, training=True)
    weights = fvae.get_reference_weights()
    prefix = "views_conditionalGaussianDecoders"
    latents = (to_numpy(out.z1) + to_numpy(out.z2)) / 2
    reconstruction = (
        latents @ weights[f"{prefix}.output_layer.weight"].T
        + weights[f"{prefix}.output_layer.bias"]
    )
    scale = weights[REFERENCE_STD] + 1e-5
    np.testing.assert_allclose(
        to_numpy(out.terms["negative_log_likelihood"]),
        to_numpy(
            objective.negative_log_likelihood(
                np.square(x - reconstruction), scale
            )
        ).mean(),
        rtol=1e-5,
    )


@pytest.mark.shared_out
@pytest.mark.parametrize("encoder_units", [(), (4,), (6, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_posterior_mean_is_the_mean_of_q1(encoder_units, shared, rng):
    fvae = keras_fvae.FVAE(
        keras_fvae.FVAELoRAConfig(
            rank=3, encoder_units=encoder_units, encoder_shared_trunk=shared
        )
    )
    fvae.build((None, 5))
    perturb(fvae, rng)
    x = ops.convert_to_tensor(rng.normal(size=(4, 5)), "float32")
    np.testing.assert_allclose(
        to_numpy(fvae.posterior_mean(x)),
        to_numpy(fvae(x).z1_mean),
        rtol=1e-5,
        atol=1e-6,
    )


def test_at_the_start_both_posteriors_are_standard_normal(rng):
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=16))
    out = fvae(rng.normal(size=(500, 8)), training=True)
    for name in ("z1_mean", "z1_log_variance", "z2_mean", "z2_log_variance"):
        assert not to_numpy(getattr(out, name)).any()
    z1, z2 = to_numpy(out.z1).ravel(), to_numpy(out.z2).ravel()
    for z in (z1, z2):
        assert abs(z.mean()) < 4 / np.sqrt(z.size)
        assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
    assert abs(np.corrcoef(z1, z2)[0, 1]) < 4 / np.sqrt(z1.size)
    scale = fvae.get_reference_weights()[REFERENCE_STD] + 1e-5
    np.testing.assert_allclose(scale, 1.0, rtol=1e-6)


@pytest.mark.shared_out
@pytest.mark.parametrize("encoder_units", [None, (), (16, 12)])
@pytest.mark.parametrize("shared", [True, False])
def test_other_starts(encoder_units, shared, rng):
    config = keras_fvae.FVAELoRAConfig(
        rank=4,
        encoder_units=encoder_units,
        encoder_shared_trunk=shared,
        decoder_units=(4,),
        initial_log_variance=-3.0,
        zero_at_start="kernel_b",
    )
    layer = keras_fvae.FVAELoRADense(5, config=config)
    x = rng.normal(size=(64, 6)).astype("float32")
    # The update is zero, whatever is drawn.
    outputs = to_numpy(layer(x, training=True))
    np.testing.assert_allclose(outputs, x @ to_numpy(layer.kernel), atol=1e-5)
    out = layer.adapter.fvae(x)
    np.testing.assert_allclose(to_numpy(out.z1_log_variance), -3.0, rtol=1e-6)
    np.testing.assert_array_equal(to_numpy(out.z2_log_variance), 0.0)
    np.testing.assert_array_equal(to_numpy(out.z2_mean), 0.0)
    # About as wide as the prior, as the latents of LoRA with A are.
    assert 0.1 < to_numpy(out.z1_mean).std() < 3


def test_initial_weights_are_those_of_glorot():
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(seed=1))
    fvae.build((None, 96))
    arrays = fvae.get_arrays()
    np.testing.assert_allclose(fvae.decoder_std, 1, rtol=1e-6)
    drawn = {
        name: array
        for name, array in arrays.items()
        if "kernel" in name and array.any()
    }
    heads = f"encoder_kernel_{len(fvae.config.hidden_units)}"
    assert {n for n in arrays if "kernel" in n} - {*drawn} == {heads}
    assert not any(arrays[name].any() for name in arrays if "bias" in name)
    for array in drawn.values():
        # The middle axis of an encoder's kernel is that of the trunks.
        limit = np.sqrt(6 / (array.shape[0] + array.shape[-1]))
        uniform = scipy.stats.uniform(-limit, 2 * limit)
        assert scipy.stats.kstest(array.ravel(), uniform.cdf).pvalue > 1e-3
    # No two begin with the same numbers.
    firsts = [array.ravel()[0] / array.max() for array in drawn.values()]
    assert len(np.unique(np.round(firsts, 5))) == len(firsts)


def test_inference_is_deterministic_and_training_is_not(rng):
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=3))
    fvae.build((None, 5))
    perturb(fvae, rng)
    x = rng.normal(size=(4, 5))
    assert np.array_equal(to_numpy(fvae(x).loss), to_numpy(fvae(x).loss))
    first, second = (to_numpy(fvae(x, training=True).z1) for _ in range(2))
    assert not np.allclose(first, second)


def test_log_variance_is_clipped(fvae):
    weights = fvae.get_reference_weights()
    for index, value in [(0, 1e4), (1, -1e4)]:
        name = f"views_conditionalGaussianEncoders_list.{index}.logvar.bias"
        weights[name] = np.full_like(weights[name], value)
    fvae.set_reference_weights(weights)
    out = fvae(np.ones((1, 5)))
    assert set(to_numpy(out.z1_log_variance).ravel()) == {20.0}
    assert set(to_numpy(out.z2_log_variance).ravel()) == {-20.0}
    assert np.isfinite(to_numpy(out.terms["kl_z1"]))


def test_the_seed_fixes_weights_and_draws(rng):
    x = rng.normal(size=(4, 5))
    runs = []
    for seed in (1, 1, 2):
        fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=3, seed=seed))
        runs.append(to_numpy(fvae(x, training=True).loss))
    assert runs[0] == runs[1] != runs[2]


def test_set_random_seed_fixes_weights_and_draws(rng):
    x = rng.normal(size=(4, 5))
    runs = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=3))
        runs.append(to_numpy(fvae(x, training=True).loss))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"]
)
def test_weights_and_results_are_float32(dtype, rng):
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=3), dtype=dtype)
    x = rng.normal(size=(4, 6, 5)).astype("float32")
    out = fvae(x, training=True)
    flat = [*out[:6], *out.terms.values(), out.loss]
    assert {dtype_of(tensor) for tensor in flat} == {"float32"}
    assert {weight.dtype for weight in fvae.weights} == {"float32"}
    full = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(rank=3))
    full.build(x.shape)
    full.set_reference_weights(fvae.get_reference_weights())
    np.testing.assert_allclose(
        to_numpy(fvae(x).loss), to_numpy(full(x).loss), rtol=0.02
    )


def test_config_round_trip(config):
    fvae = keras_fvae.FVAE(config, name="mine")
    revived = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(fvae)))
    )
    assert (revived.config, revived.name) == (config, "mine")


def test_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="must be a `keras_fvae.FVAELoRAConfig"):
        keras_fvae.FVAE(config=16)
