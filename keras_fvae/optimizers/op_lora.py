"""OPLoRA: steps of A and B towards the step of the whole kernel."""

import keras
from keras import ops

from keras_fvae.backend import replicas
from keras_fvae.layers.config import is_integer
from keras_fvae.optimizers.arguments import check_number
from keras_fvae.optimizers.lorsum import lorsum
from keras_fvae.optimizers.pair_optimizer import PairOptimizer
from keras_fvae.optimizers.pairs import find_pairs
from keras_fvae.optimizers.pairs import find_zero_kernels

# Beside the proximal weight. The authors add it to the matrices that are
# inverted alone, and so make A smaller while B is 0.
SMALLEST_PROXIMAL_WEIGHT = 1e-6


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

    G is more than the gradients of A and B. It is computed for models that are
    adapted by `keras_fvae.OPLoRAConfig`, and for no others. Least squares from
    the gradients of A and B alone, without an iteration, are
    `keras_fvae.optimizers.RiemannianPreconditioning` of `SGD`. What is in no
    pair, such as a head, goes to `other_optimizer`.

    Learning rate: as of gradient descent, and so it goes with the scale of the
    loss; 0.5 in the authors' example, a linear task. Those in their scripts for
    language models (0.2 to 1, with a linear decay) are of their scaled variant,
    which is not here: its metrics are means of squares over tokens, of a
    layer's input and of its outputs' gradients, which G does not tell. Cost:
    that of `keras_fvae.OPLoRAConfig`, and in each step, for A and B and for
    M, `2 * num_iterations` products of G with thin matrices, and as many
    eigenvalues of `(rank, rank)` matrices; with momentum the memory of A and B
    once more.

    Clipping takes G for the gradient of a variable like others: `clipnorm` and
    `clipvalue` count for it, and `global_clipnorm` for the norm of G, the
    gradients of A and B, and all others together.

    Args:
        learning_rate: Float, or
            `keras.optimizers.schedules.LearningRateSchedule`.
        other_optimizer: Optional `keras.optimizers.Optimizer` of the weights
            that are in no pair, with a learning rate and weight decay of its
            own. Needed if there are such weights. Defaults to `None`.
        momentum: Float in `[0, 1)`. Defaults to `0.0`.
        num_iterations: Positive integer, how often A and B are solved for in a
            step. The authors have 1 or 2. Defaults to `1`.
        proximal_weight: Positive float, times the learning rate. Defaults to
            `1e-2`.
        name: String. Defaults to `"op_lora"`.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, which come before
            all else and count for all weights, `gradient_accumulation_steps`,
            `loss_scale_factor`, `use_ema`, `ema_momentum` or
            `ema_overwrite_frequency`, as in `keras.optimizers.Optimizer`. There
            is no `weight_decay`.

    Raises:
        ValueError: If an argument is not allowed; in `build`, which `fit`
            calls, if there is no pair of A and B that train, G is not computed
            for one, or there is no `other_optimizer` for other weights.

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
        learning_rate,
        other_optimizer=None,
        momentum=0.0,
        num_iterations=1,
        proximal_weight=1e-2,
        name="op_lora",
        **kwargs,
    ):
        if kwargs.get("weight_decay") is not None:
            raise ValueError(
                "`OPLoRA` has no weight decay of A and B; that of other "
                "weights is a setting of `other_optimizer`. Received: "
                f"weight_decay={kwargs['weight_decay']!r}"
            )
        check_number(
            "momentum", momentum, "a number in [0, 1)", lambda v: 0 <= v < 1
        )
        if not is_integer(num_iterations) or num_iterations < 1:
            raise ValueError(
                "`num_iterations` must be a positive integer: without an "
                "iteration, take "
                "`keras_fvae.optimizers.RiemannianPreconditioning`. Received: "
                f"num_iterations={num_iterations!r}"
            )
        check_number(
            "proximal_weight",
            proximal_weight,
            "a positive number",
            lambda v: v > 0,
        )
        super().__init__(learning_rate, other_optimizer, name=name, **kwargs)
        self.momentum = momentum
        self.num_iterations = num_iterations
        self.proximal_weight = proximal_weight

    def build(self, variables):
        if self.built:
            return
        pairs = find_pairs(variables, type(self).__name__)
        self.zero_kernels = find_zero_kernels(
            variables, pairs, type(self).__name__
        )
        self.kernels_a, self.kernels_b = zip(*pairs)
        self.build_others(
            variables, {*self.kernels_a, *self.kernels_b, *self.zero_kernels}
        )
        super().build(variables)
        self.momentums_a, self.momentums_b = [], []
        if self.momentum > 0:
            self.momentums_a = self.add_optimizer_variables(
                [variables[index] for index in self.kernels_a],
                "momentum",
                keras.initializers.RandomNormal(stddev=1.0),
            )
            self.momentums_b = self.add_optimizer_variables(
                [variables[index] for index in self.kernels_b], "momentum"
            )

    def step_pairs(self, gradients, learning_rate):
        self._check_gradients(gradients)
        gradients = self.whole_gradients(gradients, self.zero_kernels)
        variables = self.optimized_variables
        variables_a = [variables[index] for index in self.kernels_a]
        variables_b = [variables[index] for index in self.kernels_b]
        variables_a += self.momentums_a
        variables_b += self.momentums_b
        lefts = [ops.convert_to_tensor(variable) for variable in variables_a]
        rights = [ops.convert_to_tensor(variable) for variable in variables_b]
        learning_rate = ops.cast(learning_rate, variables_a[0].dtype)

        sums = [[(-learning_rate, (gradient,))] for gradient in gradients]
        if self.momentum > 0:
            momentums = [*zip(lefts, rights)][len(gradients) :]
            sums = [
                [*terms, (-learning_rate * self.momentum, momentum)]
                for terms, momentum in zip(sums, momentums)
            ]
            sums += [
                [(1.0, (gradient,)), (self.momentum - 1.0, momentum)]
                for gradient, momentum in zip(gradients, momentums)
            ]
        lefts, rights = lorsum(
            lefts,
            rights,
            sums,
            learning_rate * self.proximal_weight + SMALLEST_PROXIMAL_WEIGHT,
            self.num_iterations,
        )
        replicas.assign([*variables_a, *variables_b], [*lefts, *rights])

    def _check_gradients(self, gradients):
        """Raises a `ValueError` if a B trains and its kernel has none."""
        variables = self.optimized_variables
        for b, zeros in zip(self.kernels_b, self.zero_kernels):
            if gradients[zeros] is None and gradients[b] is not None:
                raise ValueError(
                    f"There is a gradient of '{variables[b].path}', and none "
                    f"of '{variables[zeros].path}', which enters in training "
                    "alone: call the model with `training=True`."
                )

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "num_iterations": self.num_iterations,
            "proximal_weight": self.proximal_weight,
        }
