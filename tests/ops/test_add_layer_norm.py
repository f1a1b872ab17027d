from __future__ import annotations

import pytest
import torch
from backends import each_backend
from cases import ADD_LAYER_NORM, TOLERANCES, AddLayerNormCase

from sparsenlp import native
from sparsenlp.ops import add_layer_norm

CASE = AddLayerNormCase((20,), 48)
RUNS_NATIVE = (torch.float32, torch.bfloat16)
GRADIENT_CASES = [
    AddLayerNormCase((2, 5), hidden, residual=residual, bias=residual, dtype=dtype)
    for dtype in RUNS_NATIVE
    for hidden in (17, 64)
    for residual in (True, False)
]


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("add_layer_norm", ADD_LAYER_NORM), indirect=["backend"])
def test_forward(case, backend):
    arguments, expected = case.arguments(), case.expected()
    poison(expected.numel())
    y = add_layer_norm(*arguments, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


@pytest.mark.parametrize(("backend", "case"), each_backend("add_layer_norm", GRADIENT_CASES), indirect=["backend"])
def test_gradients_match_float64(case, backend):
    def gradients(dtype, backend):
        *tensors, eps = case.arguments()
        inputs = [t.to(dtype, copy=True).requires_grad_() if t is not None else None for t in tensors]
        y = add_layer_norm(*inputs, eps, backend=backend)
        slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(dtype).view_as(y)
        return torch.autograd.grad((y * slope).sum(), [t for t in inputs if t is not None])

    for got, expected in zip(gradients(case.dtype, backend), gradients(torch.float64, "reference"), strict=True):
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), expected, **TOLERANCES["add_layer_norm_grad", case.dtype])


@pytest.mark.parametrize("hidden", [65, 768, 4096])
@pytest.mark.parametrize("offset", [1e3, -1e5])
def test_large_offsets_cost_no_accuracy(offset, hidden, needs_native):
    x = AddLayerNormCase((5,), hidden).arguments()[0] + offset
    weight = torch.ones(hidden)
    expected = torch.nn.functional.layer_norm(x.double(), (hidden,))
    for isa in native.kernels()["add_layer_norm.f32"]:
        with native.isa_cap(isa):
            y = add_layer_norm(x, None, weight, backend="native")
        torch.testing.assert_close(y.double(), expected, **CASE.tolerance)


def test_rows_without_variance_leave_the_bias(backend):
    bias = torch.arange(-3.0, 30.0)
    x = torch.tensor([[0.0], [0.1], [-1e6]]).expand(-1, 33)
    y = add_layer_norm(x, None, torch.ones(33), bias, backend=backend)
    torch.testing.assert_close(y, bias.expand(3, -1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(value, backend):
    x, *rest = CASE.arguments()
    expected = add_layer_norm(x, *rest, backend=backend)
    x[3, 47] = value
    y = add_layer_norm(x, *rest, backend=backend)
    assert bool(y[3].isnan().all())
    assert torch.equal(y[torch.arange(20) != 3], expected[torch.arange(20) != 3])


def test_default_backend_is_native_where_it_can_run(needs_native):
    y, named = (add_layer_norm(*CASE.arguments(), backend=backend) for backend in (None, "native"))
    assert torch.equal(y, named)
    double = AddLayerNormCase((3,), 8, dtype=torch.float64)
    assert add_layer_norm(*double.arguments()).dtype == torch.float64


@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_rows_do_not_depend_on_threads(dtype, needs_native):
    arguments = AddLayerNormCase((150,), 200, dtype=dtype).arguments()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = add_layer_norm(*arguments)
        torch.set_num_threads(3)
        three = add_layer_norm(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_strided_inputs(backend):
    x, residual, weight, bias, eps = CASE.arguments()
    expected = add_layer_norm(x, residual, weight, bias, eps, backend=backend)
    strided = [t.t().contiguous().t() for t in (x, residual)] + [torch.stack([t, t], 1)[:, 0] for t in (weight, bias)]
    torch.testing.assert_close(add_layer_norm(*strided, eps, backend=backend), expected)


@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_autocast_computes_in_the_dtype_of_the_weight(dtype, backend):
    x, residual, *rest = CASE.arguments()
    x, residual = x.to(dtype), residual.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = add_layer_norm(x, residual, *rest, backend=backend)
    assert torch.equal(y, add_layer_norm(x.float(), residual.float(), *rest, backend=backend))


@pytest.mark.parametrize(
    "case",
    [CASE, AddLayerNormCase((2, 3), 7, residual=False, bias=False), AddLayerNormCase((4,), 40, dtype=torch.bfloat16)],
    ids=str,
)
def test_opcheck(case):
    *tensors, eps = case.arguments()
    inputs = (*(t.requires_grad_() if t is not None else None for t in tensors), eps)
    torch.library.opcheck(torch.ops.sparsenlp.add_layer_norm.default, inputs)


def test_compile_fullgraph():
    x, *rest = CASE.arguments()

    def f(x):
        return torch.relu(add_layer_norm(x * 2, *rest)).sum()

    x.requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"expected a floating x \(..., H\), got torch.float32 of shape \(\)"),
        ({"x": torch.zeros(20, 48, dtype=torch.int64)}, ValueError, "expected a floating x .* got torch.int64"),
        ({"x": torch.zeros(20, 47)}, ValueError, r"expected residual of shape \(20, 47\), got \(20, 48\)"),
        ({"x": torch.zeros(20, 48, dtype=torch.float64)}, TypeError, "expected residual of dtype torch.float64"),
        ({"residual": torch.zeros(1, 48)}, ValueError, r"expected residual of shape \(20, 48\), got \(1, 48\)"),
        ({"residual": torch.zeros(20, 48, device="meta")}, ValueError, "expected residual on cpu, got meta"),
        ({"weight": torch.zeros(47)}, ValueError, r"expected weight of shape \(48,\), got \(47,\)"),
        ({"weight": torch.zeros(48).bfloat16()}, TypeError, "expected weight of dtype torch.float32"),
        ({"bias": torch.zeros(1, 48)}, ValueError, r"expected bias of shape \(48,\), got \(1, 48\)"),
        ({"bias": torch.zeros(48).double()}, TypeError, "expected bias of dtype torch.float32, got torch.float64"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors(change, error, message):
    names = ("x", "residual", "weight", "bias", "eps")
    with pytest.raises(error, match=f"add_layer_norm: {message}"):
        add_layer_norm(**dict(zip(names, CASE.arguments(), strict=True)) | change)


def test_native_backend_runs_or_raises(needs_native, monkeypatch):
    half = AddLayerNormCase((2,), 8, dtype=torch.float16).arguments()
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch.float16"):
        add_layer_norm(*half, backend="native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        add_layer_norm(*CASE.arguments(), backend="native")


@pytest.mark.parametrize(
    ("index", "replacement"),
    [
        (0, torch.zeros(())),
        (0, torch.zeros(20, 48, dtype=torch.float64)),
        (0, torch.zeros(20, 47)),
        (1, torch.zeros(20, 47)),
        (1, torch.zeros(20, 48, dtype=torch.bfloat16)),
        (2, torch.zeros(47)),
        (2, torch.zeros(1, 48)),
        (2, torch.zeros(48, dtype=torch.float64)),
        (3, torch.zeros(49)),
        (3, torch.zeros(48, dtype=torch.bfloat16)),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(index, replacement, needs_native):
    arguments = [*CASE.arguments()]
    arguments[index] = replacement
    with pytest.raises(RuntimeError, match="add_layer_norm: expected"):
        torch.ops.sparsenlp.add_layer_norm(*arguments)
