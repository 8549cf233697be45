"""Optimizers of pairs, against references and against what must be equal."""

import json
import warnings

import family
import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import JIT_COMPILE
from helpers import ROOT
from helpers import to_numpy
from keras import ops

import keras_fvae
from keras_fvae.optimizers import LoRARITE
from keras_fvae.optimizers import OPLoRA
from keras_fvae.optimizers import RiemannianPreconditioning
from keras_fvae.optimizers.lorsum import lorsum
from keras_fvae.optimizers.lorsum import scaled_lorsum
from keras_fvae.optimizers.pairs import find_beside
from keras_fvae.optimizers.pairs import find_pairs

REFERENCE = ROOT / "tests" / "reference" / "methods"


class Factors(keras.Layer):
    """Variables as an adapter has them, with the values given."""

    def __init__(self, name="adapter", **values):
        super().__init__(name=name)
        for key, value in values.items():
            weight = self.add_weight(
                name=key, shape=np.shape(value), initializer="zeros"
            )
            weight.assign(value)


def random_factors(rng, shape_of_a=(6, 2), shape_of_b=(2, 5), name="adapter"):
    return Factors(
        name,
        kernel_a=rng.normal(size=shape_of_a),
        kernel_b=rng.normal(size=shape_of_b),
        gate=rng.normal(size=(3,)),
    )


def factors_for(kind, rng):
    factors = random_factors(rng)
    if kind == "OPLoRA":
        factors.add_weight(
            name="zero_kernel", shape=(6, 5), initializer="zeros"
        )
    return factors


def make_optimizer(kind, **settings):
    inner = keras.optimizers.SGD(0.1)
    if kind == "Riemannian":
        return RiemannianPreconditioning(inner, **settings)
    if kind == "OPLoRA":
        # What it draws is the same each time.
        keras.utils.set_random_seed(0)
        return OPLoRA(0.05, inner, momentum=0.9, **settings)
    return LoRARITE(0.05, inner, **settings)


KINDS = ["Riemannian", "LoRA-RITE", "OPLoRA"]


def make_step(optimizer, variables, jit_compile=BACKEND == "jax"):
    """A function of the gradients, NumPy arrays, that steps the variables."""
    optimizer.build(variables)
    if BACKEND == "jax":
        import jax

        apply = optimizer.stateless_apply
        if jit_compile:
            apply = jax.jit(apply)

        def step(gradients):
            state = [*variables, *optimizer.variables]
            values, own_values = apply(
                [variable.value for variable in optimizer.variables],
                gradients,
                [variable.value for variable in variables],
            )
            for variable, value in zip(state, [*values, *own_values]):
                variable.assign(value)

    else:

        def step(gradients):
            optimizer.apply(gradients, variables)

        if BACKEND == "tensorflow":
            import tensorflow as tf

            step = tf.function(step, jit_compile=jit_compile)

    def step_by_arrays(gradients):
        step([ops.convert_to_tensor(g, "float32") for g in gradients])
        return values_of(variables)

    return step_by_arrays


def values_of(variables):
    return [to_numpy(variable) for variable in variables]


def assert_all_close(values, expected, atol=1e-6):
    for value, expected_value in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, expected_value, atol=atol, rtol=0)


# --- What the authors' own code computes.


class Reference:
    """The weights, gradients and settings of a file."""

    def __init__(self, name):
        with np.load(REFERENCE / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file if key != "config"}
            self.settings = json.loads(str(file["config"]))
        self.arrays = arrays
        names = ["lora_a", "lora_b"]
        prefix = "initial_"
        if "gate_kernel" in arrays:
            names, prefix = [*names, "gate_kernel"], ""
        self.start = [arrays[prefix + name] for name in names]
        self.gradients = [*zip(*(arrays[f"steps_grad_{n}"] for n in names))]
        self.steps = [*zip(*(arrays[f"steps_{name}"] for name in names))]

    def make_variables(self):
        names = ["kernel_a", "kernel_b", "gate_kernel"]
        return Factors(**dict(zip(names, self.start))).trainable_variables


def make_riemannian(name, settings):
    learning_rate = settings["learning_rate"]
    inner = keras.optimizers.SGD(
        learning_rate, momentum=settings.get("momentum", 0.0)
    )
    if name == "riemannian_adamw":
        inner = keras.optimizers.AdamW(
            learning_rate, weight_decay=0.0, epsilon=1e-8
        )
    if name == "preconditioned_sgd":
        # And what its Cholesky factorization adds.
        return RiemannianPreconditioning(inner, settings["lmbd"] + 1e-6)
    return RiemannianPreconditioning(inner, settings["reg"])


def make_lora_rite(settings):
    return LoRARITE(
        settings["learning_rate"],
        beta_1=settings["beta_1"],
        beta_2=settings["beta_2"],
        epsilon=settings["epsilon"],
        unmagnified_clipnorm=settings["clip_unmagnified_grad"] or None,
        skip_threshold=settings["update_skipping"] or None,
        escaped_mass=settings["apply_escape"],
    )


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
@pytest.mark.parametrize(
    "name",
    [
        "riemannian_sgd",
        "riemannian_adamw",
        "preconditioned_sgd",
        "moe_lora_sgd_riemannian",
        "lora_rite",
        "lora_rite_zero_b",
        "lora_rite_no_clipping",
        "lora_rite_skipped",
        "lora_rite_escape",
    ],
)
def test_steps_of_the_reference(name, jit_compile):
    reference = Reference(name)
    if name.startswith("lora_rite"):
        optimizer = make_lora_rite(reference.settings)
    else:
        optimizer = make_riemannian(name, reference.settings)
    step = make_step(optimizer, reference.make_variables(), jit_compile)
    # XLA sums these in an order of its own, unless it is told not to optimize.
    atol = 1e-5 if name == "riemannian_sgd" else 5e-6
    for gradients, expected in zip(reference.gradients, reference.steps):
        assert_all_close(step(gradients), expected, atol=atol)
    if name == "lora_rite":
        defaults = LoRARITE().get_config()
        assert {**optimizer.get_config(), "learning_rate": 0} == {
            **defaults,
            "learning_rate": 0,
        }


class UncorrectedAdam(keras.optimizers.Optimizer):
    """Adam without correction of its averages, as `AdamWr` has it."""

    def build(self, variables):
        super().build(variables)
        self.moments = self.add_optimizer_variables(variables, ["m", "v"])

    def update_step(self, gradient, variable, learning_rate):
        first, second = (
            m[self._get_variable_index(variable)] for m in self.moments
        )
        self.assign(first, 0.9 * first + 0.1 * gradient)
        self.assign(second, 0.999 * second + 0.001 * ops.square(gradient))
        root = ops.sqrt(second) + 1e-6
        self.assign_sub(
            variable, ops.cast(learning_rate, "float32") * first / root
        )


@pytest.mark.one_backend
def test_authors_adamw_of_experts():
    """It is ours, but that B is preconditioned by A as already stepped."""
    reference = Reference("moe_lora_adamw_riemannian")
    for kind in ("A and gate", "B"):
        variables = reference.make_variables()
        settings = reference.settings
        optimizer = RiemannianPreconditioning(
            UncorrectedAdam(settings["learning_rate"]), settings["reg"]
        )
        step = make_step(optimizer, variables)
        before = reference.start
        for gradients, after in zip(reference.gradients, reference.steps):
            seen = before if kind != "B" else [after[0], *before[1:]]
            for variable, value in zip(variables, seen):
                variable.assign(value)
            kernel_a, kernel_b, gate = step(gradients)
            if kind == "B":
                assert_all_close([kernel_b], [after[1]], atol=5e-6)
            else:
                assert_all_close([kernel_a, gate], after[::2], atol=5e-6)
            before = after


def load_reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file), json.loads(str(file["config"]))


@pytest.mark.parametrize(
    "num_iterations, is_scaled",
    [(1, False), (2, False), (8, False), (0, True), (1, True), (2, True)],
)
def test_lorsum_of_the_reference(num_iterations, is_scaled):
    arrays, settings = load_reference("lorsum")
    start, gradient, momentum = (
        tuple(
            ops.convert_to_tensor(arrays[f"{m}_{i}"], "float32") for m in "ab"
        )
        for i in range(3)
    )
    prefix = "scaled_" if is_scaled else ""
    how = settings["lmbd"], num_iterations
    for first_term in (gradient, (ops.matmul(*gradient),)):
        sums = [[*zip(settings["coefficients"][1:], (first_term, momentum))]]
        lefts, rights = [start[0]], [start[1]]
        if is_scaled:
            rows, columns = (
                ops.sqrt(ops.convert_to_tensor(arrays[metric], "float32"))
                for metric in ("metric_in", "metric_out")
            )
            scales = [(rows[:, None], columns)]
            results = scaled_lorsum(lefts, rights, sums, scales, *how)
        else:
            results = lorsum(lefts, rights, sums, *how)
        assert_all_close(
            [to_numpy(result) for (result,) in results],
            [arrays[f"{prefix}{m}_after_{num_iterations}"] for m in "ab"],
            atol=2e-5,
        )


def make_oplora(name, settings):
    momentum = settings.get("momentum", 0.0)
    shared = {
        "learning_rate": settings["learning_rate"],
        "num_iterations": settings["lookahead_iters"],
        "proximal_weight": settings["lmbd"],
    }
    if "betas" not in settings:
        is_projected = name == "oplora_projected_momentum"
        return OPLoRA(
            momentum=momentum, projected_momentum=is_projected, **shared
        )
    beta_1, beta_2 = settings["betas"]
    if settings["lookahead_iters"] == 0:
        # There their momentum stays 0, and G weighs as it would beside one.
        shared["learning_rate"] *= 1 - beta_1
        shared["proximal_weight"] /= 1 - beta_1
        beta_1 = 0.0
    return OPLoRA(
        scaled=True,
        beta_1=beta_1,
        beta_2=beta_2,
        damping=settings["damping"],
        **shared,
    )


# Those with all the state there is.
RESUMED = ["oplora_scaled_1_iteration", "oplora_projected_momentum"]


@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
@pytest.mark.parametrize(
    "name",
    [
        "oplora_1_iteration",
        "oplora_2_iterations",
        "oplora_momentum",
        "oplora_scaled",
        *RESUMED,
    ],
)
def test_oplora_of_the_reference(name, jit_compile, tmp_path):
    arrays, settings = load_reference(name)
    is_scaled = "betas" in settings
    config = keras_fvae.OPLoRAConfig(3, mean_squares=is_scaled)
    layer = keras_fvae.AdaptedDense(10, config)
    model = keras.Sequential([keras.Input((5, 12)), layer])
    for variable, key in (
        (layer.kernel, "kernel"),
        (layer.bias, "bias"),
        (layer.adapter.kernel_a, "initial_lora_a"),
        (layer.adapter.kernel_b, "initial_lora_b"),
    ):
        variable.assign(arrays[key])
    optimizer = make_oplora(name, settings)
    optimizer.build(model.trainable_variables)
    if "initial_momentum_a" in arrays and optimizer.momentums_a:
        optimizer.momentums_a[0].assign(arrays["initial_momentum_a"])
    model.compile(optimizer, half_squared_error, jit_compile=jit_compile)
    for i in range(3):
        if i == 2 and name in RESUMED:
            model.save(tmp_path / "model.keras")
            model = keras.saving.load_model(tmp_path / "model.keras")
            [layer], optimizer = model.layers, model.optimizer
        model.fit(arrays["x"], arrays["target"], batch_size=2, verbose=0)
        assert_all_close(
            values_of([layer.adapter.kernel_a, layer.adapter.kernel_b]),
            [arrays["steps_lora_a"][i], arrays["steps_lora_b"][i]],
            atol=2e-5,
        )
        if is_scaled:
            assert_all_close(
                values_of(optimizer.metrics),
                [arrays["steps_metric_in"][i], arrays["steps_metric_out"][i]],
            )
        weights = layer.adapter.trainable_weights
        assert not any(value.any() for value in values_of(weights[2:]))


@keras.saving.register_keras_serializable("optimizers_test")
def half_squared_error(y_true, y_pred):
    return ops.sum(ops.square(y_pred - y_true), -1) / 2


# --- What must be equal.


@pytest.mark.one_backend
def test_experts_are_pairs_by_themselves(rng):
    for kind in ("Riemannian", "LoRA-RITE"):
        experts = random_factors(rng, (2, 6, 2), (2, 2, 5))
        kernel_a, kernel_b, _ = values_of(experts.trainable_variables)
        pairs = [
            Factors(
                f"expert_{i}",
                kernel_a=kernel_a[i],
                kernel_b=kernel_b[i],
            )
            for i in range(2)
        ]
        variables = [v for pair in pairs for v in pair.trainable_variables]
        settings = {"escaped_mass": True} if kind == "LoRA-RITE" else {}
        step = make_step(make_optimizer(kind, **settings), variables)
        step_experts = make_step(
            make_optimizer(kind, **settings), experts.trainable_variables
        )
        for _ in range(2):
            # Of one expert, A is above the threshold.
            of_a = rng.normal(size=(2, 6, 2)) * [[[0.1]], [[30.0]]]
            of_b = rng.normal(size=(2, 2, 5)) * 0.1
            kernel_a, kernel_b, _ = step_experts([of_a, of_b, np.zeros(3)])
            values = step([of_a[0], of_b[0], of_a[1], of_b[1]])
            assert_all_close(
                values, [kernel_a[0], kernel_b[0], kernel_a[1], kernel_b[1]]
            )


@pytest.mark.one_backend
def test_lora_rite_does_not_see_how_a_product_is_divided(rng):
    kernel_a, kernel_b = rng.normal(size=(6, 2)), rng.normal(size=(2, 5))
    divisor = np.array([[3.0, 1.0], [0.0, 0.2]])
    products = []
    for change in (np.eye(2), divisor):
        inverse = np.linalg.inv(change)
        variables = Factors(
            kernel_a=kernel_a @ change, kernel_b=inverse @ kernel_b
        ).trainable_variables
        step = make_step(LoRARITE(0.05, skip_threshold=None), variables)
        for seed in range(3):
            gradient = np.random.default_rng(seed).normal(size=(6, 5))
            a, b = (to_numpy(v).astype("float64") for v in variables)
            a, b = step([gradient @ b.T, a.T @ gradient])
        products.append(a @ b)
    assert np.abs(products[0] - kernel_a @ kernel_b).max() > 0.1
    np.testing.assert_allclose(products[1], products[0], atol=1e-4)


@pytest.mark.one_backend
def test_decay_is_of_the_weights_before_the_step(rng):
    factors = random_factors(rng)
    before = values_of(factors.trainable_variables)
    gradients = [0.1 * rng.normal(size=v.shape) for v in before]
    after = []
    for weight_decay in (None, 0.5):
        for variable, value in zip(factors.trainable_variables, before):
            variable.assign(value)
        optimizer = make_optimizer("LoRA-RITE", weight_decay=weight_decay)
        optimizer.exclude_from_weight_decay(var_names=["kernel_b"])
        after.append(
            make_step(optimizer, factors.trainable_variables)(gradients)
        )
    decay = 0.05 * 0.5 * before[0]
    assert_all_close(after[1], [after[0][0] - decay, *after[0][1:]])


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", KINDS)
def test_no_decay_of_what_is_excluded(kind, rng):
    """Also where it is the inner optimizer that decays."""
    factors = factors_for(kind, rng)
    variables = factors.trainable_variables
    others = [keras.Variable(np.ones(3), name=n) for n in ("one", "other")]
    inner = keras.optimizers.SGD(0.05, weight_decay=0.5)
    optimizer = (
        RiemannianPreconditioning(inner)
        if kind == "Riemannian"
        else {"LoRA-RITE": LoRARITE, "OPLoRA": OPLoRA}[kind](0.05, inner)
    )
    optimizer.exclude_from_weight_decay(var_list=others[:1])
    step = make_step(optimizer, [*variables, *others])
    after = step([np.zeros(v.shape) for v in [*variables, *others]])
    assert_all_close(after[-2:], [np.ones(3), np.full(3, 0.975)])


@pytest.mark.one_backend
def test_a_rank_above_the_width_is_told():
    """There the steps are decided by rounding."""
    for width, units, rank in ((6, 2, 3), (2, 6, 3), (6, 6, 3)):
        model = keras.Sequential(
            [keras.Input((width,)), keras.layers.Dense(units, name="query")]
        )
        keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(rank))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            LoRARITE().build(model.trainable_variables)
        told = [str(w.message) for w in caught]
        expected = min(width, units) < rank
        assert expected == any("a rank of 2 at most" in t for t in told), told


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.2}],
    ids=str,
)
def test_gradients_are_clipped_first(kind, settings, rng):
    factors = factors_for(kind, rng)
    variables = factors.trainable_variables
    before = values_of(variables)
    gradients = [rng.normal(size=value.shape) for value in before]
    if "clipvalue" in settings:
        clipped = [np.clip(g, -0.2, 0.2) for g in gradients]
    else:
        norms = [np.linalg.norm(g) for g in gradients]
        if "global_clipnorm" in settings:
            norms = [np.linalg.norm(norms)] * len(norms)
        clipped = [g * 0.5 / norm for g, norm in zip(gradients, norms)]
    expected = make_step(make_optimizer(kind), variables)(clipped)
    for variable, value in zip(variables, before):
        variable.assign(value)
    step = make_step(make_optimizer(kind, **settings), variables)
    assert_all_close(step(gradients), expected)


@pytest.mark.shared_out
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_a_larger_batch(kind, rng):
    factors = factors_for(kind, rng)
    variables = factors.trainable_variables
    before = values_of(variables)
    batches = [
        [0.1 * rng.normal(size=value.shape) for value in before]
        for _ in range(4)
    ]
    step = make_step(make_optimizer(kind, global_clipnorm=0.3), variables)
    for one, other in (batches[:2], batches[2:]):
        expected = step([(a + b) / 2 for a, b in zip(one, other)])
    for variable, value in zip(variables, before):
        variable.assign(value)
    optimizer = make_optimizer(
        kind, global_clipnorm=0.3, gradient_accumulation_steps=2
    )
    step = make_step(optimizer, variables)
    assert_all_close(step(batches[0]), before, atol=0)
    for batch in batches[1:]:
        after = step(batch)
    assert_all_close(after, expected)
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_gradients(kind, rng):
    factors = factors_for(kind, rng)
    variables = factors.trainable_variables
    before = values_of(variables)
    gradients = [0.1 * rng.normal(size=value.shape) for value in before]
    expected = make_step(make_optimizer(kind), variables)(gradients)
    for variable, value in zip(variables, before):
        variable.assign(value)
    scaled = keras.optimizers.LossScaleOptimizer(make_optimizer(kind), 4.0)
    step = make_step(scaled, variables)
    assert_all_close(step([np.inf * g for g in gradients]), before, atol=0)
    assert_all_close(step([2 * g for g in gradients]), expected)


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", KINDS)
def test_moving_averages(kind, rng):
    variables = factors_for(kind, rng).trainable_variables
    average = {"use_ema": True, "ema_momentum": 0.7}
    if kind == "Riemannian":
        optimizer = RiemannianPreconditioning(
            keras.optimizers.SGD(0.1, **average)
        )
    else:
        optimizer = make_optimizer(kind, **average)
    step = make_step(optimizer, variables)
    averages = None
    for _ in range(3):
        values = step([0.1 * rng.normal(size=v.shape) for v in variables])
        averages = averages or values
        averages = [0.7 * a + 0.3 * v for a, v in zip(averages, values)]
    optimizer.finalize_variable_values(variables)
    assert_all_close(values_of(variables), averages)


@pytest.mark.one_backend
def test_oplora_without_a_step_leaves_factors_as_they_are(rng):
    """Also where B is 0, as at the start of a warm-up."""
    kernel_a, gradient = rng.normal(size=(6, 2)), rng.normal(size=(6, 5))
    variables = Factors(
        kernel_a=kernel_a, kernel_b=np.zeros((2, 5)), zero_kernel=gradient * 0
    ).trainable_variables
    optimizer = OPLoRA(0.0)
    step = make_step(optimizer, variables)
    gradients = [np.zeros((6, 2)), kernel_a.T @ gradient, gradient]
    after = step(gradients)
    assert_all_close(after, [kernel_a, np.zeros((2, 5)), gradient * 0])
    optimizer.learning_rate = 0.1
    assert np.abs(step(gradients)[1]).max() > 0.01


@pytest.mark.one_backend
def test_oplora_without_iterations_is_riemannian_preconditioning(rng):
    kernel_a, kernel_b = rng.normal(size=(6, 2)), rng.normal(size=(2, 5))
    gradient = rng.normal(size=(6, 5))
    gradients = [gradient @ kernel_b.T, kernel_a.T @ gradient, gradient]
    results = []
    for optimizer in (
        OPLoRA(0.1, num_iterations=0),
        RiemannianPreconditioning(keras.optimizers.SGD(0.1), 1e-3),
    ):
        variables = Factors(
            kernel_a=kernel_a, kernel_b=kernel_b, zero_kernel=np.zeros((6, 5))
        ).trainable_variables
        results.append(make_step(optimizer, variables)(gradients)[:2])
    assert_all_close(*results, atol=1e-5)


@pytest.mark.one_backend
def test_oplora_comes_near_to_the_step_of_the_kernel(rng):
    """With a rank that is enough, it is that of gradient descent."""
    variables = Factors(
        kernel_a=rng.normal(size=(6, 5)),
        kernel_b=rng.normal(size=(5, 5)),
        zero_kernel=np.zeros((6, 5)),
    ).trainable_variables
    optimizer = OPLoRA(
        0.1, momentum=0.9, num_iterations=2, proximal_weight=1e-5
    )
    step = make_step(optimizer, variables)
    product = np.matmul(*values_of(variables[:2]))
    momentum = 0
    for _ in range(2):
        gradient = rng.normal(size=(6, 5))
        momentum = 0.9 * momentum + gradient
        product = product - 0.1 * momentum
        kernel_a, kernel_b, _ = step(
            [np.zeros((6, 5)), np.zeros((5, 5)), gradient]
        )
        np.testing.assert_allclose(kernel_a @ kernel_b, product, atol=5e-3)


@pytest.mark.one_backend
def test_oplora_bears_ranks_that_nothing_needs(rng):
    """Most directions of B and of the momentum are 0 up to rounding."""
    target = rng.normal(size=(64, 2)) @ rng.normal(size=(2, 48))
    kernel_a = rng.uniform(-0.1, 0.1, size=(64, 16))
    variables = Factors(
        kernel_a=kernel_a,
        kernel_b=np.zeros((16, 48)),
        zero_kernel=np.zeros((64, 48)),
    ).trainable_variables
    keras.utils.set_random_seed(0)
    step = make_step(OPLoRA(1e-3, momentum=0.9, num_iterations=2), variables)
    expected, momentum = np.zeros((64, 48)), 0
    product = expected
    for _ in range(300):
        gradients = [kernel_a * 0, np.zeros((16, 48)), 10 * (product - target)]
        kernel_a, kernel_b, _ = step(gradients)
        product = kernel_a @ kernel_b
        momentum = 0.9 * momentum + 10 * (expected - target)
        expected = expected - 1e-3 * momentum
    np.testing.assert_allclose(product, expected, atol=0.05)


@pytest.mark.one_backend
def test_an_optimizer_for_each_kind_of_weights(rng):
    """As the authors of MoE-LoRA train the gate: slowly, clipped by itself."""
    variables = random_factors(rng).trainable_variables
    before = values_of(variables)
    gradients = [rng.normal(size=value.shape) for value in before]
    expected = make_step(make_optimizer("Riemannian"), variables)(gradients)
    for variable, value in zip(variables, before):
        variable.assign(value)
    optimizers = keras.optimizers.OptimizerMap(
        make_optimizer("Riemannian"),
        {".*gate": keras.optimizers.SGD(0.01, clipnorm=1.0)},
    )
    step = make_step(keras.optimizers.MultiOptimizer(optimizers), variables)
    gate = before[2] - 0.01 * gradients[2] / np.linalg.norm(gradients[2])
    assert_all_close(step(gradients), [*expected[:2], gate])


# --- In `fit`.


# The references have the variants of OPLoRA in `fit` on each backend.
IN_FIT = [
    *KINDS,
    *(
        pytest.param(kind, marks=pytest.mark.one_backend)
        for kind in ("scaled OPLoRA", "projected OPLoRA")
    ),
]


def make_model(kind="LoRA", dtype=None):
    method = {
        "OPLoRA": "OPLoRA",
        "projected OPLoRA": "OPLoRA",
        "scaled OPLoRA": "OPLoRA with mean squares",
    }.get(kind, "LoRA")
    return family.adapt(family.make_model(dtype), method)


def fit(model, optimizer=None, epochs=2, callbacks=(), **options):
    if optimizer is not None:
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **options,
        )
    return model.fit(
        family.X, family.Y, batch_size=4, epochs=epochs, shuffle=False,
        verbose=0, callbacks=callbacks,
    ).history["loss"]  # fmt: skip


def make_for_fit(kind):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.5)
    adam = keras.optimizers.Adam(schedule)
    if kind == "Riemannian":
        return RiemannianPreconditioning(adam, global_clipnorm=1.0)
    if kind == "OPLoRA":
        return OPLoRA(schedule, adam, momentum=0.5, num_iterations=2)
    if kind == "projected OPLoRA":
        return OPLoRA(schedule, adam, momentum=0.5, projected_momentum=True)
    if kind == "scaled OPLoRA":
        schedule.initial_learning_rate = 0.5
        return OPLoRA(schedule, adam, scaled=True)
    return LoRARITE(schedule, adam, weight_decay=0.01)


@pytest.mark.parametrize("kind", IN_FIT)
@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_fit(kind, jit_compile):
    model = make_model(kind)
    frozen = family.frozen_bytes(model)
    losses = fit(model, make_for_fit(kind), 8, jit_compile=jit_compile)
    assert losses[-1] < 0.9 * losses[0]
    assert family.frozen_bytes(model) == frozen


@pytest.mark.shared_out
@pytest.mark.parametrize("kind", IN_FIT)
def test_fit_in_mixed_precision(kind):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model(kind)
    finally:
        keras.config.set_dtype_policy("float32")
    losses = fit(model, make_for_fit(kind), 8)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.shared_out
@pytest.mark.parametrize("kind", IN_FIT)
def test_saved_and_resumed(kind, tmp_path):
    whole = make_model(kind)
    expected = fit(whole, make_for_fit(kind), 4)

    model = make_model(kind)
    losses = fit(model, make_for_fit(kind), 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    losses += fit(loaded, epochs=2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(
        family.predict(loaded), family.predict(whole), atol=1e-5
    )

    losses = []
    for epochs in (2, 4):
        backup = keras.callbacks.BackupAndRestore(
            tmp_path / "backup", delete_checkpoint=False
        )
        losses += fit(make_model(kind), make_for_fit(kind), epochs, [backup])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def fit_scaled_oplora(
    batch_size=8, wrap=lambda optimizer: optimizer, **settings
):
    """All weights and metrics after two steps, each of the whole data."""
    keras.utils.set_random_seed(0)
    model = make_model("scaled OPLoRA")
    optimizer = OPLoRA(
        0.5, keras.optimizers.SGD(0.1), scaled=True, beta_2=0.5, **settings
    )
    model.compile(
        wrap(optimizer),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for _ in range(2):
        model.fit(
            family.X, family.Y, batch_size=batch_size, shuffle=False, verbose=0
        )
    return values_of([*model.trainable_variables, *optimizer.metrics])


@pytest.mark.one_backend
def test_mean_squares_are_those_of_the_whole_data_and_of_the_loss_itself():
    expected = fit_scaled_oplora()
    for settings in (
        {"batch_size": 4, "gradient_accumulation_steps": 2},
        {"wrap": lambda o: keras.optimizers.LossScaleOptimizer(o, 64.0)},
    ):
        assert_all_close(fit_scaled_oplora(**settings), expected, atol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_mean_squares_are_not_clipped(name):
    """Nor do they clip others: they are far above all gradients here."""
    expected = fit_scaled_oplora()
    assert max(metric.max() for metric in expected[-6:]) > 0.5
    assert_all_close(fit_scaled_oplora(**{name: 0.5}), expected, atol=0)


@pytest.mark.one_backend
def test_the_learning_rate_is_the_inner_one():
    optimizer = RiemannianPreconditioning(keras.optimizers.SGD(0.1))
    optimizer.learning_rate = 0.2
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.2)
    assert float(optimizer.learning_rate) == pytest.approx(0.2)


def fit_line(optimizer, loss, steps=12):
    """Fits one adapted layer, and returns its B."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="query")]
    )
    keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig(2, seed=1))
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model.compile(optimizer, loss)
    model.fit(x, x[:, :3], batch_size=16, epochs=steps, verbose=0)
    return to_numpy(model.layers[0].adapter.kernel_b)


def summed_error(y_true, y_pred):
    return 100 * ops.sum(ops.square(y_true - y_pred), axis=-1)


def test_a_stall_is_told():
    with pytest.warns(UserWarning, match="in the last 12 steps .* is a sum"):
        assert not fit_line(LoRARITE(0.05), summed_error).any()
    for optimizer, loss in (
        (LoRARITE(0.05), "mse"),
        (LoRARITE(0.05, skip_threshold=None), summed_error),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert fit_line(optimizer, loss).any()


@pytest.mark.one_backend
def test_a_stall_of_a_few_steps_is_told_and_one_that_ended_is_not(rng):
    optimizer = LoRARITE()
    variables = random_factors(rng).trainable_variables[:2]
    step = make_step(optimizer, variables)
    small = [np.zeros((6, 2)), np.zeros((2, 5))]
    large = [np.full((6, 2), 1e3), np.zeros((2, 5))]
    step(large)
    with pytest.warns(UserWarning, match="1 of 2 factors, .*/kernel_a'"):
        optimizer.finalize_variable_values(variables)
    step(small)
    for _ in range(3):
        step(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.finalize_variable_values(variables)


# --- Pairs, and what is refused.


@pytest.mark.one_backend
def test_what_is_beside_a_pair_is_of_the_same_adapter():
    """Also where another adapter has the same path."""

    def adapted(config):
        layer = keras_fvae.AdaptedDense(8, config, name="query")
        layer.build((None, 6))
        return layer.trainable_variables

    plain = adapted(keras_fvae.LoRAConfig(2))
    whole = adapted(keras_fvae.OPLoRAConfig(2))
    for variables, expected in (
        ([*plain, *whole], (None, 4)),
        ([*whole, *plain], (2, None)),
        ([*whole, *whole], (2, 5)),
    ):
        pairs = find_pairs(variables, "OPLoRA")
        assert find_beside("zero_kernel", variables, pairs) == expected


@pytest.mark.one_backend
def test_pairs_are_found_by_path(rng):
    # Two of the same path, as of models that were built by themselves; one
    # without an A that trains; one whose A has another rank.
    layers = [
        random_factors(rng),
        random_factors(rng),
        Factors("lone", kernel_b=np.ones((2, 3))),
        Factors("other", kernel_a=np.ones((4, 4)), kernel_b=np.ones((2, 3))),
    ]
    variables = [v for layer in layers for v in layer.trainable_variables]
    assert [v.path for v in variables[:2]] == [v.path for v in variables[3:5]]
    assert find_pairs(variables, "Optimizer") == ((0, 1), (3, 4))


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", KINDS)
def test_models_without_pairs(kind):
    model = family.make_model()
    optimizer = make_optimizer(kind)
    with pytest.raises(ValueError, match="`kernel_a` and `kernel_b`") as raised:
        fit(model, optimizer)
    assert "FFA-LoRA" not in str(raised.value)
    assert not optimizer.built
    for name in ("FFA-LoRA", "FVAE-LoRA"):
        model = family.adapt(family.make_model(), name)
        with pytest.raises(ValueError, match="/adapter/kernel_b', but"):
            fit(model, make_optimizer(kind))


@pytest.mark.one_backend
def test_oplora_needs_the_gradient_of_the_kernel(rng):
    with pytest.raises(ValueError, match="query/adapter' .*OPLoRAConfig"):
        fit(make_model(), make_optimizer("OPLoRA"))
    variables = factors_for("OPLoRA", rng).trainable_variables
    before = values_of(variables)
    optimizer = make_optimizer("OPLoRA")
    gradients = [ops.convert_to_tensor(value) for value in before[:3]]
    with (
        pytest.warns(UserWarning, match="Gradients do not exist"),
        pytest.raises(ValueError, match="zero_kernel'.*training=True"),
    ):
        optimizer.apply([*gradients, None], variables)
    assert_all_close(values_of(variables), before, atol=0)


@pytest.mark.one_backend
def test_scaled_oplora_needs_mean_squares_and_their_loss(rng):
    with pytest.raises(ValueError, match="query/adapter' .*mean_squares=True"):
        fit(make_model("OPLoRA"), make_for_fit("scaled OPLoRA"))
    model = make_model("scaled OPLoRA")
    variables = model.trainable_variables
    optimizer = make_for_fit("scaled OPLoRA")
    gradients = [
        None if "input_squares" in variable.path else ops.ones(variable.shape)
        for variable in variables
    ]
    before = values_of(variables)
    with (
        pytest.warns(UserWarning, match="Gradients do not exist"),
        pytest.raises(ValueError, match="input_squares'.*`model.losses`"),
    ):
        optimizer.apply(gradients, variables)
    assert_all_close(values_of(variables), before, atol=0)


@pytest.mark.one_backend
def test_other_weights_need_an_optimizer():
    with pytest.raises(ValueError, match="2 other .*'head/kernel'.*other_opti"):
        fit(make_model(), LoRARITE())
    with pytest.raises(ValueError, match="2 other .*'head/kernel'.*other_opti"):
        fit(make_model("OPLoRA"), OPLoRA(0.1))


def in_map(optimizer):
    return keras.optimizers.OptimizerMap(optimizer)


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make_inner, message",
    [
        (lambda sgd: 7, "7"),
        (lambda sgd: keras.optimizers.SGD, "SGD"),
        (lambda sgd: keras.optimizers.LossScaleOptimizer(sgd), "goes around"),
        (
            lambda sgd: keras.optimizers.MultiOptimizer(in_map(sgd)),
            "goes around",
        ),
        (lambda sgd: LoRARITE(), "knows nothing of pairs"),
        (
            lambda sgd: keras.optimizers.SGD(clipnorm=1.0),
            "`clipnorm`.*pass it to",
        ),
        (
            lambda sgd: keras.optimizers.SGD(gradient_accumulation_steps=2),
            "`gradient_accumulation_steps`.*pass it to",
        ),
    ],
)
def test_inner_optimizers_that_are_refused(kind, make_inner, message):
    inner = make_inner(keras.optimizers.SGD())
    with pytest.raises(ValueError, match=message):
        if kind == "Riemannian":
            RiemannianPreconditioning(inner)
        elif kind == "OPLoRA":
            OPLoRA(0.1, inner)
        else:
            LoRARITE(other_optimizer=inner)


@pytest.mark.always_one_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda: RiemannianPreconditioning(None),
        lambda: RiemannianPreconditioning("sgd", regularization=0),
        lambda: RiemannianPreconditioning("sgd", weight_decay=0.1),
        lambda: LoRARITE(beta_1=1.0),
        lambda: LoRARITE(beta_2=-0.1),
        lambda: LoRARITE(epsilon=None),
        lambda: LoRARITE(skip_threshold=0.0),
        lambda: LoRARITE(unmagnified_clipnorm="1"),
        lambda: LoRARITE(escaped_mass=0.5),
        lambda: LoRARITE(other_optimizer=keras.optimizers.SGD(use_ema=True)),
        lambda: OPLoRA(0.1, momentum=1.0),
        lambda: OPLoRA(0.1, num_iterations=-1),
        lambda: OPLoRA(0.1, num_iterations=1.5),
        lambda: OPLoRA(0.1, projected_momentum=True),
        lambda: OPLoRA(0.1, scaled=True, momentum=0.9),
        lambda: OPLoRA(0.1, scaled=True, beta_1=1.0),
        lambda: OPLoRA(0.1, scaled=True, beta_2=-0.1),
        lambda: OPLoRA(0.1, scaled=True, damping=0.0),
        lambda: OPLoRA(0.1, scaled="no"),
        lambda: OPLoRA(0.1, momentum=0.9, projected_momentum="no"),
        # What only the scaled variant has would do nothing.
        lambda: OPLoRA(0.1, beta_1=0.5),
        lambda: OPLoRA(0.1, damping=1e-3),
        lambda: OPLoRA(0.1, proximal_weight=0.0),
        lambda: OPLoRA(0.1, weight_decay=0.01),
    ],
)
def test_arguments_that_are_refused(make):
    with pytest.raises(ValueError, match="Received: "):
        make()
