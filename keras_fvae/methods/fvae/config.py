"""The settings of FVAE-LoRA."""

from __future__ import annotations

import dataclasses
from typing import Any
from typing import ClassVar
from typing import Literal
from typing import Self

import keras

from keras_fvae.layers.config import DEFAULT_RANK
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.config import is_finite
from keras_fvae.layers.config import is_integer
from keras_fvae.layers.frozen import CONVOLUTIONS

LATENT_FUSIONS = ("concat", "average")
OBJECTIVES = ("fvae", "vae2lat", "beta_vae2lat")
GAMMA_ESTIMATORS = ("closed_form", "monte_carlo")
ZEROS_AT_START = ("z1_mean", "kernel_b")


@dataclasses.dataclass(frozen=True)
class FVAELoRAConfig(AdapterConfig):
    """Settings of FVAE-LoRA: widths, priors and the weights of the objective.

    The defaults are the settings that the authors published, in the paper's
    own terms, but for `encoder_units` and `dropout`, whose defaults did better
    in the comparison of `examples/paper`; `FVAELoRAConfig.from_paper()` has
    the authors' own. A config is validated when it is made and never changes
    after; `dataclasses.replace(config, rank=8)` makes a changed copy.

    Learning rate: 5e-3 in the authors' scripts; models as small as those of
    `examples/paper/local.py` did best at 8.6e-3 to 1.7e-2, with gradients
    clipped to a global norm of 1. On two sets of texts of which 40 % had a
    wrong label, the defaults were 5.8 points more accurate than LoRA (4.1 to
    7.3, ten seeds) and 4.7 (3.1 to 6.4), with right labels 2.5 (0.9 to 4.2) and
    2.0 (0.9 to 2.9), in the worst group of a spurious colour 6.3 (1.9 to 10.9),
    of a spurious word in texts 3.9 less (2.6 to 5.2); on small pictures with
    right labels they were 0.6 less (-1.6 to 2.7), and the authors' settings
    2.1. With few texts they were as accurate as LoRA; take 5e-3 there, because
    with 5 of a class of one of the sets their loss was higher than LoRA's by
    0.58 (0.36 to 0.77) at 1.7e-2, and by 0.01 (-0.11 to 0.12) at 5e-3. Cost:
    the FVAE in training; at inference the encoder of z1. Convolutions larger
    than 1 are refused, because there it costs four to seven times LoRA's step
    and gains nothing.

    "Tried" below says what `examples/paper/ablation.py` changed there, one
    setting at a time, with three seeds on each of three data sets, and what
    happened; `examples/paper/README.md` has the figures.

    Args:
        rank: Positive integer. Width of each latent, `z1` and `z2`, and the
            rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1, as in
            `keras.layers.Dense.enable_lora`. Tried: twice the rank, within the
            noise of the seeds.
        encoder_units: Tuple of positive integers, the widths of each
            encoder's hidden layers. `()` makes the encoders linear, and the
            trained update mergeable. `None` (default) means `(4 * rank,)`; the
            authors' have `(rank,)`. Tried: one, four and eight ranks, two
            layers, and none. One rank learns pictures slowly (5 points less
            than eight), linear encoders learn texts by heart (6 points less).
        encoder_shared_trunk: Boolean. Whether the mean and the log variance
            of an encoder share its hidden layers. Defaults to `True`.
        decoder_units: Tuple of positive integers, the widths of the decoder's
            hidden layers. Defaults to `(128, 128, 128)`. Tried: one layer of
            32, which lost 4 points on texts.
        dropout: Float in `[0, 1)`. Dropout rate after each hidden layer of
            the encoders and the decoder. Defaults to `0.3`; the authors' is
            0.1. Tried: 0.1, 0.3 and 0.5, of which 0.3 was best on average, with
            eight ranks and (0.1 beside it) with one.
        latent_fusion: `"concat"` or `"average"`. How the decoder reads the two
            latents. Defaults to `"concat"`.
        prior_mean: Float. Mean of `p2`, the prior of `z2`, in each dimension.
            Defaults to `1.5`.
        prior_std: Positive float. Standard deviation of `p2` in each
            dimension. Defaults to `1.0`.
        objective: `"fvae"`, `"vae2lat"` or `"beta_vae2lat"`. Defaults to
            `"fvae"`.
        reconstruction_weight: Non-negative float. Weight of `log p(x|z1, z2)`
            in the `fvae` objective. Defaults to `1.0`.
        kl_weight: Non-negative float. Weight of the KL terms in the `fvae` and
            `beta_vae2lat` objectives. Defaults to `1.0`.
        gamma_weight: Non-negative float, or a pair of them: the weights of
            `-E[log p1(z1)]` and of `E[log p2(z2)]` in the `fvae` objective.
            The one for `z1` must be smaller than `kl_weight`. `None` (default)
            means `min(2 / rank, 0.5)`. Tried: 0, which lost 7 points in the
            worst group where a colour went with the label in training.
        gamma_estimator: `"closed_form"` (exact) or `"monte_carlo"` (from the
            drawn latents). Defaults to `"closed_form"`.
        elbo_weight: Non-negative float. Weight of the objective in the
            model's loss: of its mean over the layers of the model that trains
            which have one, however they were adapted. Defaults to `1e-3`.
            Tried: 0, which lost 15 points in that worst group and little
            elsewhere; 1e-2, which lost 5 points on texts, and with a
            `reconstruction_weight` of 0.1 had the lowest losses.
        num_samples: Positive integer. Draws of the latents per token in
            training. Defaults to `1`. Tried: 4, which lost 5 points in that
            worst group, and had a loss lower by 0.18 on texts.
        rematerialize: Boolean. Whether training keeps little of the FVAE for
            the gradient but its inputs (on PyTorch, its random numbers too),
            and computes it once more instead: less memory, more arithmetic,
            the same results. Defaults to `False`.
        sample_at_inference: Boolean. Whether the update draws `z1` at
            inference too, instead of using its mean. Defaults to `False`.
        initial_log_variance: Float in `[-20, 20]`. Log variance of q1 at the
            start. Defaults to `0.0`, that of its prior. Tried: -4, better on
            pictures (1 point) and worse on texts (4 points).
        zero_at_start: `"z1_mean"` or `"kernel_b"`. What is zero at the start,
            so that the update is: the mean of q1, as in the authors' code, or
            B, as in LoRA. The other one is random. Defaults to `"z1_mean"`.
            Tried: `"kernel_b"`, which lost 6 points on texts.
        seed: Integer in `[0, 2**31)`. Seed of the adapter's initial weights,
            noise and dropout. `None` (default) draws one, which
            `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.

    Example:

    >>> config = keras_fvae.FVAELoRAConfig(rank=8, reconstruction_weight=0.1)
    >>> config.gamma_weights
    (0.25, 0.25)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    encoder_units: tuple[int, ...] | None = None
    encoder_shared_trunk: bool = True
    decoder_units: tuple[int, ...] = (128, 128, 128)
    dropout: float = 0.3
    latent_fusion: Literal["concat", "average"] = "concat"
    prior_mean: float = 1.5
    prior_std: float = 1.0
    objective: Literal["fvae", "vae2lat", "beta_vae2lat"] = "fvae"
    reconstruction_weight: float = 1.0
    kl_weight: float = 1.0
    gamma_weight: float | tuple[float, float] | None = None
    gamma_estimator: Literal["closed_form", "monte_carlo"] = "closed_form"
    elbo_weight: float = 1e-3
    num_samples: int = 1
    rematerialize: bool = False
    sample_at_inference: bool = False
    initial_log_variance: float = 0.0
    zero_at_start: Literal["z1_mean", "kernel_b"] = "z1_mean"

    method_name = "FVAE-LoRA"
    training_settings: ClassVar[tuple[str, ...]] = (
        "dropout",
        "prior_mean",
        "prior_std",
        "objective",
        "reconstruction_weight",
        "kl_weight",
        "gamma_weight",
        "gamma_estimator",
        "elbo_weight",
        "num_samples",
        "rematerialize",
        "initial_log_variance",
        "zero_at_start",
        "seed",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("num_samples", minimum=1)
        if self.encoder_units is not None:
            self._check_units("encoder_units")
        self._check_units("decoder_units")
        self._check_rate("dropout")
        self._check_number("prior_mean", "a finite number", lambda v: True)
        self._check_number("prior_std", "a positive number", lambda v: v > 0)
        for name in ("reconstruction_weight", "kl_weight", "elbo_weight"):
            self._check_number(name, "a number >= 0", lambda v: v >= 0)
        self._check_choice("latent_fusion", LATENT_FUSIONS)
        self._check_choice("objective", OBJECTIVES)
        self._check_choice("gamma_estimator", GAMMA_ESTIMATORS)
        self._check_choice("encoder_shared_trunk", (True, False))
        self._check_choice("rematerialize", (True, False))
        self._check_choice("sample_at_inference", (True, False))
        self._check_number(
            "initial_log_variance",
            "a number in [-20, 20]",
            lambda v: -20 <= v <= 20,
        )
        self._check_choice("zero_at_start", ZEROS_AT_START)
        self._check_gamma_weight()

    @classmethod
    def from_paper(cls, rank: int = DEFAULT_RANK, **options: Any) -> Self:
        """The settings that the authors published.

        Each encoder has one hidden layer, as wide as the rank, and the dropout
        is 0.1. At inference an adapted layer then has about as many parameters
        as with LoRA of the same rank. The authors' runs on images have, beside
        that, `alpha=8` at rank 16.

        Args:
            rank: Positive integer. Defaults to `16`.
            **options: Further fields of `FVAELoRAConfig`.

        Returns:
            An `FVAELoRAConfig`.

        Raises:
            ValueError: If a field has a value that is not allowed.
            TypeError: If a field is unknown.

        Example:

        >>> config = keras_fvae.FVAELoRAConfig.from_paper(rank=8)
        >>> config.encoder_units, config.dropout
        ((8,), 0.1)
        """
        published: dict[str, Any] = {"encoder_units": (rank,), "dropout": 0.1}
        return cls(rank, **published | options)

    @property
    def adapter_class(self) -> Any:
        """`FVAELoRAAdapter`."""
        # Which imports this module.
        from keras_fvae.methods.fvae.adapter import FVAELoRAAdapter

        return FVAELoRAAdapter

    def why_not(self, layer: keras.Layer) -> str | None:
        if not isinstance(layer, CONVOLUTIONS) or {*layer.kernel_size} == {1}:
            return None
        return (
            f"it is a convolution with kernel_size={layer.kernel_size}, and on "
            "those larger than 1 a step took four to seven times LoRA's, for "
            "results that were no better than with those of size 1 alone. "
            "Choose these by `target_layer_names=lambda layer: "
            "set(getattr(layer, 'kernel_size', ())) == {1}`, or adapt it by "
            "another method, such as `LoRAConfig`"
        )

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """Tuple of integers, the widths of an encoder's hidden layers."""
        if self.encoder_units is None:
            return (4 * self.rank,)
        return self.encoder_units

    @property
    def gamma_weights(self) -> tuple[float, float]:
        """Pair of floats, gamma's weights for `z1` and for `z2`."""
        if self.gamma_weight is None:
            return (min(2 / self.rank, 0.5),) * 2
        if isinstance(self.gamma_weight, tuple):
            return self.gamma_weight
        return (self.gamma_weight,) * 2

    @property
    def prior(self) -> tuple[float, float]:
        """Pair of floats, mean and standard deviation of `p2`."""
        return self.prior_mean, self.prior_std

    def _check_units(self, name):
        # JSON turns tuples into lists, so both are taken.
        value = getattr(self, name)
        if not isinstance(value, (tuple, list)) or not all(
            is_integer(units) and units >= 1 for units in value
        ):
            self._refuse(
                name, "a tuple of integers >= 1, one for each hidden layer"
            )
        object.__setattr__(self, name, tuple(int(units) for units in value))

    def _check_gamma_weight(self):
        value = self.gamma_weight
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and all(_is_weight(weight) for weight in value):
                pair = tuple(float(weight) for weight in value)
                object.__setattr__(self, "gamma_weight", pair)
            else:
                self._refuse("gamma_weight", "a pair of numbers >= 0")
        elif value is not None:
            self._check_number(
                "gamma_weight", "a number >= 0, a pair, or None", _is_weight
            )
        z1_weight = self.gamma_weights[0]
        is_unbounded = z1_weight > 0 and z1_weight >= self.kl_weight
        if self.objective == "fvae" and is_unbounded:
            raise ValueError(
                "The weight of gamma for z1 must be smaller than `kl_weight`: "
                "from there on nothing bounds the objective, and z1 runs to "
                f"infinity. Received: gamma_weight={value!r} (for z1: "
                f"{z1_weight}), kl_weight={self.kl_weight}. Lower "
                "`gamma_weight` or raise `kl_weight`."
            )


def resolve_config(
    rank: int = DEFAULT_RANK,
    config: FVAELoRAConfig | None = None,
    **config_options: Any,
) -> FVAELoRAConfig:
    """The config that `rank`, `config` and single fields stand for together.

    Args:
        rank: Positive integer. The default gives way to `config.rank`.
        config: Optional `FVAELoRAConfig` to start from.
        **config_options: Fields of `FVAELoRAConfig` to set.

    Returns:
        An `FVAELoRAConfig`.

    Raises:
        ValueError: If `rank` is not that of `config`, or a value is not
            allowed.
        TypeError: If `config` is no `FVAELoRAConfig`, or a field is unknown.
    """
    fields = [field.name for field in dataclasses.fields(FVAELoRAConfig)]
    for name in config_options:
        if name not in fields:
            raise TypeError(
                f"FVAE-LoRA has no option `{name}`. The options are the fields "
                f"of `keras_fvae.FVAELoRAConfig`: {fields}."
            )
    if config is None:
        return FVAELoRAConfig(rank=rank, **config_options)
    if not isinstance(config, FVAELoRAConfig):
        raise TypeError(
            "`config` must be a `keras_fvae.FVAELoRAConfig`. "
            f"Received: config={config!r} (of type {type(config)})"
        )
    if rank not in (DEFAULT_RANK, config.rank):
        raise ValueError(
            "`rank` must be that of `config`, or be left out. "
            f"Received: rank={rank!r}, config.rank={config.rank}."
        )
    return dataclasses.replace(config, **config_options)


def _is_weight(value):
    return is_finite(value) and value >= 0
