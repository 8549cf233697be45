"""FVAE-LoRA as a method: z1 in the place of `x A`, and the loss of the FVAE."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.fast_ops import reshape
from keras_fvae.backend.noise import initial_generator
from keras_fvae.backend.scoped import ScopedValue
from keras_fvae.backend.types import Tensor
from keras_fvae.layers import masking
from keras_fvae.layers.adapter import LowRankAdapter
from keras_fvae.layers.frozen import FrozenCall
from keras_fvae.layers.sharding import WeightAxes
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.fvae import FVAE

# Where adapted layers put their posteriors, if anywhere.
_recorded = ScopedValue()


class RecordedPosteriors(NamedTuple):
    """The posteriors of the tokens that an adapted layer was called on."""

    adapter: Any
    q1: Any
    q2: Any
    mask: Any


@contextlib.contextmanager
def recorded_posteriors() -> Iterator[list[RecordedPosteriors]]:
    """Records the posteriors of the adapted layers called inside the block.

    Yields:
        List, to which each call at inference adds a `RecordedPosteriors`.
    """
    records: list[RecordedPosteriors] = []
    with _recorded.set_to(records):
        yield records


class FVAELoRAAdapter(LowRankAdapter):
    """The update `scale * z1 B`, and the loss of the FVAE that gives z1.

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    config: FVAELoRAConfig

    adds_loss = True
    weight_axes: WeightAxes = {
        "kernel_b": (None, "output"),
        "feature_weights": ("input", None),
        "latent_weights": (None,),
    }

    def build_projection(self) -> None:
        self.fvae: FVAE = FVAE(
            dataclasses.replace(self.config, seed=self.initial_seed),
            self.finalized,
            dtype=self.dtype_policy,
            name="fvae",
        )
        self.fvae.build((None, self.width))

    def initial_kernel_b(self) -> np.ndarray:
        if self.config.zero_at_start == "kernel_b":
            return super().initial_kernel_b()
        generator = initial_generator(self.initial_seed, "kernel_b")
        return 0.02 * generator.normal(size=(self.config.rank, self.units))

    def project(self, frozen: FrozenCall, training: bool) -> Tensor:
        """The latent z1 of each token; in training, the loss is added.

        In training z1 is drawn; at inference it is its posterior mean, unless
        the update is sampled.
        """
        x = frozen.tokens
        records = _recorded.value
        if records is not None:
            posteriors = self.fvae.posteriors(x)
            records.append(
                RecordedPosteriors(self, *posteriors, frozen.find_mask())
            )
        if training:
            z1 = self._draw_and_add_loss(x, frozen)
        elif self.changes_state(training):
            z1 = self.fvae.sample_z1(x)
        else:
            return self.fvae.posterior_mean(x)
        if self.config.num_samples > 1:
            # The update is linear in z1: the mean of the draws is enough.
            z1 = ops.mean(z1, axis=0)
        return z1

    def merge(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.config.sample_at_inference:
            raise ValueError(
                "it samples at inference (sample_at_inference=True), so its "
                "update is not the same each time. Set it up without"
            )
        if self.config.hidden_units:
            raise ValueError(
                "its encoders have hidden layers "
                f"(encoder_units={self.config.hidden_units}), so its update is "
                "no linear function of the input. Call `finalize_adapter` "
                "instead, or train with `encoder_units=()`"
            )
        arrays = self.get_arrays(finalized=True)
        kernel_b = self.config.scale * arrays["kernel_b"].astype("float64")
        return (
            kernel + arrays["encoder_kernel_0"][:, 0] @ kernel_b,
            bias + arrays["encoder_bias_0"][0] @ kernel_b,
        )

    def changes_state(self, training: bool) -> bool:
        return self.config.sample_at_inference or self.is_drawn(training)

    def share_loss(self, num_adapters: int) -> None:
        self.fvae.num_sharing = num_adapters

    @property
    def is_zero(self) -> bool:
        arrays = self.get_arrays(finalized=True)
        last = len(self.config.hidden_units)
        has_mean = any(
            arrays[f"encoder_{name}_{last}"].any()
            for name in ("kernel", "bias")
        )
        return not (has_mean and arrays["kernel_b"].any())

    @property
    def is_trainable(self) -> bool:
        return bool(self.fvae.trainable_weights)

    def check_can_finalize(self) -> None:
        if self.config.sample_at_inference:
            raise ValueError(
                "it samples at inference (sample_at_inference=True), which "
                "needs the variance of q1, and that would not be kept. Set it "
                "up without"
            )

    def get_arrays(
        self,
        finalized: bool = False,
        read_kernel: Callable[[], np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        kernel_b = {"kernel_b": replicas.to_numpy(self.kernel_b)}
        return {**kernel_b, **self.fvae.get_arrays(finalized)}

    def set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.kernel_b.assign(arrays["kernel_b"])
        self.fvae.set_arrays(arrays)

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        kernel_b = {"kernel_b": tuple(self.kernel_b.shape)}
        return {**kernel_b, **self.fvae.array_shapes}

    @property
    def num_inference_parameters(self) -> int:
        rank, units = self.kernel_b.shape
        return rank * units + self.fvae.num_inference_parameters

    def _draw_and_add_loss(self, x, frozen):
        token_shape = ops.shape(x)[:-1]
        mask = masking.flatten_mask(frozen.find_mask(), token_shape)
        x = reshape(x, (-1, x.shape[-1]))
        elbo = self.fvae.elbo(x, training=True, mask=mask)
        self.add_to_mean_loss(self.fvae.loss_weight * elbo.loss)
        z1, _ = ops.unstack(elbo.z, 2, axis=-2)
        *draws_shape, _, rank = z1.shape
        return reshape(z1, (*draws_shape, *token_shape, rank))
