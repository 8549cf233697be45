"""The methods of PEFT: what its settings and tensors say of each.

The methods as PEFT defines them have the same matrices: A of shape (rank, d)
and B of shape (k, rank), which are transposed here.
"""

from __future__ import annotations

import collections
import math
import re
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple

import keras
import numpy as np

from keras_fvae.backend import replicas
from keras_fvae.integrations.peft_files import CONFIG_FILE
from keras_fvae.integrations.peft_files import WEIGHTS_FILE
from keras_fvae.layers.adapted import AdaptedLayer
from keras_fvae.layers.adapted import read_kernel
from keras_fvae.layers.adapter import Adapter
from keras_fvae.layers.attach import adapter_shapes
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.layers.frozen import linear_map_of
from keras_fvae.methods.ada_lora import RANK_OFFSET
from keras_fvae.methods.dora import DoRAConfig
from keras_fvae.methods.drop_lora import DropLoRAConfig
from keras_fvae.methods.flat_lora import FlatLoRAConfig
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.hira import HiRAConfig
from keras_fvae.methods.lora import LoRAConfig
from keras_fvae.methods.lora import RSLoRAConfig
from keras_fvae.methods.pissa import OLoRAConfig
from keras_fvae.methods.pissa import PiSSAConfig

# What else changes the predictions of an adapter, and its value where it does
# not.
NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kappa_tuner_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# The ways to begin which leave the base model as it is.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
FACTORED_STARTS: dict[Any, type[PiSSAConfig] | type[OLoRAConfig]] = {
    "pissa": PiSSAConfig,
    "olora": OLoRAConfig,
}
# In a regular expression of a file: repeats and groups, and what is between
# bars.
MOST_CHOICES, MOST_ALTERNATIVES = 4, 100


class LoadedAdapter(NamedTuple):
    """What is read for one layer.

    Attributes:
        layer: The layer.
        config: Config of its adapter.
        starts_anew: Boolean. Whether the adapter needs the frozen kernel.
        set_weights: Function that sets the weights of the built adapter.
    """

    layer: keras.Layer
    config: AdapterConfig
    starts_anew: bool
    set_weights: Callable[[Adapter], None]


class LoRAReader:
    """Reads adapters of LoRA and what PEFT has as an option of it, of HiRA,
    and of AdaLoRA, as the LoRA that it has become.

    Args:
        settings: Dict, the content of `adapter_config.json`.
        tensors: Dict of name to array, all that the file has.

    Raises:
        ValueError: If a setting has no counterpart here.
    """

    def __init__(
        self, settings: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> None:
        self.settings = settings
        for name, allowed in NEUTRAL_SETTINGS.items():
            value = settings.get(name, allowed[0])
            if value not in allowed:
                raise ValueError(
                    f"`{CONFIG_FILE}` says {name}={value!r}, which has no "
                    f"counterpart here. Only {allowed[0]!r} can be loaded."
                )
        start = settings.get("init_lora_weights", True)
        is_known = isinstance(start, (str, bool)) and (
            start in PLAIN_STARTS or start in FACTORED_STARTS
        )
        self.config_class: type[PiSSAConfig] | type[OLoRAConfig] | None = (
            FACTORED_STARTS.get(start) if is_known else None
        )
        if not is_known:
            raise ValueError(
                f"`{CONFIG_FILE}` says init_lora_weights={start!r}: the base "
                "model was changed, in a way that cannot be repeated here. "
                "Save it in PEFT with `path_initial_model_for_weight_"
                "conversion`, which makes a LoRA of it."
            )
        names = ["r", "lora_alpha"]
        if settings["peft_type"] == "ADALORA":
            names.append("init_r")
        if settings["peft_type"] == "HIRA":
            names.remove("lora_alpha")
        for name in names:
            _check_positive(name, settings.get(name))
        for name in ("use_dora", "use_rslora"):
            if not isinstance(settings.get(name, False), bool):
                raise ValueError(
                    f"`{CONFIG_FILE}` says {name}={settings[name]!r}, which "
                    "must be true or false."
                )
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(
                f"`{CONFIG_FILE}` says alpha_pattern={patterns!r}, which must "
                "be an object."
            )
        for pattern, value in patterns.items():
            _check_positive(f"alpha_pattern[{pattern!r}]", value)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"`{CONFIG_FILE}` has the alpha_pattern {pattern!r}, which "
                    f"is no regular expression: {error}."
                ) from error
            if _may_match_for_ever(pattern):
                raise ValueError(
                    f"`{CONFIG_FILE}` has the alpha_pattern {pattern!r}, which "
                    "may take for ever to match. Allowed are at most "
                    f"{MOST_CHOICES} repeats and groups, none of them a "
                    f"repeated group, and {MOST_ALTERNATIVES} alternatives: "
                    "name the modules in several patterns."
                )

    def read(
        self,
        module: str,
        tensors: dict[str, np.ndarray],
        layers: tuple[keras.Layer, ...],
    ) -> list[LoadedAdapter]:
        """As `peft_fvae.FVAEReader.read`."""
        matrices = {
            name.removesuffix(".weight"): array
            for name, array in tensors.items()
        }
        kind = "hira" if self.settings["peft_type"] == "HIRA" else "lora"
        names = [f"{kind}_A", f"{kind}_B"]
        if self.settings["peft_type"] == "ADALORA":
            names.append("lora_E")
        if self.settings.get("use_dora"):
            names.append("lora_magnitude_vector")
        if {*matrices} != {*names}:
            raise ValueError(
                f"The module '{module}' has the weights {sorted(tensors)} in "
                f"`{WEIGHTS_FILE}`, and by its settings should have {names}."
            )
        a, b = matrices[names[0]], matrices[names[1]]
        self._check_shapes(module, a, b, layers)
        rank = len(a)
        if rank == 0:
            return []
        for name, shape in (
            ("lora_E", (rank, 1)),
            ("lora_magnitude_vector", (len(b),)),
        ):
            if name in matrices and matrices[name].size != math.prod(shape):
                raise ValueError(
                    f"'{module}.{name}' must have shape {shape} for this "
                    f"model. Received: {matrices[name].shape}."
                )
        if "lora_E" in matrices:
            a = a * matrices["lora_E"].reshape(-1, 1)
        config = self._config(module, rank)
        pieces = np.split(
            b, np.cumsum([units_of(layer) for layer in layers])[:-1]
        )
        magnitudes: Sequence[np.ndarray | None] = [None] * len(layers)
        if "lora_magnitude_vector" in matrices:
            magnitudes = np.split(
                matrices["lora_magnitude_vector"].reshape(-1),
                np.cumsum([len(piece) for piece in pieces])[:-1],
            )
        if self.config_class is not None and len(layers) > 1:
            raise ValueError(
                f"The module '{module}' stands for {len(layers)} layers here, "
                f"and {config.method_name} factors them together."
            )
        loaded = []
        for layer, piece, magnitude in zip(layers, pieces, magnitudes):
            arrays = {"kernel_a": a.T, "kernel_b": piece.T}
            if magnitude is not None:
                arrays["magnitude"] = magnitude
            # Which refuses what the layer cannot have.
            adapter_shapes(layer, config)
            loaded.append(
                LoadedAdapter(
                    layer,
                    config,
                    self.config_class is not None,
                    _setter(arrays),
                )
            )
        return loaded

    def _check_shapes(self, module, a, b, layers):
        width = width_of(layers[0])
        units = sum(units_of(layer) for layer in layers)
        if (
            a.ndim != 2
            or b.ndim != 2
            or a.shape[1] != width
            or b.shape != (units, len(a))
        ):
            raise ValueError(
                f"The module '{module}' must have A of shape (rank, {width}) "
                f"and B of shape ({units}, rank) for this model. Received: "
                f"{a.shape} and {b.shape}."
            )

    def _config(self, module, rank):
        settings = self.settings
        if settings["peft_type"] == "HIRA":
            self._tell_dropout("hira_dropout")
            return HiRAConfig(rank)
        alpha = settings.get("lora_alpha", 8)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        if settings["peft_type"] == "ADALORA":
            # By the number of ranks at the start, whatever is left of them.
            alpha *= rank / (settings["init_r"] + RANK_OFFSET)
        dropout = settings.get("lora_dropout", 0.0)
        use_rslora = settings.get("use_rslora", False)
        if self.config_class is None and not settings.get("use_dora"):
            config_class = RSLoRAConfig if use_rslora else LoRAConfig
            return config_class(rank, alpha, dropout=dropout)
        self._tell_dropout("lora_dropout")
        if use_rslora:
            alpha *= math.sqrt(rank)
        return (self.config_class or DoRAConfig)(rank, alpha)

    def _tell_dropout(self, name):
        if self.settings.get(name):
            warnings.warn(
                f"`{CONFIG_FILE}` says {name}={self.settings[name]}, which "
                "this method has not here. It counts in training alone.",
                stacklevel=5,
            )


def _may_match_for_ever(pattern):
    """Whether a regular expression may take too long for a module's name.

    The steps of a match multiply with each repeat and each group, and are
    without a limit where a group that can match in several ways is repeated.
    """
    # What is escaped, or in brackets, is one character.
    pattern = re.sub(r"\\.", "x", pattern)
    pattern = re.sub(r"\[\^?\]?[^]]*\]", "x", pattern)
    choices = re.findall(r"[^(][*+{?]|\(", pattern)
    return (
        len(choices) > MOST_CHOICES
        or pattern.count("|") > MOST_ALTERNATIVES
        or re.search(r"\)[*+{]", pattern) is not None
    )


def _check_positive(name, value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value > 0:
        raise ValueError(
            f"`{CONFIG_FILE}` says {name}={value!r}, which is no positive "
            "number."
        )


def _setter(arrays):
    def set_weights(adapter):
        adapter.set_arrays({**adapter.get_arrays(), **arrays})

    return set_weights


def width_of(layer: keras.Layer) -> int:
    """Integer, the width of a token of a built layer."""
    linear_map = linear_map_of(layer)
    return linear_map.width(layer.kernel.shape)


def units_of(layer: keras.Layer) -> int:
    """Integer, the number of outputs of a built layer for each token."""
    linear_map = linear_map_of(layer)
    return linear_map.units(layer.kernel.shape)


class Matrices(NamedTuple):
    """An update as PEFT has it, here still in our own layout.

    Attributes:
        kernel_a: Array of shape `(d, rank)`.
        kernel_b: Array of shape `(rank, k)`.
        scale: Float.
        magnitude: Array of shape `(k,)`, of DoRA alone.
        bias: Array of shape `(k,)`, of what is added after B and scaled, too.
    """

    kernel_a: np.ndarray
    kernel_b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None


def write(
    modules: Mapping[str, tuple[keras.Layer, ...]],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of adapters, as PEFT reads them.

    Args:
        modules: Dict of the name of a module to a tuple of the layers that it
            stands for, of which one at least is adapted.

    Returns:
        Dict of settings, but for the names of the modules, and dict of name to
        array.

    Raises:
        ValueError: If PEFT has no counterpart.
    """
    adapted = [
        layer
        for layers in modules.values()
        for layer in layers
        if isinstance(layer, AdaptedLayer)
    ]
    kinds = {kind_of(layer.adapter.inference_config) for layer in adapted}
    if len(kinds) > 1:
        raise ValueError(
            "An adapter of PEFT is of one method. The layers of this model "
            f"have several: {sorted(kinds)}."
        )
    kind = kinds.pop()
    updates = {name: _joined(layers, kind) for name, layers in modules.items()}
    prefix = "hira" if kind == "hira" else "lora"
    tensors = {}
    for name, update in updates.items():
        for letter, array in (("A", update.kernel_a), ("B", update.kernel_b)):
            # HiRA's are parameters of their own, with no module around them.
            suffix = "" if kind == "hira" else ".weight"
            tensors[f"{name}.{prefix}_{letter}{suffix}"] = array.T
        if update.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
    if any(update.bias is not None for update in updates.values()):
        for name, update in updates.items():
            bias = update.bias
            if bias is None:
                bias = np.zeros(update.kernel_b.shape[1], "float32")
            tensors[f"{name}.lora_B.bias"] = bias
    tensors = {name: a.astype("float32") for name, a in tensors.items()}
    ranks = {name: u.kernel_a.shape[1] for name, u in updates.items()}
    rank = _most_common(ranks.values())
    settings = {
        "base_model_name_or_path": "",
        "inference_mode": True,
        "r": rank,
        "task_type": None,
    }
    rank_pattern = {n: r for n, r in ranks.items() if r != rank}
    if kind == "hira":
        if rank_pattern:
            raise ValueError(
                "In PEFT, HiRA has one rank for all layers. Received: "
                f"{sorted({*ranks.values()})}."
            )
        return {**settings, "peft_type": "HIRA", "hira_dropout": 0.0}, tensors
    use_rslora = all(
        isinstance(layer.config, RSLoRAConfig) for layer in adapted
    ) and all(len(layers) == 1 for layers in modules.values())
    alphas = {
        name: rounded(
            update.scale
            * (math.sqrt(ranks[name]) if use_rslora else ranks[name])
        )
        for name, update in updates.items()
    }
    alpha = _most_common(alphas.values())
    return {
        **settings,
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": any(name.endswith(".bias") for name in tensors),
        "lora_dropout": 0.0,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "use_dora": kind == "dora",
        "use_rslora": use_rslora,
    }, tensors


def kind_of(config: AdapterConfig) -> Literal["lora", "dora", "hira"]:
    """String, what of PEFT's an adapter becomes: "lora", "dora" or "hira".

    Raises:
        ValueError: If it becomes none; the message says why.
    """
    if isinstance(config, FVAELoRAConfig):
        if config.sample_at_inference:
            raise ValueError(
                "This FVAE-LoRA samples at inference "
                "(sample_at_inference=True), and so is no LoRA, whose update "
                "is the same each time."
            )
        if config.hidden_units:
            raise ValueError(
                "The encoders of this FVAE-LoRA have hidden layers "
                f"(encoder_units={config.hidden_units}), so its update is no "
                "linear function of the input, as LoRA's is. What is trained "
                "with `encoder_units=()` can be written so."
            )
        return "lora"
    if isinstance(config, DoRAConfig):
        return "dora"
    if isinstance(config, HiRAConfig):
        return "hira"
    plain = (
        LoRAConfig,
        DropLoRAConfig,
        FlatLoRAConfig,
        PiSSAConfig,
        OLoRAConfig,
    )
    if not isinstance(config, plain):
        raise ValueError(f"PEFT has no counterpart of {config.method_name}.")
    return "lora"


def _matrices(layer, kind):
    """The `Matrices` of one layer; of one that is not adapted, nothing."""
    if not isinstance(layer, AdaptedLayer):
        magnitude = None
        if kind == "dora":
            magnitude = np.linalg.norm(read_kernel(layer), axis=0)
        return Matrices(
            np.zeros((width_of(layer), 0)),
            np.zeros((0, units_of(layer))),
            1.0,
            magnitude,
        )
    config, arrays = layer.config, layer.adapter.get_arrays()
    if isinstance(layer.adapter.inference_config, LoRAConfig):
        config = layer.adapter.inference_config
        arrays = layer.adapter.get_arrays(finalized=True)
    if isinstance(config, FVAELoRAConfig):
        arrays = layer.adapter.get_arrays(finalized=True)
        bias = arrays["encoder_bias_0"][0] @ arrays["kernel_b"]
        return Matrices(
            arrays["encoder_kernel_0"][:, 0],
            arrays["kernel_b"],
            config.scale,
            bias=bias if bias.any() else None,
        )
    kernel_a, kernel_b = arrays["kernel_a"], arrays["kernel_b"]
    if isinstance(config, (PiSSAConfig, OLoRAConfig)):
        kernel_a, kernel_b = map(replicas.to_numpy, layer.adapter.all_factors())
    magnitude = arrays.get("magnitude")
    if kind == "dora" and magnitude is None:
        direction = read_kernel(layer) + config.scale * kernel_a @ kernel_b
        magnitude = arrays["ratio"] * np.linalg.norm(direction, axis=0)
    return Matrices(kernel_a, kernel_b, config.scale, magnitude)


def _joined(layers, kind):
    """The `Matrices` of a module that stands for several layers.

    Each has ranks of its own.
    """
    each = [_matrices(layer, kind) for layer in layers]
    if len(each) == 1:
        return each[0]
    ranks = np.cumsum([0, *(m.kernel_b.shape[0] for m in each)])
    units = np.cumsum([0, *(m.kernel_b.shape[1] for m in each)])
    kernel_b = np.zeros((ranks[-1], units[-1]))
    for index, m in enumerate(each):
        rows = slice(ranks[index], ranks[index + 1])
        columns = slice(units[index], units[index + 1])
        kernel_b[rows, columns] = m.scale * m.kernel_b
    bias = magnitude = None
    if kind == "dora":
        magnitude = np.concatenate([m.magnitude for m in each])
    if any(m.bias is not None for m in each):
        bias = np.concatenate(
            [
                np.zeros(m.kernel_b.shape[1])
                if m.bias is None
                else m.scale * m.bias
                for m in each
            ]
        )
    kernel_a = np.concatenate([m.kernel_a for m in each], axis=1)
    return Matrices(kernel_a, kernel_b, 1.0, magnitude, bias)


def _most_common(values):
    return collections.Counter(values).most_common(1)[0][0]


def rounded(value: float) -> float:
    """Without the rounding errors of going there and back."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value
