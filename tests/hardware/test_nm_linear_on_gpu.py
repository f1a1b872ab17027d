"""nm_linear in 2:4 and its gradients on a GPU against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import TOLERANCES, NMLinearCase
from on_gpu import assert_close, on_gpu, poison
from torch import Tensor

from sparsenlp import native_cuda
from sparsenlp.ops import nm_linear
from sparsenlp.ops.nm_linear import pack

pytestmark = pytest.mark.skipif(not native_cuda.available, reason=native_cuda.why_unavailable or "available")

HALVES = (torch.float16, torch.bfloat16)
CASE = NMLinearCase((20,), 40, 64, dtype=torch.float16)
FORWARD = [
    *(
        NMLinearCase((tokens,), 200, 352, dtype=dtype, int8=int8, activation=activation, residual=tokens == 17)
        for tokens, activation in (
            (1, "none"),
            (8, "gelu"),
            (9, "none"),
            (17, "relu"),
            (64, "none"),
            (200, "gelu_tanh"),
        )
        for dtype, int8 in (*((d, i) for d in HALVES for i in (False, True)), (torch.float32, True))
    ),
    *(NMLinearCase((tokens,), 129, 16, dtype=dtype) for tokens in (1, 130) for dtype in HALVES),
    *(replace(CASE, tokens=tokens, bias=False) for tokens in ((), (0,), (2, 3, 5))),
    NMLinearCase((300,), 1024, 1024, dtype=torch.bfloat16),
]
GRADIENTS = [
    NMLinearCase((tokens,), 40, 48, activation=activation, dtype=dtype)
    for tokens, activation in ((3, "none"), (40, "gelu"))
    for dtype in HALVES
]


def check_forward(case: NMLinearCase) -> None:
    expected = case.expected()
    x, weight, bias, residual = on_gpu(case.x(), case.weight(), case.bias_vector(), case.residual_tensor())
    poison(expected)
    y = nm_linear(x, weight, bias, case.activation, residual, backend="cuda")
    assert y.dtype == case.dtype
    assert_close(y, expected, case.tolerance)


def gradients(case: NMLinearCase, dtype: torch.dtype, backend: str) -> list[Tensor]:
    weight = case.weight().to(dtype)
    tensors = [case.x().to(dtype), weight.values, case.bias_vector().to(dtype)]
    if backend == "cuda":
        weight, *tensors = on_gpu(weight, *tensors)
    x, values, bias = leaves = [t.detach().requires_grad_() for t in tensors]
    y = nm_linear(x, replace(weight, values=values), bias, case.activation, backend=backend)
    slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(y).view_as(y)
    return list(torch.autograd.grad((y * slope).sum(), leaves))


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case):
    check_forward(case)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(case):
    got, expected = gradients(case, case.dtype, "cuda"), gradients(case, torch.float64, "reference")
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == case.dtype
        assert_close(a, b, TOLERANCES["nm_linear_wgrad", case.dtype])


@pytest.mark.sanitizer
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [3, 20, 70])
def test_small(tokens, int8):
    check_forward(replace(CASE, tokens=(tokens,), int8=int8))


def test_opcheck():
    x, weight, bias = on_gpu(CASE.x(), CASE.weight(), CASE.bias_vector())
    packed = pack(weight.indices, weight.pattern)
    x, values, bias = (t.requires_grad_() for t in (x, weight.values, bias))
    arguments = (x, values, weight.indices, packed, list(CASE.pattern), bias, "gelu", None)
    torch.library.opcheck(torch.ops.sparsenlp.nm_linear.default, arguments, rtol=1e-2, atol=1e-2)


def test_compile_with_inductor():
    x, weight, bias = on_gpu(CASE.x(), CASE.weight(), CASE.bias_vector())

    def f(x):
        return torch.relu(nm_linear(x * 2, weight, bias, "gelu")) + 1

    leaf = x.requires_grad_()
    got, expected = torch.compile(f, fullgraph=True)(leaf), f(leaf)
    torch.testing.assert_close(got, expected, **CASE.tolerance)
    grads = (torch.autograd.grad(y.sum(), leaf)[0] for y in (got, expected))
    torch.testing.assert_close(*grads, **TOLERANCES["nm_linear_wgrad", CASE.dtype])
