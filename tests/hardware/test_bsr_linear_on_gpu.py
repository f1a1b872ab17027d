"""bsr_linear and its gradients on a GPU against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import TOLERANCES, BsrLinearCase
from on_gpu import assert_close, on_gpu, poison
from torch import Tensor

from sparsenlp.ops import bsr_linear
from sparsenlp.ops.bsr_linear import bsr_linear_add_

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = [(dtype, int8) for dtype in FLOATS for int8 in (False, True)]
CASE = BsrLinearCase((40,), 96, 128, (32, 32), dtype=torch.float16)
FORWARD = [
    *(
        BsrLinearCase((tokens,), 5 * n, 13 * k, (n, k), activation=activation, residual=residual, dtype=d, int8=int8)
        for tokens, activation, residual in ((1, "none", False), (7, "relu", True), (130, "gelu", False))
        for d, int8 in DTYPES
        for n, k in ((8, 4 if int8 else 1), (16, 16), (64, 64))
    ),
    *(BsrLinearCase((20,), 5 * n, 13 * k, (n, k), dtype=torch.float16) for n, k in ((3, 5), (12, 4), (128, 32))),
    *(replace(CASE, density=density) for density in (0.0, 1.0)),
    *(replace(CASE, tokens=tokens) for tokens in ((), (0,), (2, 3, 5))),
    *(replace(CASE, rows=512, empty_rows=True, bias=False, dtype=dtype) for dtype in FLOATS),
    *(replace(CASE, rows=1024, columns=1024, uneven=True, tokens=(tokens,)) for tokens in (1, 300)),
    replace(CASE, activation="gelu_tanh"),
]
GRADIENTS = [
    BsrLinearCase((tokens,), 5 * n, 13 * k, (n, k), activation=activation, dtype=dtype)
    for tokens, activation in ((3, "none"), (70, "gelu"))
    for dtype in FLOATS
    for n, k in ((8, 1), (16, 16), (64, 64))
]


def check_forward(case: BsrLinearCase) -> None:
    expected = case.expected()
    x, weight, bias, residual = on_gpu(case.x(), case.weight(), case.bias_vector(), case.residual_tensor())
    poison(expected)
    y = bsr_linear(x, weight, bias, case.activation, residual, backend="triton")
    assert y.dtype == case.dtype
    assert_close(y, expected, case.tolerance)


def gradients(case: BsrLinearCase, dtype: torch.dtype, backend: str) -> list[Tensor]:
    weight = case.weight().to(dtype)
    tensors = [case.x().to(dtype), weight.values, case.bias_vector().to(dtype)]
    if backend == "triton":
        weight, *tensors = on_gpu(weight, *tensors)
    x, values, bias = leaves = [t.detach().requires_grad_() for t in tensors]
    y = bsr_linear(x, replace(weight, values=values), bias, case.activation, backend=backend)
    slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(y).view_as(y)
    poison(*leaves) if backend == "triton" else None
    return list(torch.autograd.grad((y * slope).sum(), leaves))


def check_gradients(case: BsrLinearCase) -> None:
    got, expected = gradients(case, case.dtype, "triton"), gradients(case, torch.float64, "reference")
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == case.dtype
        assert_close(a, b, TOLERANCES["bsr_linear_wgrad", case.dtype])


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case):
    check_forward(case)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(case):
    check_gradients(case)


@pytest.mark.sanitizer
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("block", [(8, 1), (32, 32)])
def test_small(tokens, block):
    case = replace(CASE, tokens=(tokens,), rows=64, columns=64, block=block)
    check_forward(case)
    check_gradients(case)


@pytest.mark.parametrize("case", [CASE, replace(CASE, int8=True)], ids=str)
def test_in_place(case):
    case = replace(case, residual=True, activation="gelu")
    x, weight, bias, y = on_gpu(case.x(), case.weight(), case.bias_vector(), case.residual_tensor())
    assert bsr_linear_add_(y, x, weight, bias, case.activation) is y
    assert_close(y, case.expected(), case.tolerance)


def test_triton_is_the_default():
    x, weight = on_gpu(CASE.x(), CASE.weight())
    assert torch.equal(bsr_linear(x, weight), bsr_linear(x, weight, backend="triton"))


def test_opcheck():
    x, weight, bias = on_gpu(CASE.x(), CASE.weight(), CASE.bias_vector())
    pattern = weight.crow_indices, weight.col_indices
    leaves = [t.requires_grad_() for t in (x, weight.values, bias)]
    torch.library.opcheck(
        torch.ops.sparsenlp.bsr_linear.default, (leaves[0], *pattern, *leaves[1:], "gelu"), rtol=1e-2, atol=1e-2
    )
    grad, values = torch.randn_like(bsr_linear(x.detach(), weight)).detach(), weight.values.detach()
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear_dgrad.default, (grad, *pattern, values, CASE.columns))
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear_wgrad.default, (grad, x.detach(), *pattern, list(CASE.block)))


def test_compile_with_inductor():
    case = replace(CASE, dtype=torch.float32)
    x, weight, bias = on_gpu(case.x(), case.weight(), case.bias_vector())

    def f(x):
        return torch.relu(bsr_linear(x * 2, weight, bias, "gelu")) + 1

    leaf = x.requires_grad_()
    got, expected = torch.compile(f, fullgraph=True)(leaf), f(leaf)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaf)[0] for y in (got, expected)))
