from __future__ import annotations

import math
import threading

import pytest
import torch
from backends import NATIVE_ISAS, each_backend
from cases import BSR_LINEAR, TOLERANCES, BsrLinearCase

from sparsenlp import BlockSparse, native
from sparsenlp.ops import bsr_linear
from sparsenlp.ops.bsr_linear import bsr_linear_add_
from sparsenlp.reference import bsr_linear as reference

CASE = BsrLinearCase((20,), 64, 48, (8, 1))
GRADIENT_CASES = [
    *(
        BsrLinearCase(
            (tokens,), rows, columns, block, activation=activation, residual=True, empty_rows=True, dtype=dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (3, 40)
        for rows, columns, block in ((32, 24, (8, 1)), (48, 32, (16, 4)), (9, 10, (3, 5)))
        for activation in ("none", "gelu")
    ),
    *(BsrLinearCase((40,), 32, 24, (8, 1), activation=activation) for activation in ("relu", "gelu_tanh")),
    *(
        BsrLinearCase((40,), 3 * n, 5 * k, (n, k), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for n, k in ((1, 1), (4, 1), (2, 2), (8, 2), (64, 1), (1, 16), (8, 8), (16, 16), (4, 32))
    ),
]


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("bsr_linear", BSR_LINEAR), indirect=["backend"])
def test_forward(case, backend):
    x, weight, bias, residual, expected = (
        case.x(),
        case.weight(),
        case.bias_vector(),
        case.residual_tensor(),
        case.expected(),
    )
    poison(expected.numel())
    y = bsr_linear(x, weight, bias, case.activation, residual, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


def test_default_backend_is_native_where_it_can_run(needs_native):
    y, named = (bsr_linear(CASE.x(), CASE.weight(), backend=backend) for backend in (None, "native"))
    assert torch.equal(y, named)
    half = bsr_linear(CASE.x().bfloat16(), CASE.weight().to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(("backend", "case"), each_backend("bsr_linear", GRADIENT_CASES), indirect=["backend"])
def test_gradients_match_float64(case, backend):
    def gradients(dtype, backend):
        x, bias = case.x().to(dtype).requires_grad_(), case.bias_vector().to(dtype).requires_grad_()
        residual = case.residual_tensor()
        residual = residual.to(dtype).requires_grad_() if residual is not None else None
        weight = case.weight().to(dtype)
        values = weight.values.clone().requires_grad_()
        weight = BlockSparse(weight.crow_indices, weight.col_indices, values, weight.shape)
        y = bsr_linear(x, weight, bias, case.activation, residual, backend=backend)
        inputs = [t for t in (x, values, bias, residual) if t is not None]
        slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(dtype).view_as(y)
        return torch.autograd.grad((y * slope).sum(), inputs)

    got, expected = gradients(case.dtype, backend), gradients(torch.float64, "reference")
    for name, a, b in zip(("x", "values", "bias", "residual"), got, expected, strict=False):
        assert a.dtype == case.dtype
        torch.testing.assert_close(
            a.double(), b, **TOLERANCES["bsr_linear_wgrad", case.dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", NATIVE_ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 100])
def test_wgrad_and_dgrad(tokens, dtype, backend):
    weight = BsrLinearCase((1,), 48, 40, (8, 1), dtype=dtype).weight()
    grad, x = torch.randn(tokens, 48).to(dtype), torch.randn(tokens, 40).to(dtype)
    pattern = (weight.crow_indices, weight.col_indices)
    poison(weight.values.numel())
    got = torch.ops.sparsenlp.bsr_linear_wgrad(grad, x, *pattern, list(weight.block))
    expected = reference.bsr_linear_wgrad(grad.double(), x.double(), *pattern, weight.block)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES["bsr_linear_wgrad", torch.float32])
    poison(x.numel())
    got = torch.ops.sparsenlp.bsr_linear_dgrad(grad, *pattern, weight.values, 40)
    expected = reference.bsr_linear_dgrad(grad.double(), *pattern, weight.values.double(), 40)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES["bsr_linear_wgrad", dtype])


@pytest.mark.parametrize("case", [c for c in BSR_LINEAR if c.residual and c.tokens == (40,)], ids=str)
def test_add_in_place(case):
    weight, bias, y = case.weight(), case.bias_vector(), case.residual_tensor()
    expected = bsr_linear(case.x(), weight, bias, case.activation, y)
    assert bsr_linear_add_(y, case.x(), weight, bias, case.activation) is y
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(20, 63), r"expected a contiguous y of shape \(20, 64\)"),
        (torch.zeros(64, 20).t(), "expected a contiguous y"),
        (torch.zeros(20, 64, dtype=torch.float64), "and dtype torch.float32, got .* torch.float64"),
    ],
)
def test_add_in_place_errors(y, message):
    before = y.clone()
    with pytest.raises(ValueError, match=message):
        bsr_linear_add_(y, CASE.x(), CASE.weight())
    assert torch.equal(y, before)


INT8 = BsrLinearCase((20,), 64, 48, (8, 4), int8=True)


@pytest.mark.parametrize("tokens", [3, 20])
def test_static_input_scale(tokens, backend):
    weight, x = INT8.weight(), 3 * torch.randn(tokens, 48)
    scale = 0.02  # some of x is beyond 127 * 0.02, and saturates
    got = bsr_linear(x, weight, input_scale=scale, backend=backend)
    rounded = (x / scale).round().clamp(-127, 127) * scale
    torch.testing.assert_close(got.double(), rounded.double() @ weight.to_dense().double().t(), rtol=1e-4, atol=1e-4)


def test_int8_error_bound(backend):
    """The bound of the docstring, against the float weights that were quantized."""
    exact = BsrLinearCase((20,), 64, 48, (8, 4)).weight()
    weight, x = exact.quantize(), INT8.x()
    got, dense = bsr_linear(x, weight, backend=backend), exact.to_dense().double()
    s_x, s_w = x.abs().amax(1, keepdim=True).double() / 127, weight.scales.double()
    stored = (dense != 0).double()
    bound = s_x / 2 * dense.abs().sum(1) + s_w / 2 * (x.abs().double() @ stored.t()) + 48 * s_x * s_w / 4
    assert bool(((got - x.double() @ dense.t()).abs() <= bound * 1.0001).all())


@pytest.mark.parametrize("tokens", [1, 20])
def test_int8_sums_do_not_overflow_at_the_widest(tokens, needs_native):
    """K = 66308 columns, all at the extremes: sums reach 255 * 127 * K before the shift is taken off."""
    columns = 66308
    weight = BlockSparse.from_dense(torch.ones(8, columns), (8, 4)).quantize()
    for sign in (1.0, -1.0):
        y = bsr_linear(torch.full((tokens, columns), sign), weight, backend="native")
        torch.testing.assert_close(y, torch.full((tokens, 8), sign * columns))
    wide = BlockSparse.from_dense(torch.ones(8, columns + 4), (8, 4)).quantize()
    with pytest.raises(RuntimeError, match="expected at most 66311 columns of int8, got 66312"):
        bsr_linear(torch.ones(tokens, columns + 4), wide, backend="native")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_int8_does_not_hide_tokens_that_are_not_finite(value, backend):
    x = INT8.x()
    x[1, 5] = value
    y = bsr_linear(x, INT8.weight(), backend=backend)
    assert not y[1].isfinite().any()
    clean = torch.arange(20) != 1
    torch.testing.assert_close(y[clean], bsr_linear(INT8.x(), INT8.weight(), backend=backend)[clean])


def test_int8_is_for_inference():
    with pytest.raises(RuntimeError, match="expected no gradients with int8 weights"):
        bsr_linear(INT8.x().requires_grad_(), INT8.weight())


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


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        BsrLinearCase((2, 3), 32, 24, (4, 2), activation="gelu", bias=False, residual=True),
        BsrLinearCase((20,), 32, 24, (8, 2), dtype=torch.bfloat16, residual=True),
    ],
    ids=str,
)
def test_opcheck(case):
    weight, bias, residual = case.weight(), case.bias_vector(), case.residual_tensor()
    inputs = (
        case.x().requires_grad_(),
        weight.crow_indices,
        weight.col_indices,
        weight.values.requires_grad_(),
        bias.requires_grad_() if bias is not None else None,
        case.activation,
        residual.requires_grad_() if residual is not None else None,
    )
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear.default, inputs)
    grad, rows = torch.randn(6, case.rows).to(case.dtype), torch.randn(6, case.columns).to(case.dtype)
    pattern = (weight.crow_indices, weight.col_indices)
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear_wgrad.default, (grad, rows, *pattern, list(case.block)))
    values = weight.values.detach()
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear_dgrad.default, (grad, *pattern, values, case.columns))


@pytest.mark.parametrize("case", [CASE, INT8], ids=str)
def test_opcheck_in_place_and_int8(case):
    weight, bias = case.weight(), case.bias_vector()
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    y = torch.zeros(*case.tokens, case.rows)
    arguments = (y, case.x(), *tensors, bias, "relu", weight.scales)
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear_add_.default, arguments)
    arguments = (case.x(), *tensors, bias, "relu", None, weight.scales)
    torch.library.opcheck(torch.ops.sparsenlp.bsr_linear.default, arguments)


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
    weight, bias = CASE.weight(), CASE.bias_vector()

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
        ({"residual": torch.zeros(20, 63)}, ValueError, r"expected residual of shape \(20, 64\)"),
        ({"residual": torch.zeros(20, 64).double()}, ValueError, "expected residual .* got .* torch.float64"),
        ({"input_scale": 0.1}, ValueError, "positive, finite input_scale, with int8 weights, got 0.1"),
        ({"weight": INT8.weight(), "input_scale": 0.0}, ValueError, "positive, finite input_scale"),
        ({"weight": INT8.weight(), "input_scale": math.nan}, ValueError, "positive, finite input_scale"),
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, triton, reference, got 'cudnn'"),
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
        (3, torch.zeros(3, 8, 1)),
        (3, torch.zeros(0, 0, 1)),
        (4, torch.zeros(64, dtype=torch.float64)),
        (5, "swish"),
        (6, torch.zeros(20, 63)),
        (7, torch.ones(64)),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(index, replacement, needs_native):
    weight = CASE.weight()
    arguments = [
        CASE.x(),
        weight.crow_indices,
        weight.col_indices,
        weight.values,
        CASE.bias_vector(),
        "none",
        None,
        None,
    ]
    arguments[index] = replacement
    with pytest.raises(RuntimeError, match="bsr_linear"):
        torch.ops.sparsenlp.bsr_linear(*arguments)
