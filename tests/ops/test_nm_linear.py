from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import each_backend
from cases import NM_LINEAR, PATTERNS, TOLERANCES, NMLinearCase

from sparsenlp import native
from sparsenlp.formats import NM
from sparsenlp.ops import nm_linear
from sparsenlp.ops.nm_linear import pack

CASE = NMLinearCase((20,), 64, 48)
RUNS_NATIVE = (torch.float32, torch.bfloat16)
GRADIENT_CASES = [
    NMLinearCase((tokens,), 40, 48, pattern, activation=activation, residual=tokens == 3, dtype=dtype)
    for dtype in RUNS_NATIVE
    for pattern in PATTERNS
    for tokens, activation in ((3, "none"), (40, "gelu"), (40, "relu"), (3, "gelu_tanh"))
]


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("nm_linear", NM_LINEAR), indirect=["backend"])
def test_forward(case, backend):
    x, weight, bias, residual = case.x(), case.weight(), case.bias_vector(), case.residual_tensor()
    expected = case.expected()
    poison(expected.numel())
    y = nm_linear(x, weight, bias, case.activation, residual, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


@pytest.mark.parametrize(("backend", "case"), each_backend("nm_linear", GRADIENT_CASES), indirect=["backend"])
def test_gradients_match_float64(case, backend):
    def gradients(dtype, backend):
        x, bias, residual = case.x(), case.bias_vector(), case.residual_tensor()
        weight = case.weight().to(dtype)
        tensors = [x, weight.values, bias, *([residual] if residual is not None else [])]
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        x, values, bias, *residual = inputs
        y = nm_linear(x, replace(weight, values=values), bias, case.activation, *residual, backend=backend)
        slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(dtype).view_as(y)
        return torch.autograd.grad((y * slope).sum(), inputs)

    got, expected = gradients(case.dtype, backend), gradients(torch.float64, "reference")
    for name, a, b in zip(("x", "values", "bias", "residual"), got, expected, strict=False):
        assert a.dtype == case.dtype
        torch.testing.assert_close(
            a.double(), b, **TOLERANCES["nm_linear_wgrad", case.dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_default_backend_is_native_where_it_can_run(needs_native):
    y, named = (nm_linear(CASE.x(), CASE.weight(), backend=backend) for backend in (None, "native"))
    assert torch.equal(y, named)
    other = NMLinearCase((20,), 64, 48, (1, 3))  # which no kernel serves
    y = nm_linear(other.x(), other.weight(), other.bias_vector())
    torch.testing.assert_close(y.double(), other.expected(), **other.tolerance)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_values_may_change_in_place(tokens, dtype, backend):
    case = NMLinearCase((tokens,), 40, 48, dtype=dtype)
    x, weight = case.x(), case.weight()
    before = nm_linear(x, weight, backend=backend)
    weight.values.mul_(2)
    assert torch.equal(nm_linear(x, weight, backend=backend), before * 2)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", RUNS_NATIVE)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_inputs_that_are_not_stored_do_not_matter(pattern, dtype, tokens, needs_native):
    """What the kernels pad with must never meet x, and what is not stored must not either."""
    case = NMLinearCase((tokens,), 20, 40, pattern, dtype=dtype, bias=False)
    weight, x = case.weight(), case.x()
    one_row = NM(weight.values[:1], weight.indices[:1], (1, 40), pattern)
    expected = nm_linear(x, one_row, backend="native")
    x = torch.where(one_row.to_dense()[0] != 0, x, torch.nan)
    assert torch.equal(nm_linear(x, one_row, backend="native"), expected)


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_any_packed_indices_are_safe(dtype, pattern, tokens, needs_native):
    """The raw op trusts no index: whatever the bytes, it reads inside of x."""
    case = NMLinearCase((tokens,), 37, 40, pattern, dtype=dtype)
    weight = case.weight()
    packed = torch.full_like(pack(weight.indices, pattern), 255)
    arguments = (case.x(), weight.values, weight.indices, packed, pattern, None, "none")
    for isa in native.kernels()[f"nm_linear.{'f32' if dtype == torch.float32 else 'bf16'}"]:
        with native.isa_cap(isa):
            assert bool(torch.ops.sparsenlp.nm_linear(*arguments).isfinite().all())


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        NMLinearCase((2, 3), 32, 24, (4, 8), activation="gelu", bias=False, residual=True),
        NMLinearCase((20,), 32, 24, dtype=torch.bfloat16, residual=True),
    ],
    ids=str,
)
def test_opcheck(case):
    weight, bias, residual = case.weight(), case.bias_vector(), case.residual_tensor()
    inputs = (
        case.x().requires_grad_(),
        weight.values.requires_grad_(),
        weight.indices,
        pack(weight.indices, weight.pattern),
        list(case.pattern),
        bias.requires_grad_() if bias is not None else None,
        case.activation,
        residual.requires_grad_() if residual is not None else None,
    )
    torch.library.opcheck(torch.ops.sparsenlp.nm_linear.default, inputs)


def test_compile_fullgraph():
    weight, bias = CASE.weight(), CASE.bias_vector()

    def f(x):
        return torch.relu(nm_linear(x * 2, weight, bias, "gelu")).sum()

    x = CASE.x().requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_rows_do_not_depend_on_threads(dtype, needs_native):
    case = NMLinearCase((150,), 200, 96, dtype=dtype)
    x, weight, bias = case.x(), case.weight(), case.bias_vector()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = nm_linear(x, weight, bias, "gelu")
        torch.set_num_threads(3)
        three = nm_linear(x, weight, bias, "gelu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_a_constant_input_scale():
    case = NMLinearCase((20,), 64, 48, int8=True)
    x, weight = case.x(), case.weight()
    largest = float(x.abs().amax(dim=1)[3])
    y = nm_linear(x, weight, input_scale=largest / 127)
    torch.testing.assert_close(y[3], nm_linear(x, weight)[3])


def test_strided_inputs():
    weight, x = CASE.weight(), CASE.x()
    expected = nm_linear(x, weight)
    torch.testing.assert_close(nm_linear(x.t().contiguous().t(), weight), expected)
    strided = replace(weight, values=torch.stack([weight.values] * 2, dim=2)[..., 0])
    torch.testing.assert_close(nm_linear(x, strided), expected)


@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_autocast_computes_in_the_dtype_of_the_weight(dtype, backend):
    x, weight = CASE.x().to(dtype), CASE.weight()
    with torch.autocast("cpu", torch.bfloat16):
        y = nm_linear(x, weight, backend=backend)
    assert torch.equal(y, nm_linear(x.float(), weight, backend=backend))


@pytest.mark.parametrize("tokens", [1, 20])
def test_no_columns_leaves_the_bias(tokens, backend):
    weight, bias = NM.from_dense(torch.zeros(16, 0)), torch.arange(-8.0, 8.0)
    y = nm_linear(torch.zeros(tokens, 0), weight, bias, "relu", backend=backend)
    assert torch.equal(y, bias.relu().expand(tokens, -1))


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
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
        ({"input_scale": 0.1}, ValueError, "expected a positive, finite input_scale, with int8 weights, got 0.1"),
        ({"weight": CASE.weight().quantize(), "input_scale": 0.0}, ValueError, "positive, finite input_scale"),
        ({"weight": CASE.weight().quantize(), "backend": "native"}, RuntimeError, "got torch.float32 with torch.int8"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, cuda, reference, got 'cudnn'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": CASE.x(), "weight": CASE.weight(), "bias": CASE.bias_vector()} | change
    with pytest.raises(error, match=message):
        nm_linear(**arguments)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (NMLinearCase((2,), 8, 12, (1, 3)), "expected a pattern among 2:4, 1:4, 4:8"),
        (NMLinearCase((2,), 8, 12, dtype=torch.float16), "expected float32 or bfloat16 on cpu, got torch.float16"),
    ],
    ids=str,
)
def test_native_backend_runs_or_raises(case, message, needs_native):
    with pytest.raises(RuntimeError, match=message):
        nm_linear(case.x(), case.weight(), backend="native")


def test_native_backend_without_extension(monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        nm_linear(CASE.x(), CASE.weight(), backend="native")


@pytest.mark.parametrize(
    ("index", "replacement"),
    [
        (0, torch.zeros(2, 48, dtype=torch.float64)),
        (0, torch.zeros(2, 44)),
        (0, torch.zeros(())),
        (1, torch.zeros(64, 22)),
        (1, torch.zeros(64)),
        (1, torch.zeros(64, 24, dtype=torch.bfloat16)),
        (3, torch.zeros(64, 4, dtype=torch.uint8)),
        (3, torch.zeros(64, 8, dtype=torch.int8)),
        (3, torch.zeros(63, 8, dtype=torch.uint8)),
        (4, [2, 5]),
        (4, [4, 8]),
        (4, []),
        (5, torch.zeros(3)),
        (5, torch.zeros(64, dtype=torch.float64)),
        (6, "swish"),
        (7, torch.zeros(20, 63)),
        (7, torch.zeros(20, 64, dtype=torch.float64)),
        (8, torch.ones(64)),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(index, replacement, needs_native):
    weight = CASE.weight()
    packed = pack(weight.indices, weight.pattern)
    arguments = [CASE.x(), weight.values, weight.indices, packed, [2, 4], CASE.bias_vector(), "none", None, None]
    arguments[index] = replacement
    with pytest.raises(RuntimeError, match="nm_linear"):
        torch.ops.sparsenlp.nm_linear(*arguments)
