"""OPLoRA: steps of A and B towards the step of the whole kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.backend.types import Tensor
from keras_fvae.layers.config import check_boolean
from keras_fvae.layers.config import is_integer
from keras_fvae.optimizers.arguments import LearningRate
from keras_fvae.optimizers.arguments import check_number
from keras_fvae.optimizers.op_lora_step import projected_step
from keras_fvae.optimizers.op_lora_step import step
from keras_fvae.optimizers.pair_optimizer import PairOptimizer
from keras_fvae.optimizers.pairs import find_beside
from keras_fvae.optimizers.pairs import find_pairs

# Beside the proximal weight. The authors add it to the matrices that are
# inverted alone, and so make A smaller while B is 0.
SMALLEST_PROXIMAL_WEIGHT = 1e-6
# Of `beta_1`, `beta_2` and `damping`, which only the scaled variant has.
SCALED_DEFAULTS = 0.9, 0.99, 1e-5


@keras.saving.register_keras_serializable(package="keras_fvae")
class OPLoRA(PairOptimizer):
    """Optimizer that implements OPLoRA, by Proximal Subspace Iteration.

    A step of the whole kernel would be `-learning_rate * (G + momentum * M)`,
    for its gradient G and the moving sum M of former ones. Of each pair of
    `kernel_a`, A of shape `(d, rank)`, and `kernel_b`, B of shape `(rank, k)`,
    the product is brought as near to `A B` and that step as a product of this
    rank can come: by alternating least squares (LoRSum), which hold A and B
    where they are by a proximal weight. M is a product of two factors itself,
    `momentum * M + G` after each step, in the same way.

    With `projected_momentum=True` there is a momentum of A and one of B. Before
    each use they are projected on what A and B have become.

    With `scaled=True` near is what K-FAC says. Averages of mean squares over
    the tokens, of a layer's input and of its outputs' gradients, are diagonal
    metrics; their square roots say how much the rows and the columns of the
    kernel weigh. And M is an average, as in Adam: the step is
    `-learning_rate * ((1 - beta_1) * G + beta_1 * M)`.

    G is more than the gradients of A and B. It is computed for models that are
    adapted by `keras_fvae.OPLoRAConfig`, and for no others; the mean squares,
    by `keras_fvae.OPLoRAConfig(mean_squares=True)`. What is in no pair, such as
    a head, goes to `other_optimizer`.

    Learning rate: as of gradient descent, and so it goes with the scale of the
    loss; 0.5 in the authors' example, a linear task. Of the scaled variant 0.2
    to 1 for language models, with a linear decay, `num_iterations=0` and no
    momentum: their code says `beta_1=0.9`, but without iterations it leaves M
    at 0, so that theirs is here a tenth of that with `beta_1=0`. With a
    projected momentum 5e-3. Cost: that of `keras_fvae.OPLoRAConfig`, and in
    each step, for A and B and for M, `2 * num_iterations` products of G with
    thin matrices, and as many eigenvalues of `(rank, rank)` matrices; with
    momentum the memory of A and B once more, three times with a projected one.

    Clipping takes G for the gradient of a variable like others: `clipnorm` and
    `clipvalue` count for it, and `global_clipnorm` for the norm of G, the
    gradients of A and B, and all others together. Mean squares are not clipped.

    Args:
        learning_rate: Float, or
            `keras.optimizers.schedules.LearningRateSchedule`.
        other_optimizer: Optional `keras.optimizers.Optimizer` of the weights
            that are in no pair, with a learning rate and weight decay of its
            own. Needed if there are such weights. Defaults to `None`.
        momentum: Float in `[0, 1)`. Defaults to `0.0`.
        num_iterations: Non-negative integer, how often A and B are solved for
            in a step. The authors have 1 or 2. With 0 they are once, each with
            the other one as it was; without momentum, and not scaled, that is
            `keras_fvae.optimizers.RiemannianPreconditioning` of `SGD`, which
            needs no G. Defaults to `1`.
        proximal_weight: Positive float, times the learning rate. Defaults to
            `1e-2`.
        projected_momentum: Boolean, as above. It needs a `momentum`. Defaults
            to `False`.
        scaled: Boolean, as above. Its momentum is `beta_1`, and `momentum` must
            be 0. Defaults to `False`.
        beta_1: Float in `[0, 1)`, with `scaled=True` what M keeps of itself.
            Defaults to `0.9`.
        beta_2: Float in `[0, 1)`, with `scaled=True` what the averages of mean
            squares, which start at 1, keep of themselves. Defaults to `0.99`.
        damping: Positive float, with `scaled=True` added to these averages.
            Defaults to `1e-5`.
        name: String. Defaults to `"op_lora"`.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, which come before
            all else and count for all weights, `gradient_accumulation_steps`,
            `loss_scale_factor`, `use_ema`, `ema_momentum` or
            `ema_overwrite_frequency`, as in `keras.optimizers.Optimizer`. There
            is no `weight_decay`.

    Raises:
        ValueError: If an argument is not allowed; in `build`, which `fit`
            calls, if there is no pair of A and B that train, G or mean squares
            are not computed for one, or there is no `other_optimizer` for other
            weights.

    Example:

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((4,)),
    ...         keras.layers.Dense(4, name="query"),
    ...         keras.layers.Dense(3, name="head"),
    ...     ]
    ... )
    >>> summary = keras_fvae.enable_adapter(
    ...     model,
    ...     keras_fvae.OPLoRAConfig(2),
    ...     ["query"],
    ...     trainable_layer_names=["head"],
    ... )
    >>> optimizer = keras_fvae.optimizers.OPLoRA(
    ...     0.1, other_optimizer=keras.optimizers.AdamW(1e-3), momentum=0.9
    ... )
    >>> model.compile(optimizer, "mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)

    Reference: [OPLoRA](https://arxiv.org/abs/2509.19977), [Proximal Subspace
    Iteration](https://arxiv.org/abs/2602.16456).
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        other_optimizer: keras.optimizers.Optimizer | None = None,
        momentum: float = 0.0,
        num_iterations: int = 1,
        proximal_weight: float = 1e-2,
        projected_momentum: bool = False,
        scaled: bool = False,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        damping: float = 1e-5,
        name: str = "op_lora",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("weight_decay") is not None:
            raise ValueError(
                "`OPLoRA` has no weight decay of A and B; that of other "
                "weights is a setting of `other_optimizer`. Received: "
                f"weight_decay={kwargs['weight_decay']!r}"
            )
        for rate_name, rate in (
            ("momentum", momentum),
            ("beta_1", beta_1),
            ("beta_2", beta_2),
        ):
            check_number(
                rate_name, rate, "a number in [0, 1)", lambda v: 0 <= v < 1
            )
        for positive_name, number in (
            ("proximal_weight", proximal_weight),
            ("damping", damping),
        ):
            check_number(
                positive_name, number, "a positive number", lambda v: v > 0
            )
        if not is_integer(num_iterations) or num_iterations < 0:
            raise ValueError(
                "`num_iterations` must be a non-negative integer. Received: "
                f"num_iterations={num_iterations!r}"
            )
        check_boolean("scaled", scaled)
        check_boolean("projected_momentum", projected_momentum)
        if not scaled and (beta_1, beta_2, damping) != SCALED_DEFAULTS:
            raise ValueError(
                "`beta_1`, `beta_2` and `damping` are settings of the variant "
                "with `scaled=True`; without it the momentum is `momentum`. "
                f"Received: scaled=False, beta_1={beta_1!r}, "
                f"beta_2={beta_2!r}, damping={damping!r}"
            )
        if scaled and (momentum or projected_momentum):
            raise ValueError(
                "With `scaled=True` the momentum is an average, and `beta_1` "
                f"what it keeps of itself. Received: momentum={momentum!r}, "
                f"projected_momentum={projected_momentum!r}"
            )
        if projected_momentum and not momentum:
            raise ValueError(
                "`projected_momentum=True` needs a momentum. Received: "
                f"momentum={momentum!r}"
            )
        super().__init__(learning_rate, other_optimizer, name=name, **kwargs)
        self.momentum = momentum
        self.num_iterations = num_iterations
        self.proximal_weight = proximal_weight
        self.projected_momentum = projected_momentum
        self.scaled = scaled
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.damping = damping

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        pairs = find_pairs(variables, type(self).__name__)
        self.kernels_a, self.kernels_b = zip(*pairs)
        self.zero_kernels, self.input_squares, self.output_squares = (
            find_beside(name, variables, pairs)
            for name in ("zero_kernel", "input_squares", "output_squares")
        )
        self._check_adapters(variables)
        squares = {*self.input_squares, *self.output_squares} - {None}
        self.never_clipped = tuple(squares)
        self.build_others(
            variables,
            {*self.kernels_a, *self.kernels_b, *self.zero_kernels, *squares},
        )
        super().build(variables)

        def add(indices, name, initializer="zeros"):
            references = [variables[index] for index in indices]
            return self.add_optimizer_variables(references, name, initializer)

        self.momentums_a, self.momentums_b = [], []
        self.former_a, self.former_b = [], []
        if self.projected_momentum:
            self.momentums_a = add(self.kernels_a, "momentum")
            self.former_a = add(self.kernels_a, "former")
            self.former_b = add(self.kernels_b, "former")
        elif self.coefficients[1] > 0:
            # A product of factors that are both 0 would stay 0.
            random = keras.initializers.RandomNormal(stddev=1.0)
            self.momentums_a = add(self.kernels_a, "momentum", random)
        if self.momentums_a:
            self.momentums_b = add(self.kernels_b, "momentum")
        self.metrics = []
        if self.scaled:
            self.metrics = add(
                [*self.input_squares, *self.output_squares], "metric", "ones"
            )

    @property
    def coefficients(self) -> tuple[float, float]:
        """What G and M weigh, in the step and in the new M."""
        if self.scaled:
            return 1.0 - self.beta_1, self.beta_1
        return 1.0, self.momentum

    def step_pairs(
        self, gradients: list[Tensor | None], learning_rate: Tensor
    ) -> None:
        self._check_gradients(gradients)
        variables = self.optimized_variables
        pairs = [
            (variables[a], variables[b])
            for a, b in zip(self.kernels_a, self.kernels_b)
        ]
        former_pairs = [*zip(self.former_a, self.former_b)]
        momentums = [*zip(self.momentums_a, self.momentums_b)]
        of_kernels = self.whole_gradients(gradients, self.zero_kernels)
        metrics = self._new_metrics(gradients)
        learning_rate = ops.cast(learning_rate, pairs[0][0].dtype)
        how = (
            learning_rate,
            learning_rate * self.proximal_weight + SMALLEST_PROXIMAL_WEIGHT,
            self.num_iterations,
        )
        if self.projected_momentum:
            state: Any = pairs, former_pairs, momentums
            stepped: Any = projected_step(  # type: ignore[call-arg]
                *map(_to_tensors, state), of_kernels, self.momentum, *how
            )
        else:
            state = pairs, momentums
            stepped = step(  # type: ignore[call-arg]
                *map(_to_tensors, state),
                of_kernels,
                self.coefficients,
                *how,
                self._scales(metrics),
            )
        replicas.assign(
            keras.tree.flatten((state, self.metrics)),
            keras.tree.flatten((stepped, metrics)),
        )

    def _new_metrics(self, gradients):
        """Averages of the mean squares, of inputs and then of outputs."""
        if not self.scaled:
            return []
        squares = self.whole_gradients(
            gradients, [*self.input_squares, *self.output_squares]
        )
        return [
            self.beta_2 * metric + (1.0 - self.beta_2) * mean
            for metric, mean in zip(self.metrics, squares)
        ]

    def _scales(self, metrics):
        """What the rows and the columns of each A B weigh."""
        if not self.scaled:
            return None
        # The norm squares them, and the metric is a square root itself.
        scales = [(metric + self.damping) ** 0.25 for metric in metrics]
        rows, columns = scales[: len(scales) // 2], scales[len(scales) // 2 :]
        return [(row[:, None], column) for row, column in zip(rows, columns)]

    def _check_adapters(self, variables):
        """Raises a `ValueError` if an adapter lacks what the step needs."""
        needed, config = [self.zero_kernels], "OPLoRAConfig()"
        if self.scaled:
            needed += [self.input_squares, self.output_squares]
            config = "OPLoRAConfig(mean_squares=True)"
        for b, *found in zip(self.kernels_b, *needed):
            if None in found:
                adapter = variables[b].path.rpartition("/")[0]
                raise ValueError(
                    f"`{type(self).__name__}` needs the gradient of the whole "
                    "kernel"
                    f"{', and mean squares' if self.scaled else ''}, which "
                    f"'{adapter}' does not compute. Adapt the model by "
                    f"`keras_fvae.enable_adapter(model, keras_fvae.{config})`, "
                    "whose docstring says what memory that takes. "
                    "`keras_fvae.optimizers.RiemannianPreconditioning` does "
                    "without, on any LoRA."
                )

    def _check_gradients(self, gradients):
        """Raises a `ValueError` if a B trains and there is not all it needs."""
        variables = self.optimized_variables
        for b, zeros, squares in zip(
            self.kernels_b, self.zero_kernels, self.input_squares
        ):
            if gradients[b] is None:
                continue
            if gradients[zeros] is None:
                raise ValueError(
                    f"There is a gradient of '{variables[b].path}', and none "
                    f"of '{variables[zeros].path}', which enters in training "
                    "alone: call the model with `training=True`."
                )
            if self.scaled and gradients[squares] is None:
                raise ValueError(
                    f"There is no gradient of '{variables[squares].path}', "
                    "which enters by a loss of its own: add `model.losses` to "
                    "the loss."
                )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "num_iterations": self.num_iterations,
            "proximal_weight": self.proximal_weight,
            "projected_momentum": self.projected_momentum,
            "scaled": self.scaled,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "damping": self.damping,
        }


def _to_tensors(pairs):
    return [tuple(map(ops.convert_to_tensor, pair)) for pair in pairs]
