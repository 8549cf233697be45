"""What the settings of every low-rank method have in common."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any
from typing import ClassVar
from typing import Self

import keras

DEFAULT_RANK = 16
# The state of a seed has room for it on all backends.
MAX_SEED = 2**31 - 1
# By the name of the class: all that a file can ask for.
_config_classes: dict[str, type[AdapterConfig]] = {}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Settings of a low-rank method; the base class of each method's config.

    A config is validated when it is made and never changes after;
    `dataclasses.replace(config, rank=8)` makes a changed copy. A class that
    derives from this one is a dataclass as well, and says in `adapter_class`
    what it configures. Keras can save it without being told.

    Args:
        rank: Positive integer, the rank of the update. Defaults to `16`.
        alpha: Positive float. The update is scaled by `alpha / rank`. `None`
            (default) means `rank`, so a scale of 1, as in
            `keras.layers.Dense.enable_lora`.
        seed: Integer in `[0, 2**31)`. Seed of the adapter's initial weights and
            of what it draws. `None` (default) draws one, which
            `keras.utils.set_random_seed` controls.

    Raises:
        ValueError: If a field has a value that is not allowed.
    """

    rank: int = DEFAULT_RANK
    alpha: float | None = None
    seed: int | None = dataclasses.field(default=None, kw_only=True)

    # The class of the adapters that the config makes.
    adapter_class: ClassVar[Any] = None
    # What the method is called in messages.
    method_name: ClassVar[str] = "A low-rank method"
    # The fields that matter in training alone: an adapter that was trained
    # with others can be loaded.
    training_settings: ClassVar[tuple[str, ...]] = ("seed",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _config_classes[cls.__name__] = cls
        keras.saving.register_keras_serializable(package="keras_fvae")(cls)

    def __post_init__(self) -> None:
        self._check_integer("rank", minimum=1)
        if self.alpha is not None:
            self._check_number("alpha", "a positive number", lambda v: v > 0)
        if self.seed is not None:
            self._check_integer("seed", minimum=0, maximum=MAX_SEED)

    @property
    def scale(self) -> float:
        """Float, the factor of the update."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def scaled(self, factor: float) -> Self:
        """A config whose updates weigh more by a factor, a positive float.

        Raises:
            ValueError: If the method has no `alpha`.
        """
        if "alpha" not in self.get_config():
            raise ValueError(
                f"{self.method_name} has no `alpha`, so that its updates "
                "cannot weigh more or less."
            )
        alpha = self.rank if self.alpha is None else self.alpha
        return dataclasses.replace(self, alpha=factor * alpha)

    def for_layer(self, index: int) -> Self:
        """The config of one of several adapted layers, with a seed of its own.

        Args:
            index: Integer, which of the layers it is.

        Returns:
            A config of the same class.
        """
        if self.seed is None:
            return self
        seed = (self.seed + index) % (MAX_SEED + 1)
        return dataclasses.replace(self, seed=seed)

    def why_not(self, layer: keras.Layer) -> str | None:
        """Why the method does not fit a layer of a class that can be adapted.

        Args:
            layer: `keras.Layer`.

        Returns:
            String, the end of a sentence and what to do; `None` if it fits.
        """
        return None

    def get_config(self) -> dict[str, Any]:
        """Returns the fields as a dict that JSON can hold."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.init
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes a config from what `get_config` returned."""
        return cls(**config)

    def _refuse(self, name, allowed):
        raise ValueError(
            f"`{name}` must be {allowed}. "
            f"Received: {name}={getattr(self, name)!r}"
        )

    def _check_integer(self, name, minimum, maximum=math.inf):
        value = getattr(self, name)
        if not is_integer(value) or not minimum <= value <= maximum:
            above = f" and <= {maximum}" if maximum < math.inf else ""
            self._refuse(name, f"an integer >= {minimum}{above}")
        object.__setattr__(self, name, int(value))

    def _check_number(self, name, allowed, is_allowed):
        value = getattr(self, name)
        if not is_finite(value) or not is_allowed(value):
            self._refuse(name, allowed)
        object.__setattr__(self, name, float(value))

    def _check_rate(self, name):
        self._check_number(name, "a number in [0, 1)", lambda v: 0 <= v < 1)

    def _check_choice(self, name, choices):
        value = getattr(self, name)
        if not any(
            type(value) is type(choice) and value == choice
            for choice in choices
        ):
            self._refuse(name, f"one of {choices}")


def check_config(config: Any) -> None:
    """Raises a `TypeError` if `config` is none of a low-rank method."""
    if isinstance(config, AdapterConfig) and config.adapter_class is not None:
        return
    received = f"{config!r} (of type {type(config)})"
    if isinstance(config, type) and issubclass(config, AdapterConfig):
        received = f"the class {config.__name__}, not one of its objects"
    raise TypeError(
        "`config` must be the config of a low-rank method, such as "
        "`keras_fvae.LoRAConfig(rank=16)`; there are "
        f"{', '.join(sorted(_config_classes))}. Received: config={received}"
    )


def describe_config(config: AdapterConfig) -> dict[str, Any]:
    """A config as a dict that JSON can hold, with the name of its class."""
    return {"class_name": type(config).__name__, **config.get_config()}


def config_from_description(description: dict[str, Any]) -> AdapterConfig:
    """The config that `describe_config` described.

    Args:
        description: Dict, of which nothing is known.

    Raises:
        ValueError: If there is no such class, or a field is wrong.
    """
    fields = {**description}
    name = fields.pop("class_name", None)
    if not isinstance(name, str) or name not in _config_classes:
        raise ValueError(
            f"there is no method with the config {name!r}, only "
            f"{sorted(_config_classes)}"
        )
    try:
        return _config_classes[name](**fields)
    except TypeError as error:
        raise ValueError(f"{name} takes other fields: {error}") from error


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, and not a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_boolean(name: str, value: Any) -> None:
    """Raises a `ValueError` if the value of an argument is no boolean."""
    if value not in (True, False):
        raise ValueError(
            f"`{name}` must be a boolean. Received: {name}={value!r}"
        )


def is_finite(value: Any) -> bool:
    """Whether a value is a real number that a float can hold."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An integer, but no float.
        return False
