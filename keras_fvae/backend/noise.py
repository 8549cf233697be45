"""Random numbers from the state of a `keras.random.SeedGenerator`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import weakref
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import packing
from keras_fvae.backend.replicas import replica_index
from keras_fvae.backend.types import Tensor


def choose_seed(seed: int | None) -> int:
    """A seed, drawn if it is `None`.

    As Keras does, so that `keras.utils.set_random_seed` controls it.
    """
    return random.randrange(2**31) if seed is None else seed


def initial_generator(seed: int, name: str) -> np.random.Generator:
    """What the initial values of a weight are drawn from.

    NumPy's: on JAX each operation is a program, which stays in memory.

    Args:
        seed: Non-negative integer.
        name: String, the name of the weight.

    Returns:
        `numpy.random.Generator`.
    """
    return np.random.default_rng([seed, *name.encode()])


def next_seed(seed_generator: keras.random.SeedGenerator) -> Any:
    """What a call of `noise_and_masks` draws from.

    Args:
        seed_generator: `keras.random.SeedGenerator`, whose state moves on.

    Returns:
        Integer tensor, or on PyTorch a `Seed`, from which the same numbers
        come each time.
    """
    if keras.config.backend() == "torch":
        return _next_torch_seed(seed_generator)
    return seed_generator.next()


def save_seed(layer: keras.Layer, store: Any) -> None:
    """Adds the state of a layer's `seed_generator` to what it saves.

    Keras does not, and a resumed run would draw the same numbers again.

    Args:
        layer: `keras.Layer`; one that draws nothing has no generator.
        store: Dict-like, as `save_own_variables` gets it.
    """
    if hasattr(layer, "seed_generator"):
        state = ops.convert_to_numpy(layer.seed_generator.state)
        store["seed_generator_state"] = state


def load_seed(layer: keras.Layer, store: Any) -> dict[str, Any]:
    """Sets what `save_seed` saved.

    Returns:
        Dict, the rest of the store.
    """
    rest = {name: store[name] for name in [*store.keys()]}
    state = rest.pop("seed_generator_state", None)
    if state is not None and hasattr(layer, "seed_generator"):
        layer.seed_generator.state.assign(state)
    return rest


@dataclasses.dataclass(eq=False)
class _Block:
    """A block of `seeds_set`, to one of its generators."""

    state_before: np.ndarray


# Of each generator, those that it is in, in the order in which it entered.
_blocks: weakref.WeakKeyDictionary[keras.random.SeedGenerator, list[_Block]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def seeds_set(
    seed_generators: Sequence[keras.random.SeedGenerator], seed: int
) -> Iterator[None]:
    """Sets what generators draw, for the time of a block.

    Blocks may be nested, and overlap: the one that was entered last counts.

    Args:
        seed_generators: List of `keras.random.SeedGenerator`. Each draws
            numbers of its own, and goes on after as if there had been no block.
        seed: Non-negative integer.
    """
    entered = []
    try:
        for index, generator in enumerate(seed_generators):
            block = _Block(ops.convert_to_numpy(generator.state))
            _blocks.setdefault(generator, []).append(block)
            entered.append((generator, block))
            own_seed = np.random.SeedSequence([seed, index]).generate_state(1)
            # Of 31 bits, for which every backend's state has room; a count.
            state = np.array([own_seed[0] >> 1, 0], block.state_before.dtype)
            generator.state.assign(state)
        yield
    finally:
        for generator, block in entered:
            _leave(generator, block)


def _leave(generator, block):
    """Gives a generator, or the block that it entered next, the state."""
    blocks = _blocks[generator]
    index = blocks.index(block)
    del blocks[index]
    if index < len(blocks):
        blocks[index].state_before = block.state_before
    else:
        generator.state.assign(block.state_before)


def noise_and_masks(
    shape: Sequence[Any],
    seed: Any,
    noise_width: int,
    mask_widths: Sequence[int] = (),
    rate: float = 0.0,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Standard normal noise, and which units dropout keeps.

    All in one call to the generator, which costs more than the numbers do.

    Args:
        shape: Tuple of integers or scalar tensors, one set of numbers each.
        seed: What `next_seed` returned.
        noise_width: Integer, how many normal numbers are in a set.
        mask_widths: Sequence of integers, how many units each mask is for.
        rate: Float in `[0, 1)`, the share of the units that don't stay; on
            PyTorch rounded to a multiple of `2**-16`.

    Returns:
        Float32 tensor of shape `(*shape, noise_width)`, and a sequence of
        boolean tensors of shape `(*shape, mask_width)`.
    """
    if keras.config.backend() == "torch":
        noise, numbers = _noise_and_numbers(
            seed, (*shape, noise_width), (*shape, sum(mask_widths))
        )
        masks = packing.split(are_at_least(numbers, rate), mask_widths)
    else:
        widths = NUMBERS_PER_NORMAL * noise_width, *mask_widths
        numbers = _random_bits((*shape, sum(widths)), seed)
        numbers, *parts = packing.split(numbers, widths)
        noise = to_normal(numbers)
        masks = [are_at_least(part, rate) for part in parts]
    return noise, masks


def dropout(
    x: Tensor, rate: float, seed_generator: keras.random.SeedGenerator
) -> Tensor:
    """Dropout: a part of x is 0, the rest is scaled up by as much.

    Args:
        x: Float tensor.
        rate: Float in `(0, 1)`, the share that is 0.
        seed_generator: `keras.random.SeedGenerator`, whose state moves on.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    *shape, width = ops.shape(x)
    _, (mask,) = noise_and_masks(
        tuple(shape), next_seed(seed_generator), 0, [width], rate
    )
    # On PyTorch Keras would copy a 0 to the device.
    return ops.where(mask, x * (1 / (1 - rate)), ops.zeros_like(x))


def are_at_least(numbers: Tensor, share: float) -> Tensor:
    """Which numbers are not among the smallest.

    Args:
        numbers: Integer tensor, uniform over all values of its dtype.
        share: Float in `[0, 1)`, that of the smallest.

    Returns:
        Boolean tensor of the same shape.
    """
    # As they come: to get to `[0, 1)` takes operations, which XLA repeats
    # wherever the numbers are read.
    limits = np.iinfo(keras.backend.standardize_dtype(numbers.dtype))
    threshold = limits.min + round(share * (limits.max - limits.min + 1))
    return numbers >= limits.dtype.type(min(threshold, limits.max))


# Of 2**32. Seeds that are this far apart stay far from each other, however many
# there are: Knuth, The Art of Computer Programming 3 (1998), section 6.4.
GOLDEN_RATIO = 2654435769
# What `to_normal` takes.
NUMBERS_PER_NORMAL = 2


def to_normal(numbers: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones, by Box and Muller's method.

    Two for each, so that noise and dropout can share one call to the
    generator. The inverse of the normal CDF needs one, and three times the
    code to compile.

    Args:
        numbers: Uint32 tensor of shape `(..., 2 * n)`, uniform.

    Returns:
        Float32 tensor of shape `(..., n)`.
    """
    first, second = ops.split(ops.cast(numbers, "float32"), 2, axis=-1)
    # The logarithm of 0 is minus infinity.
    radius = ops.sqrt(-2 * ops.log(2.0**-32 * first + 2.0**-33))
    return radius * ops.cos(2.0**-31 * math.pi * second)


def _random_bits(shape, seed):
    """Integer tensor of uniform numbers in `[0, 2**32)`."""
    if keras.config.backend() == "jax":
        import jax

        # JAX counts along one axis in fewer operations than along several.
        bits = jax.random.bits(seed, (math.prod(shape),), "uint32")
        return ops.reshape(bits, shape)
    return _philox(shape, seed)


def _philox(shape, seed):
    """TensorFlow's Philox, with the seed as its key.

    `keras.random` leaves the choice of the key to TensorFlow. On CPUs XLA then
    works the key out anew for each number, which takes a hundred times as long
    as the numbers do, and is three quarters of the code to compile.
    """
    import tensorflow as tf

    key, count = tf.unstack(tf.cast(seed, "uint64"))
    # The state is the same on all replicas, which are to draw different ones.
    first = tf.cast(replica_index(), "uint64") * 2**48
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=shape,
        key=[key],
        # The upper half of its counter is that of the calls, so no two calls
        # share a number.
        counter=[first, count],
        alg=tf.random.Algorithm.PHILOX.value,
        dtype="uint32",
    )


if keras.config.backend() == "torch":
    import torch

    class Seed(NamedTuple):
        """The state of a generator, as a call found it.

        Args:
            numbers: Tuple of two integers, the key and the count of calls, or
                where they can't be known yet, an integer tensor.
            device: `torch.device` to draw on.
        """

        numbers: Any
        device: torch.device

    @dataclasses.dataclass(frozen=True)
    class _KnownState:
        """What a tensor holds, unless it has changed since."""

        tensor: torch.Tensor
        version: int
        numbers: tuple[int, int]

    # To read it from a GPU, Python would wait until all that was asked of the
    # GPU before is done.
    _known_states: weakref.WeakKeyDictionary[
        keras.random.SeedGenerator, _KnownState
    ] = weakref.WeakKeyDictionary()

    def _next_torch_seed(seed_generator: keras.random.SeedGenerator) -> Seed:
        state = seed_generator.state
        tensor = state.value
        step = torch.arange(2, dtype=tensor.dtype, device=tensor.device)
        if torch.compiler.is_compiling() or tensor.is_meta:
            seed = tensor.clone()
            state.assign(seed + step)
            return Seed(seed, tensor.device)
        numbers = _known_numbers(seed_generator, tensor)
        state.assign(tensor + step)
        tensor = state.value
        if not tensor.is_inference():
            key, count = numbers
            _known_states[seed_generator] = _KnownState(
                tensor, tensor._version, (key, count + 1)
            )
        return Seed(numbers, tensor.device)

    def _known_numbers(seed_generator, tensor):
        known = _known_states.get(seed_generator)
        is_known = (
            known is not None
            and known.tensor is tensor
            and known.version == tensor._version
        )
        return known.numbers if is_known else tuple(tensor.tolist())

    def _noise_and_numbers(seed, noise_shape, numbers_shape):
        """Normal numbers, and uniform ones in `[-2**15, 2**15)`."""
        if isinstance(seed.numbers, tuple):
            return _draw(*seed, noise_shape, numbers_shape)
        return _traced_draw(seed.numbers, noise_shape, numbers_shape)

    def _draw(numbers, device, noise_shape, numbers_shape):
        generator = torch.Generator(device)
        # Not their sum: the layers' seeds are one apart, so that each layer
        # would draw what its neighbour drew a step ago.
        key, count = numbers
        generator.manual_seed((key * GOLDEN_RATIO + count) % 2**32)
        options = {"device": device, "generator": generator}
        noise = torch.randn(*noise_shape, **options)
        if device.type != "cpu":
            return noise, torch.randint(
                -(2**15), 2**15, numbers_shape, dtype=torch.int16, **options
            )
        # CPUs draw one by one, in the same time however large a number is.
        size = math.prod(numbers_shape)
        uniform = torch.empty(math.ceil(size / 4), dtype=torch.int64)
        uniform.random_(-(2**63), None, generator=generator)
        return noise, uniform.view(torch.int16)[:size].reshape(numbers_shape)

    # `torch.compile` can't trace a generator.
    @torch.library.custom_op("keras_fvae::noise_and_numbers", mutates_args=())
    def _traced_draw(
        seed: torch.Tensor,
        noise_shape: Sequence[int],
        numbers_shape: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _draw(seed.tolist(), seed.device, noise_shape, numbers_shape)

    @_traced_draw.register_fake
    def _(seed, noise_shape, numbers_shape):
        return (
            seed.new_empty(noise_shape, dtype=torch.float32),
            seed.new_empty(numbers_shape, dtype=torch.int16),
        )
