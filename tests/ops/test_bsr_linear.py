from __future__ import annotations

import threading

import pytest
import torch
from cases import BSR_LINEAR, TOLERANCES, BsrLinearCase

from sparsenlp import BlockSparse, native
from sparsenlp.ops import bsr_linear
from sparsenlp.reference import bsr_linear as reference

CASE = BsrLinearCase((20,), 64, 48, (8, 1))
GRADIENT_CASES = [
    BsrLinearCase((tokens,), rows, columns, block, activation=activation, empty_rows=True)
    for tokens in (3, 40)
    for rows, columns, block in (
        (32, 24, (8, 1)),
        (32, 20, (4, 1)),
        (16, 16, (2, 2)),
        (48, 32, (16, 4)),
        (9, 10, (3, 5)),
    )
    for activation in ("none", "relu", "gelu", "gelu_tanh")
]


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize("case", BSR_LINEAR, ids=str)
def test_forward(case, backend):
    if backend == "native" and case.dtype != torch.float32:
        with pytest.raises(RuntimeError, match="expected float32 on cpu"):
            bsr_linear(case.x(), case.weight(), backend="native")
        return
    x, weight, bias, expected = case.x(), case.weight().packed(), case.bias_vector(), case.expected()
    poison(expected.numel())
    y = bsr_linear(x, weight, bias, case.activation, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


def test_default_backend_is_native_where_it_can_run(needs_native):
    y, named = (bsr_linear(CASE.x(), CASE.weight(), backend=backend) for backend in (None, "native"))
    assert torch.equal(y, named)
    half = bsr_linear(CASE.x().bfloat16(), CASE.weight().to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_match_float64(case, backend):
    def gradients(dtype, backend):
        x, bias = case.x().to(dtype).requires_grad_(), case.bias_vector().to(dtype).requires_grad_()
        weight = case.weight().to(dtype)
        values = weight.values.clone().requires_grad_()
        weight = BlockSparse(weight.crow_indices, weight.col_indices, values, weight.shape)
        y = bsr_linear(x, weight, bias, case.activation, backend=backend)
        return torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum(), (x, values, bias)
        )

    got, expected = gradients(torch.float32, backend), gradients(torch.float64, "reference")
    for name, a, b in zip(("x", "values", "bias"), got, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b, **TOLERANCES["bsr_linear_wgrad", torch.float32], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 100])
def test_wgrad(tokens, backend):
    if backend == "reference":
        pytest.skip("it is the reference")
    weight = BsrLinearCase((1,), 48, 40, (8, 1)).weight()
    grad, x = torch.randn(tokens, 48), torch.randn(tokens, 40)
    pattern = (weight.crow_indices, weight.col_indices, list(weight.block))
    poison(weight.values.numel())
    got = torch.ops.sparsenlp.bsr_linear_wgrad(grad, x, *pattern)
    expected = reference.bsr_linear_wgrad(grad.double(), x.double(), *pattern)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES["bsr_linear_wgrad", torch.float32])


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_extreme_inputs(activation, needs_native):
    values = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 5.6, -5.6, 20.0, -20.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    )
    x = values[:, None]
    weight = BlockSparse.from_dense(torch.ones(8, 1), (8, 1))
    y = bsr_linear(x, weight, None, activation, backend="native")
    expected = bsr_linear(x.double(), weight.to(torch.float64), None, activation, backend="reference")
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("case", [CASE, BsrLinearCase((2, 3), 32, 24, (4, 2), activation="gelu", bias=False)], ids=str)
def test_opcheck(case):
    weight = case.weight()
    bias = case.bias_vector()
    inputs = (
        case.x().requires_grad_(),
        weight.crow_indices,
        weight.col_indices,
        weight.packed().values.requires_grad_(),
        bias.requires_grad_() if bias is not None else None,
        case.activation,
    )
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear.default, inputs)
    grad, rows = torch.randn(6, case.rows), torch.randn(6, case.columns)
    pattern = (weight.crow_indices, weight.col_indices, list(case.block))
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear_wgrad.default, (grad, rows, *pattern))


def test_rows_do_not_depend_on_batch_or_threads(needs_native):
    """Each token's result is its own, whatever shares the tile or the thread pool with it."""
    case = BsrLinearCase((150,), 128, 96, (8, 1))
    x, weight, bias = case.x(), case.weight(), case.bias_vector()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = bsr_linear(x, weight, bias, "gelu")
        torch.set_num_threads(2)
        two = bsr_linear(x, weight, bias, "gelu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(one[64:], bsr_linear(x[64:].contiguous(), weight, bias, "gelu"))


def test_many_python_threads(needs_native):
    case = BsrLinearCase((100,), 128, 96, (8, 1))
    x, weight, bias = case.x(), case.weight(), case.bias_vector()
    expected = bsr_linear(x, weight, bias)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(bsr_linear(x, weight, bias), expected):
                wrong.append(1)

    pool = [threading.Thread(target=work) for _ in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not wrong


def test_strided_inputs():
    weight, x = CASE.weight(), CASE.x()
    expected = bsr_linear(x, weight)
    torch.testing.assert_close(bsr_linear(x.t().contiguous().t(), weight), expected)
    wide = torch.stack([weight.values, weight.values], dim=3)[..., 0]
    strided = BlockSparse(weight.crow_indices, weight.col_indices, wide, weight.shape)
    torch.testing.assert_close(bsr_linear(x, strided), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_dtype_of_the_weight(dtype, backend):
    x, weight = CASE.x().to(dtype), CASE.weight()
    with torch.autocast("cpu", torch.bfloat16):
        y = bsr_linear(x, weight, backend=backend)
    assert torch.equal(y, bsr_linear(x.float(), weight, backend=backend))


@pytest.mark.parametrize("tokens", [1, 20])
def test_no_columns_leaves_the_bias(tokens, backend):
    weight, bias = BlockSparse.from_dense(torch.zeros(16, 0), (8, 1)), torch.arange(-8.0, 8.0)
    y = bsr_linear(torch.zeros(tokens, 0), weight, bias, "relu", backend=backend)
    assert torch.equal(y, bias.relu().expand(tokens, -1))


def test_compile_fullgraph():
    weight, bias = CASE.weight().packed(), CASE.bias_vector()

    def f(x):
        return torch.relu(bsr_linear(x * 2, weight, bias, "gelu")).sum()

    x = CASE.x().requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 47)}, ValueError, "expected K = 48 columns in x"),
        ({"x": torch.zeros(())}, ValueError, "expected K = 48 columns in x"),
        ({"x": torch.zeros(2, 48, dtype=torch.float64)}, TypeError, "expected x of dtype torch.float32"),
        ({"x": torch.zeros(2, 48, device="meta")}, ValueError, "expected x on cpu, got meta"),
        ({"bias": torch.zeros(63)}, ValueError, r"expected bias of shape \(64,\)"),
        ({"bias": torch.zeros(64, dtype=torch.float64)}, TypeError, "expected bias of dtype torch.float32"),
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": CASE.x(), "weight": CASE.weight(), "bias": CASE.bias_vector()} | change
    with pytest.raises(error, match=message):
        bsr_linear(**arguments)


def test_native_backend_without_extension(monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        bsr_linear(CASE.x(), CASE.weight(), backend="native")


@pytest.mark.parametrize(
    ("index", "replacement"),
    [
        (1, torch.zeros(9, dtype=torch.int64)),
        (1, torch.zeros(9, dtype=torch.int32)),
        (4, torch.zeros(3)),
        (0, torch.zeros(2, 48, dtype=torch.float64)),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(index, replacement, needs_native):
    weight = CASE.weight()
    arguments = [CASE.x(), weight.crow_indices, weight.col_indices, weight.values, CASE.bias_vector(), "none"]
    arguments[index] = replacement
    with pytest.raises(RuntimeError, match="bsr_linear"):
        torch.ops.sparsenlp.bsr_linear(*arguments)
