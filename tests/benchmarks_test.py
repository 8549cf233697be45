"""The benchmark runs, and what it counts is what is computed."""

import json
import subprocess
import sys

import pytest
from helpers import BACKEND
from helpers import ROOT
from keras import ops

import keras_fvae
from benchmarks import arithmetic
from benchmarks import xla_gpu
from benchmarks.measure import with_callback
from benchmarks.models import Size
from benchmarks.models import is_convolution
from benchmarks.models import is_pointwise
from benchmarks.models import make_adapted
from benchmarks.models import targets
from keras_fvae.model.lookup import adapted_layers

RANK, NUM_TOKENS = 4, 30
# What PyTorch multiplies each input by for the gradient of the reconstruction,
# beside what is counted: the units of the decoder's last hidden layer.
ERRORS_ONCE_MORE = 128
SMALL = Size("vit", 64, 2, 2, 32)
SMALL_RESNETS = [
    Size("resnet", 64, 1, 2, 32, is_target)
    for is_target in (is_convolution, is_pointwise)
]


@pytest.mark.one_backend
def test_what_inference_takes_is_what_it_keeps():
    task, _, _ = make_adapted(SMALL, "FVAE-LoRA", RANK)
    layers = adapted_layers(task)
    assert len(layers) == len(targets(task, SMALL)) == 4
    for layer in layers:
        width, units = arithmetic.width_and_units(layer)
        counted = arithmetic.inference("FVAE-LoRA", width, units, RANK)
        # The biases of the hidden layer and of the mean.
        biases = arithmetic.HIDDEN_BY_RANK * RANK + RANK
        kept = layer.adapter.num_inference_parameters - biases
        assert counted == kept


counts_on_torch = pytest.mark.skipif(
    BACKEND != "torch", reason="PyTorch counts what it does"
)


def count_products():
    """PyTorch's counter, which knows no product that is added in place."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def count_addmm(sums, rows, kernel, **options):
        return 2 * rows[0] * rows[1] * kernel[1]

    mapping = {torch.ops.aten.addmm_: count_addmm}
    return FlopCounterMode(display=False, custom_mapping=mapping)


@counts_on_torch
@pytest.mark.parametrize(
    "method",
    [
        "FVAE-LoRA",
        "LoRA on x",
        "LoRA",
        "rsLoRA",
        "FFA-LoRA",
        "PiSSA",
        "OLoRA",
        "HiRA",
        "SRLoRA",
        "AdaLoRA",
        "BeamLoRA",
        "DropLoRA",
        "MoE-LoRA",
        "Flat-LoRA",
    ],
)
def test_what_training_takes_is_counted(method):
    import torch

    task, _, _ = make_adapted(SMALL, method, RANK)
    layer = targets(task, SMALL)[0]
    width, units = arithmetic.width_and_units(layer)
    x = torch.randn(3, NUM_TOKENS // 3, width, requires_grad=True)
    with count_products() as counter:
        outputs = layer(x, training=True)
        (ops.sum(ops.square(outputs)) + sum(layer.losses)).backward()
    counted = 2 * width * units
    counted += arithmetic.training(method, width, units, RANK)
    if method in ("LoRA", "HiRA"):
        # B A and its gradients, once a step.
        counted += 3 * width * units * RANK / NUM_TOKENS
    if method == "FVAE-LoRA":
        counted += ERRORS_ONCE_MORE * width
    if method == "Flat-LoRA":
        # A B, for the norms of its columns.
        counted += width * units * RANK / NUM_TOKENS
    if method == "AdaLoRA":
        # A^T A and B B^T, and their gradients.
        counted += 3 * (width + units) * RANK**2 / NUM_TOKENS
    assert counter.get_total_flops() / 2 / NUM_TOKENS == pytest.approx(counted)


@pytest.mark.one_backend
def test_steps_are_timed_with_what_a_method_trains_with():
    task, x, y = make_adapted(SMALL, "AdaLoRA", RANK)
    step = with_callback(task, "AdaLoRA", rounds=8)
    for _ in range(10):
        step(x, y)
    ranks = [layer.adapter.num_ranks for layer in adapted_layers(task)]
    assert sum(ranks) < len(ranks) * RANK


@counts_on_torch
@pytest.mark.parametrize("size", SMALL_RESNETS)
def test_a_resnet_is_counted(size):
    task, x, _ = make_adapted(size, "base", RANK)
    with count_products() as counter:
        task.backbone(x)
    counted = size.batch_size * arithmetic.frozen(task, size)
    assert counter.get_total_flops() / 2 == counted


@counts_on_torch
@pytest.mark.parametrize(
    "size, method",
    [
        *((size, "LoRA") for size in SMALL_RESNETS),
        *((size, "LoRA on x") for size in SMALL_RESNETS),
        (SMALL_RESNETS[1], "FVAE-LoRA"),
    ],
)
def test_what_training_convolutions_takes_is_counted(size, method):
    import torch

    task, _, _ = make_adapted(size, method, RANK)
    layers = targets(task, size)
    assert len(layers) == (9 if size.is_target is is_convolution else 6)
    for layer in layers:
        width, units = arithmetic.width_and_units(layer)
        shape = size.batch_size, *layer.input.shape[1:]
        x = torch.randn(shape, requires_grad=True)
        with count_products() as counter:
            outputs = layer(x, training=True)
            (ops.sum(ops.square(outputs)) + sum(layer.losses)).backward()
        counted = 2 * width * units
        counted += arithmetic.training(method, width, units, RANK)
        if method == "FVAE-LoRA":
            counted += ERRORS_ONCE_MORE * width
        counted *= size.batch_size * arithmetic.num_tokens(layer)
        if method == "LoRA":
            # B A and its gradients, once a step.
            counted += 3 * width * units * RANK
        assert counter.get_total_flops() / 2 == pytest.approx(counted)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="It is JAX that compiles")
def test_what_xla_lays_out_for_a_step():
    import jax

    def laid_out(method):
        return xla_gpu.figures(
            xla_gpu.compile_step(
                "tiny", method, "float32", RANK, jax.devices()[0]
            )
        )

    base, adapted = map(laid_out, ("base", "FVAE-LoRA"))
    assert 0 < base["peak"] < adapted["peak"] < 1
    assert 0 < base["kernels"] < adapted["kernels"]


@pytest.mark.skipif(BACKEND != "torch", reason="PEFT has PyTorch alone")
def test_the_blocks_are_those_that_peft_adapts():
    """Of the same weights and the same products, without PEFT itself."""
    from benchmarks import keras_blocks

    config = keras_fvae.LoRAConfig(keras_blocks.RANK)
    model = keras_blocks.make(config)
    layers = adapted_layers(model)
    assert len(layers) == 2 * keras_blocks.NUM_BLOCKS
    width = keras_blocks.WIDTH
    # Four projections and an MLP of four times the width; two norms.
    weights = 12 * width**2 + 9 * width + 4 * width
    thin = 2 * 2 * width * keras_blocks.RANK
    counted = keras_blocks.NUM_BLOCKS * (weights + thin)
    assert model.count_params() == counted


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="it starts all backends itself")
def test_the_benchmark_runs(tmp_path):
    result = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.bench", "--quick",
            "--backends", "torch", "--rounds", "2", "--output", tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    assert "fall short of what they are to reach" in result.stdout
    (results,) = json.loads((tmp_path / "bench.json").read_text()).values()
    methods = results["sizes"]["tiny"]
    assert len(methods["FVAE-LoRA"]["train"]) == 2
    assert len(methods["merged"]["predict"]) == 2
    assert len(results["sizes"]["tiny ResNet"]["FVAE-LoRA"]["train"]) == 2
    for method in ("LoRA", "FVAE-LoRA", "rematerialized"):
        assert 0 < methods[method]["arrays"] < 100 < methods[method]["peak"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000
