import numpy as np
import pytest
from helpers import BACKEND
from helpers import to_numpy
from keras import ops

from keras_fvae.layers.contraction import analyze_equation

CASES = [
    ("ab,bc->ac", (3, 4), (4, 5)),
    ("abc,cde->abde", (2, 3, 4), (4, 5, 6)),
    ("bqm,muh->bquh", (2, 3, 4), (4, 2, 5)),
    ("btd,ndh->btnh", (2, 3, 4), (2, 4, 5)),
    ("btnh,nhd->btd", (2, 3, 4, 5), (4, 5, 6)),
    ("bntd,ndh->bth", (2, 3, 4, 5), (3, 5, 6)),
    ("abc,cde->aebd", (2, 3, 4), (4, 5, 6)),
    ("...x,xy->...y", (2, 3, 4), (4, 5)),
    ("...x,xy->...y", (3, 4), (4, 5)),
    ("ab...,bc->ac...", (2, 3, 4, 5), (3, 6)),
    ("abc,c->ab", (2, 3, 4), (4,)),
]


@pytest.fixture(params=[False, True] if BACKEND == "torch" else [None])
def with_gradients(request):
    """Whether PyTorch records gradients: it does not while a model predicts."""
    if BACKEND == "torch":
        import torch

        with torch.set_grad_enabled(request.param):
            yield
    else:
        yield


@pytest.mark.parametrize("equation, input_shape, kernel_shape", CASES)
def test_a_map_of_tokens_is_the_einsum(
    equation, input_shape, kernel_shape, rng
):
    x, kernel = rng.normal(size=input_shape), rng.normal(size=kernel_shape)
    contraction = analyze_equation(equation, len(input_shape))
    width, units = (
        contraction.width(kernel_shape),
        contraction.units(kernel_shape),
    )
    matrix = kernel.transpose(
        contraction.kernel_contracted_axes + contraction.kernel_carried_axes
    ).reshape(width, units)
    rows = to_numpy(contraction.to_tokens(x, kernel_shape))
    outputs = contraction.from_tokens(rows @ matrix, x, kernel_shape)
    np.testing.assert_allclose(
        to_numpy(outputs), np.einsum(equation, x, kernel), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("equation, input_shape, kernel_shape", CASES)
def test_a_product_is_added_to_the_outputs(
    equation, input_shape, kernel_shape, rng, with_gradients
):
    x = rng.normal(size=input_shape).astype("float32")
    contraction = analyze_equation(equation, len(input_shape))
    token_shape = contraction.token_shape(x)
    tokens = rng.normal(size=(*token_shape, 3)).astype("float32")
    matrix = rng.normal(size=(3, contraction.units(kernel_shape)))
    matrix = matrix.astype("float32")
    shape = np.einsum(equation, x, np.ones(kernel_shape)).shape
    before = rng.normal(size=shape).astype("float32")

    outputs = contraction.add_product(
        ops.array(before),
        *map(ops.convert_to_tensor, (tokens, matrix, x)),
        kernel_shape,
    )
    product = contraction.from_tokens(tokens @ matrix, x, kernel_shape)
    np.testing.assert_allclose(
        to_numpy(outputs), before + to_numpy(product), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "equation, num_leading",
    [
        ("abc,cde->abde", 2),
        ("btnh,nhd->btd", 2),
        ("ab,bc->ac", 1),
        ("bntd,ndh->bth", 1),
    ],
)
def test_leading_token_axes(equation, num_leading):
    rank = len(equation.split(",")[0])
    contraction = analyze_equation(equation, rank)
    assert contraction.num_leading_token_axes == num_leading


@pytest.mark.parametrize(
    "equation",
    [
        "ebd,edf->ebf",  # An axis of the kernel that is in both.
        "abc,cd->ad",  # An axis of the input that is summed away.
        "aab,bc->aac",
    ],
)
def test_other_equations_are_refused(equation):
    with pytest.raises(ValueError, match=f"equation '{equation}'"):
        analyze_equation(equation, 3)
