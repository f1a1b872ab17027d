from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from backends import each_backend
from cases import TOLERANCES
from conv_cases import GRADIENTS, SPARSE_CONV1D, ConvCase

from sparsenlp import BlockSparse, native
from sparsenlp.ops import bsr_linear, sparse_conv1d
from sparsenlp.ops.sparse_conv1d import windows

CASE = ConvCase(length=60, padding=(1, 1), activation="relu")
INT8 = replace(CASE, block=(8, 4), int8=True)


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("sparse_conv1d", SPARSE_CONV1D), indirect=["backend"])
def test_forward(case, backend):
    arguments, expected = case.arguments(), case.expected()
    poison(expected.numel())
    y = sparse_conv1d(**arguments, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


@pytest.mark.parametrize(("backend", "case"), each_backend("sparse_conv1d", GRADIENTS), indirect=["backend"])
def test_gradients_match_float64(case, backend):
    def gradients(dtype, backend):
        x, weight, bias = case.x().to(dtype).requires_grad_(), case.weight().to(dtype), case.bias_vector()
        leaves = [x, weight.values.requires_grad_()]
        if bias is not None:
            bias = bias.to(dtype).requires_grad_()
            leaves.append(bias)
        y = sparse_conv1d(x, weight, bias, case.activation, **case.window, backend=backend)
        slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(dtype).view_as(y)
        return torch.autograd.grad((y * slope).sum(), leaves)

    got, expected = gradients(case.dtype, backend), gradients(torch.float64, "reference")
    for name, a, b in zip(("x", "values", "bias"), got, expected, strict=False):
        assert a.dtype == case.dtype
        tolerance = TOLERANCES["bsr_linear_wgrad", case.dtype]
        torch.testing.assert_close(a.double(), b, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_windows_times_the_weight(backend):
    """The op is bsr_linear on windows of x, whatever stride and dilation are."""
    case = replace(CASE, stride=2, dilation=3)
    got = sparse_conv1d(**case.arguments(), backend=backend)
    rows = windows(case.x(), *case.window.values()).flatten(2)
    expected = bsr_linear(rows, case.weight(), case.bias_vector(), case.activation, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_outputs_do_not_depend_on_batch_or_threads(needs_native):
    """Each sequence's result is its own, however outputs are laid on lanes and threads."""
    case = replace(CASE, batch=9, channels=48, filters=64)
    arguments = case.arguments()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(sparse_conv1d(**arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = sparse_conv1d(**(arguments | {"x": arguments["x"][4:5].contiguous()}))
    assert torch.equal(results[0][4:5], alone)


def test_static_input_scale(backend):
    scale = 0.02  # some of x is beyond 127 * 0.02, and saturates
    arguments = INT8.arguments() | {"activation": "none"}
    got = sparse_conv1d(**arguments, input_scale=scale, backend=backend)
    rounded = (arguments["x"] / scale).round().clamp(-127, 127) * scale
    dense = arguments["weight"].dequantize(torch.float64)
    double = {"x": rounded.double(), "weight": dense, "bias": arguments["bias"].double()}
    expected = sparse_conv1d(**(arguments | double), backend="reference")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_int8_does_not_hide_sequences_that_are_not_finite(value, backend):
    arguments = INT8.arguments() | {"activation": "none"}
    clean = sparse_conv1d(**arguments, backend=backend)
    arguments["x"][1, 30, 5] = value
    y = sparse_conv1d(**arguments, backend=backend)
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[0], clean[0])


def test_int8_is_for_inference():
    with pytest.raises(RuntimeError, match="expected no gradients with int8 weights"):
        sparse_conv1d(**(INT8.arguments() | {"x": INT8.x().requires_grad_()}))


def test_opcheck():
    x, crow, col, values, bias, *others = replace(CASE, stride=2, dilation=3).op_arguments()
    arguments = (x.requires_grad_(), crow, col, values.requires_grad_(), bias.requires_grad_(), *others)
    torch.library.opcheck(torch.ops.sparsenlp.sparse_conv1d.default, arguments)


def test_opcheck_int8():
    torch.library.opcheck(torch.ops.sparsenlp.sparse_conv1d.default, INT8.op_arguments())


def test_compile_fullgraph():
    arguments = CASE.arguments()
    x = arguments.pop("x").requires_grad_()

    def f(x):
        return sparse_conv1d(x * 2, **arguments).amax(dim=1).sum()

    (expected,) = torch.autograd.grad(f(x), x)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


def test_strided_x_and_autocast():
    arguments = CASE.arguments()
    expected = sparse_conv1d(**arguments)
    strided = arguments["x"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(sparse_conv1d(**(arguments | {"x": strided})), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_conv1d(**(arguments | {"x": arguments["x"].bfloat16()}))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 60, 11)}, ValueError, r"x \(B, L, C\) with C = 36 / 3 channels, got \(2, 60, 11\)"),
        ({"x": torch.zeros(60, 12)}, ValueError, r"expected x \(B, L, C\)"),
        ({"x": torch.zeros(2, 0, 12)}, ValueError, "expected sequences of at least 1 positions, got 0"),
        ({"x": torch.zeros(2, 3, 12), "dilation": 3}, ValueError, "sequences of at least 5 positions, got 3"),
        ({"x": torch.zeros(2, 60, 12).double()}, TypeError, "expected x of dtype torch.float32, got torch.float64"),
        ({"x": torch.zeros(2, 60, 12, device="meta")}, ValueError, "expected x on cpu, got meta"),
        ({"kernel_size": 0}, ValueError, "expected a kernel_size of at least 1, got 0"),
        ({"stride": 0}, ValueError, "expected a stride of at least 1, got 0"),
        ({"padding": (0, -1)}, ValueError, r"expected paddings of at least 0, got \(0, -1\)"),
        ({"bias": torch.zeros(15)}, ValueError, r"expected bias of shape \(16,\)"),
        ({"bias": torch.zeros(16).double()}, TypeError, "expected bias of .* and dtype torch.float32"),
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
        ({"input_scale": 0.1}, ValueError, "sparse_conv1d: expected a positive, finite input_scale, with int8 weights"),
        ({"weight": INT8.weight(), "input_scale": math.nan}, ValueError, "positive, finite input_scale"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
        (
            {"x": torch.zeros(1, 9, 6), "weight": BlockSparse.from_dense(torch.ones(8, 12), (8, 4)).quantize()}
            | {"kernel_size": 2, "bias": None},
            ValueError,
            "expected channels in multiples of 4 with int8, got 6",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        sparse_conv1d(**(CASE.arguments() | change))


def test_native_backend_that_cannot_run(monkeypatch):
    arguments = replace(CASE, dtype=torch.float64).arguments()
    with pytest.raises(RuntimeError, match="backend 'native' cannot run"):
        sparse_conv1d(**arguments, backend="native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        sparse_conv1d(**CASE.arguments(), backend="native")


@pytest.mark.parametrize(
    ("index", "replacement"),
    [
        (0, torch.zeros(2, 60)),
        (0, torch.zeros(2, 60, 12).double()),
        (1, torch.zeros(3, dtype=torch.int64)),
        (1, torch.zeros(0, dtype=torch.int32)),
        (2, torch.zeros(1, dtype=torch.int32)),
        (3, torch.zeros(0, 8, 1)),
        (4, torch.zeros(15)),
        (5, "swish"),
        (6, 0),
        (7, 0),
        (8, [1]),
        (9, 70),
        (10, torch.ones(16)),
    ],
)
def test_bare_op_checks_what_kernels_rely_on(index, replacement, needs_native):
    arguments = [*CASE.op_arguments()]
    arguments[index] = replacement
    with pytest.raises(RuntimeError, match="sparse_conv1d"):
        torch.ops.sparsenlp.sparse_conv1d(*arguments)
