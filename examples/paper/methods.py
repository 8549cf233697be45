"""The methods that are compared, and how each adapts a backbone."""

import dataclasses
import functools
from collections.abc import Callable

import keras

import keras_fvae
from examples.paper.ablated_steps import ClipEachVariable
from examples.paper.ablated_steps import OtherRateBesideQ1

# It goes up whenever a method computes something else, so that results of
# before and after are not mixed. A release of the package alone changes none.
METHODS_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the tables.

    Args:
        label: String, what the tables call it.
        make_config: Function of a rank and options that returns the config of
            an adapter; `None` if there is none.
        trains_backbone: Boolean. Whether the backbone's own weights train.
        elbo_choices: Tuple of dicts of options, one of which is searched for
            where an ELBO is part of the loss. Else there is none.
        dropouts: Tuple of floats, the rates one of which is searched for.
        callbacks: Tuple of functions that return a callback, which it trains
            with.
    """

    label: str
    make_config: Callable | None = None
    trains_backbone: bool = False
    elbo_choices: tuple = ()
    dropouts: tuple = ()
    callbacks: tuple = ()


def variant(label, objective, elbo_choices):
    """FVAE-LoRA as published, with one of its objectives."""
    make_config = functools.partial(
        keras_fvae.FVAELoRAConfig.from_paper, objective=objective
    )
    return Method(label, make_config, elbo_choices=elbo_choices)


def wide(rank, widths=(8,), alpha_by_rank=1.0, **options):
    """FVAE-LoRA with another hidden layer in its encoders.

    Args:
        rank: Positive integer.
        widths: Tuple of the widths of an encoder's hidden layers, by the rank.
        alpha_by_rank: Float.
        **options: Further fields of the config.
    """
    options = {
        "encoder_units": tuple(width * rank for width in widths),
        "alpha": alpha_by_rank * rank,
        **options,
    }
    return keras_fvae.FVAELoRAConfig(rank, **options)


def of_three_ranks(config_class, rank, **options):
    """A method of three times the rank.

    LoRA then has a bit more than `FVAELoRAConfig(rank)` has at inference.
    """
    return config_class(3 * rank, **options)


def four_experts(rank, **options):
    """MoE-LoRA with as many ranks in all as LoRA, half of them for a token."""
    return keras_fvae.MoELoRAConfig(
        rank // 4, num_experts=4, top_k=2, **options
    )


def ablation(label, callbacks=(), **changes):
    """`wide` with one change."""
    return Method(
        label, functools.partial(wide, **changes), callbacks=callbacks
    )


def warmed_up_elbo():
    """Callback that lets the ELBO come in over the first hundred steps."""
    return keras_fvae.FVAELoRASchedule(
        elbo_weight=lambda step: 1e-3 * min(1.0, step / 100)
    )


# Of what enters an adapter, and of an update's ranks.
INPUT_DROPOUTS = (0.0, 0.1)
RANK_DROPOUTS = (0.5, 0.2)
# The three pairs of weights that the authors recommend.
FVAE_CHOICES = tuple(
    {"reconstruction_weight": reconstruction, "kl_weight": kl}
    for reconstruction, kl in ((1.0, 1.0), (0.1, 1.0), (0.1, 10.0))
)
# Of the two others nothing is known. VAE2LAT has no weights but the whole's.
VAE2LAT_CHOICES = tuple({"elbo_weight": w} for w in (1e-3, 1e-4, 1e-2))
BETA_CHOICES = tuple({"kl_weight": b} for b in (10.0, 4.0, 2.0))
# The first of the authors', and ten times the ELBO with a tenth of its
# reconstruction.
WIDE_CHOICES = (
    {"reconstruction_weight": 1.0, "elbo_weight": 1e-3},
    {"reconstruction_weight": 0.1, "elbo_weight": 1e-2},
)


METHODS = {
    "head_only": Method("head only"),
    "full_fine_tuning": Method("full fine-tuning", trains_backbone=True),
    "lora": Method("LoRA", keras_fvae.LoRAConfig, dropouts=INPUT_DROPOUTS),
    "lora_of_3_ranks": Method(
        "LoRA of 3 times the rank",
        functools.partial(of_three_ranks, keras_fvae.LoRAConfig),
        dropouts=INPUT_DROPOUTS,
    ),
    "rslora": Method(
        "rsLoRA", keras_fvae.RSLoRAConfig, dropouts=INPUT_DROPOUTS
    ),
    "ffa_lora": Method(
        "FFA-LoRA", keras_fvae.FFALoRAConfig, dropouts=INPUT_DROPOUTS
    ),
    "pissa": Method("PiSSA", keras_fvae.PiSSAConfig),
    "olora": Method("OLoRA", keras_fvae.OLoRAConfig),
    "dora": Method("DoRA", keras_fvae.DoRAConfig),
    "hira": Method("HiRA", keras_fvae.HiRAConfig),
    "drop_lora": Method(
        "DropLoRA", keras_fvae.DropLoRAConfig, dropouts=RANK_DROPOUTS
    ),
    "sr_lora": Method(
        "SRLoRA",
        keras_fvae.SRLoRAConfig,
        callbacks=(keras_fvae.SRLoRARestarter,),
    ),
    "ada_lora": Method(
        "AdaLoRA",
        keras_fvae.AdaLoRAConfig,
        callbacks=(keras_fvae.AdaLoRAAllocator,),
    ),
    "beam_lora": Method(
        "BeamLoRA",
        keras_fvae.BeamLoRAConfig,
        callbacks=(keras_fvae.BeamLoRAPruner,),
    ),
    "moe_lora": Method("MoE-LoRA", four_experts, dropouts=INPUT_DROPOUTS),
    "flat_lora": Method(
        "Flat-LoRA",
        keras_fvae.FlatLoRAConfig,
        callbacks=(keras_fvae.FlatLoRASchedule,),
    ),
    "vae2lat": variant("VAE2LAT", "vae2lat", VAE2LAT_CHOICES),
    "beta_vae2lat": variant("beta-VAE2LAT", "beta_vae2lat", BETA_CHOICES),
    "fvae_lora": variant("FVAE-LoRA as published", "fvae", FVAE_CHOICES),
    "fvae_lora_of_4_ranks": Method(
        "FVAE-LoRA",
        keras_fvae.FVAELoRAConfig,
        elbo_choices=WIDE_CHOICES,
    ),
    "fvae_lora_of_3_times_the_rank": Method(
        "FVAE-LoRA of 3 times the rank",
        functools.partial(of_three_ranks, keras_fvae.FVAELoRAConfig),
        elbo_choices=WIDE_CHOICES,
    ),
    "wide_fvae_lora": Method(
        "FVAE-LoRA, wide encoders", wide, elbo_choices=WIDE_CHOICES
    ),
}
OF_OUR_OWN = (
    "lora_of_3_ranks",
    "fvae_lora_of_4_ranks",
    "fvae_lora_of_3_times_the_rank",
    "wide_fvae_lora",
)
# Those that the paper names, and does not compare with.
RELATED = ("sr_lora", "ada_lora", "beam_lora", "moe_lora", "flat_lora")
# Those of the paper's tables.
PAPER_METHODS = tuple(
    name for name in METHODS if name not in OF_OUR_OWN + RELATED
)
# Those of the local table.
LOCAL_METHODS = tuple(METHODS)
# One change each, of `wide` with the first of its weights.
ABLATIONS = {
    "nothing_changed": ablation("nothing changed"),
    "width_4": ablation("encoders of 4 ranks", widths=(4,)),
    "width_1": ablation("encoders of 1 rank", widths=(1,)),
    "authors": ablation("as the authors", widths=(1,), dropout=0.1),
    "linear": ablation("linear encoders", widths=()),
    "two_layers": ablation("encoders of two layers", widths=(8, 8)),
    "own_trunks": ablation("no shared trunk", encoder_shared_trunk=False),
    "dropout_0.1": ablation("dropout 0.1", dropout=0.1),
    "dropout_0.5": ablation("dropout 0.5", dropout=0.5),
    "log_variance_-4": ablation(
        "log variance -4 at the start", initial_log_variance=-4.0
    ),
    "zero_in_b": ablation("B zero at the start", zero_at_start="kernel_b"),
    "alpha_2": ablation("alpha twice the rank", alpha_by_rank=2.0),
    "four_samples": ablation("four samples in training", num_samples=4),
    "narrow_decoder": ablation(
        "a decoder of one layer of 32", decoder_units=(32,)
    ),
    "no_elbo": ablation("no ELBO", elbo_weight=0.0),
    "elbo_warm_up": ablation(
        "ELBO warmed up over 100 steps", callbacks=(warmed_up_elbo,)
    ),
    "elbo_10": ablation("ELBO x 10", elbo_weight=1e-2),
    "elbo_10_reconstruction_0.1": ablation(
        "ELBO x 10, reconstruction x 0.1",
        elbo_weight=1e-2,
        reconstruction_weight=0.1,
    ),
    "elbo_10_reconstruction_0.1_kl_10": ablation(
        "ELBO x 10, reconstruction x 0.1, KL x 10",
        elbo_weight=1e-2,
        reconstruction_weight=0.1,
        kl_weight=10.0,
    ),
    "no_reconstruction": ablation(
        "no reconstruction", reconstruction_weight=0.0
    ),
    "no_gamma": ablation("no gamma", gamma_weight=0.0),
    "clip_each": ablation(
        "each variable clipped by itself", callbacks=(ClipEachVariable,)
    ),
    **{
        f"rest_{factor}": ablation(
            f"learning rate of q2 and the decoder x {factor}",
            callbacks=(functools.partial(OtherRateBesideQ1, factor),),
        )
        for factor in (0.3, 3.0)
    },
}
METHODS |= ABLATIONS


def adapt(name, backbone, rank, settings, seed, target_layer_names=None):
    """Makes of a backbone what a method trains, beside a head of its own.

    Args:
        name: String, a key of `METHODS`.
        backbone: `keras.Model`, built.
        rank: Integer, the rank of the adapters.
        settings: Dict, what `search` gives: its `options` are further fields
            of the method's config.
        seed: Integer.
        target_layer_names: As in `keras_fvae.enable_adapter`.

    Returns:
        Integer, the parameters that inference needs beside the base model and
        the head.
    """
    method = METHODS[name]
    if method.make_config is None:
        backbone.trainable = method.trains_backbone
        for layer in backbone.layers:
            # Their statistics would be none of the best epoch's weights.
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        return 0
    config = method.make_config(rank, seed=seed, **settings["options"])
    summary = keras_fvae.enable_adapter(backbone, config, target_layer_names)
    return summary.inference_parameters
