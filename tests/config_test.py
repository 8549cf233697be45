import dataclasses
import json

import keras
import numpy as np
import pytest

import keras_fvae
from keras_fvae.methods.fvae.config import resolve_config


def test_published_settings():
    config = keras_fvae.FVAELoRAConfig.from_paper()
    assert (config.rank, config.hidden_units) == (16, (16,))
    assert config.decoder_units == (128, 128, 128)
    assert config.dropout == 0.1
    assert config.prior == (1.5, 1.0)
    assert config.scale == 1.0
    assert config.gamma_weights == (0.125, 0.125)
    assert config.elbo_weight == 1e-3


def test_defaults_are_the_published_settings_but_for_the_encoders():
    config = keras_fvae.FVAELoRAConfig(rank=8)
    assert (config.hidden_units, config.dropout) == ((32,), 0.3)
    published = keras_fvae.FVAELoRAConfig.from_paper(rank=8)
    assert published == dataclasses.replace(
        config, encoder_units=(8,), dropout=0.1
    )


def test_published_settings_with_others():
    config = keras_fvae.FVAELoRAConfig.from_paper(4, alpha=2, dropout=0.2)
    assert (config.rank, config.alpha, config.hidden_units) == (4, 2.0, (4,))
    assert config.dropout == 0.2


def test_published_settings_refuse_a_rank_that_is_none():
    with pytest.raises(ValueError, match="rank='8'"):
        keras_fvae.FVAELoRAConfig.from_paper("8")


@pytest.mark.parametrize(
    "options, gamma_weights",
    [
        ({"rank": 2}, (0.5, 0.5)),
        ({"rank": 64}, (2 / 64, 2 / 64)),
        ({"gamma_weight": 0.3}, (0.3, 0.3)),
        ({"gamma_weight": [0.3, 2]}, (0.3, 2.0)),
    ],
)
def test_gamma_weights(options, gamma_weights):
    assert keras_fvae.FVAELoRAConfig(**options).gamma_weights == gamma_weights


def test_scale_is_alpha_over_rank():
    assert keras_fvae.FVAELoRAConfig(rank=16, alpha=8).scale == 0.5


@pytest.mark.parametrize(
    "field, values",
    [
        ("rank", [0, -1, 1.5, "16", True, None]),
        ("alpha", [0, -2.0, float("nan"), "1"]),
        ("encoder_units", [16, (0,), (8, 1.5), "16"]),
        ("encoder_shared_trunk", [1, "yes", None]),
        ("decoder_units", [None, 128, (128, -1)]),
        ("dropout", [1.0, -0.1, "0.1", True]),
        ("latent_fusion", ["sum", None]),
        ("prior_mean", [float("inf"), "1.5"]),
        ("prior_std", [0, -1, float("nan")]),
        ("objective", ["elbo", 1]),
        ("reconstruction_weight", [-1, None]),
        ("kl_weight", [-1e-9, "1"]),
        ("gamma_weight", [-1, "0.1", (0.1,), (0.1, -0.1), (0.1, 0.1, 0.1)]),
        ("gamma_estimator", ["exact"]),
        ("elbo_weight", [-1e-3, float("nan")]),
        ("num_samples", [0, 2.0]),
        ("rematerialize", [0, "no"]),
        ("sample_at_inference", [0, "no"]),
        ("initial_log_variance", [20.5, -21, float("nan"), "0", None]),
        ("zero_at_start", ["z1", None, 0]),
        ("seed", [-1, 0.5, "0", 2**31, 2**63, 10**30]),
    ],
)
def test_refusals_name_field_and_value(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{field}` must be") as error:
            keras_fvae.FVAELoRAConfig(**{field: value})
        assert f"{field}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma_weight": 1.0},
        {"gamma_weight": (2.0, 0.1)},
        {"kl_weight": 0.1},
        {"kl_weight": 0.0},
    ],
)
def test_unbounded_objective_is_refused(options):
    with pytest.raises(ValueError, match="smaller than `kl_weight`"):
        keras_fvae.FVAELoRAConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma_weight": (0.5, 3.0)},  # z2's weight has no bound.
        {"gamma_weight": 0.0, "kl_weight": 0.0},
        {"objective": "beta_vae2lat", "kl_weight": 0.1},  # No gamma in it.
        {"reconstruction_weight": 0.1, "kl_weight": 10},
    ],
)
def test_bounded_objectives_are_taken(options):
    keras_fvae.FVAELoRAConfig(**options)


def test_numpy_numbers_become_python_numbers():
    config = keras_fvae.FVAELoRAConfig(
        rank=np.int64(4), dropout=np.float32(0.5), encoder_units=[np.int32(8)]
    )
    assert json.loads(json.dumps(config.get_config())) == {
        **config.get_config(),
        "encoder_units": [8],
        "decoder_units": [128, 128, 128],
    }


def test_keras_serialization_round_trip():
    config = keras_fvae.FVAELoRAConfig(
        rank=4, gamma_weight=(0.1, 0.2), encoder_units=()
    )
    serialized = json.dumps(keras.saving.serialize_keras_object(config))
    revived = keras.saving.deserialize_keras_object(json.loads(serialized))
    assert revived == config


def test_config_does_not_change():
    config = keras_fvae.FVAELoRAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8


def test_resolve_config():
    config = keras_fvae.FVAELoRAConfig(rank=8)
    assert resolve_config(config=config).rank == 8
    assert resolve_config(8, config, dropout=0.0).dropout == 0.0
    assert resolve_config(4, alpha=2).scale == 0.5
    with pytest.raises(ValueError, match=r"rank=4, config.rank=8"):
        resolve_config(4, config)
    with pytest.raises(TypeError, match="no option `ranks`"):
        resolve_config(ranks=4)
    with pytest.raises(TypeError, match="must be a `keras_fvae.FVAELoRA"):
        resolve_config(config={"rank": 4})
