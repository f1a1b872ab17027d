from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import each_backend
from encoder_cases import SPARSE_FFN, SparseFfnCase, ffn_cases

from sparsenlp import BlockSparse, native
from sparsenlp.formats import SparseProjection
from sparsenlp.ops import sparse_ffn
from sparsenlp.ops.sparse_ffn import call

CASE = SparseFfnCase((20,))


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("sparse_ffn", SPARSE_FFN), indirect=["backend"])
def test_forward(case, backend):
    x, weights, expected = case.x(), case.weights(), case.expected()
    poison(expected.numel())
    y = sparse_ffn(x, *weights, case.activation, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


def test_the_reference_is_the_textbook_formula():
    fc1, fc2 = CASE.weights()
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(CASE.x(), fc1.weight.to_dense(), fc1.bias))
    expected = torch.nn.functional.linear(hidden, fc2.weight.to_dense(), fc2.bias)
    torch.testing.assert_close(CASE.expected().float(), expected)


@pytest.mark.parametrize(("backend", "case"), each_backend("sparse_ffn", ffn_cases(50)), indirect=["backend"])
def test_a_token_does_not_depend_on_the_others(case, backend):
    x, weights = case.x(), case.weights()
    expected = sparse_ffn(x, *weights, backend=backend)
    x[7] = torch.nan
    y = sparse_ffn(x, *weights, backend=backend)
    others = torch.arange(50) != 7
    assert torch.equal(y[others], expected[others])
    alone = sparse_ffn(x[:1], *weights, backend=backend)
    torch.testing.assert_close(alone, expected[:1], **case.tolerance)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads, needs_native):
    for case in ffn_cases(130, hidden=64, neurons=256):
        x, weights = case.x(), case.weights()
        expected = sparse_ffn(x, *weights)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(sparse_ffn(x, *weights), expected)
        finally:
            torch.set_num_threads(before)


def test_strided_x_and_row_sums(backend):
    case = SparseFfnCase((20,), weight_dtype=torch.int8)
    wide, (fc1, fc2) = torch.stack([case.x(), case.x() + 1], dim=2), case.weights()
    y = call(wide[..., 0], fc1.tensors(row_sums=backend == "native"), fc2.tensors(), "gelu", backend)
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)


def test_default_backend_is_native_where_it_can_run(needs_native):
    x, weights = CASE.x(), CASE.weights()
    assert torch.equal(sparse_ffn(x, *weights), sparse_ffn(x, *weights, backend="native"))
    half = sparse_ffn(x.half(), *weights)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), CASE.expected(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ffn_cases((2, 9)), ids=str)
def test_opcheck(case):
    fc1, fc2 = case.weights()
    torch.library.opcheck(
        torch.ops.sparsenlp.sparse_ffn.default, (case.x(), fc1.tensors(), fc2.tensors(), case.activation)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    weights = CASE.weights()

    def f(x):
        return sparse_ffn(x * 2, *weights) + 1

    torch.testing.assert_close(torch.compile(f, fullgraph=True, dynamic=dynamic)(CASE.x()), f(CASE.x()))


def test_is_for_inference():
    x, weights = CASE.x().requires_grad_(), CASE.weights()
    with pytest.raises(RuntimeError, match=r"sparse_ffn: .* it is for inference"):
        sparse_ffn(x, *weights)
    with torch.no_grad():
        sparse_ffn(x, *weights)


def sparse(rows, columns, dtype=torch.float32, bias=None):
    weight = BlockSparse.from_dense(torch.ones(rows, columns, dtype=dtype), (8, 4))
    return SparseProjection(weight, torch.zeros(rows) if bias is None else bias)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(20, 31)}, ValueError, r"expected a floating x \(..., 32\), got torch.float32 .* \(20, 31\)"),
        ({"x": torch.zeros(())}, ValueError, r"expected a floating x \(..., 32\), got .* of shape \(\)"),
        ({"x": torch.zeros(20, 32).int()}, ValueError, "expected a floating x .* got torch.int32"),
        ({"x": torch.zeros(20, 32, device="meta")}, ValueError, "expected x on cpu, got meta"),
        ({"fc1": sparse(64, 32, torch.float64)}, TypeError, "expected weights of dtype float32, bfloat16 or int8, got"),
        ({"fc1": sparse(64, 32, bias=torch.zeros(63))}, ValueError, r"expected bias of fc1 of shape \(64,\)"),
        ({"fc1": sparse(64, 32, bias=torch.zeros(64).half())}, ValueError, "expected bias of fc1 .* got .*float16"),
        ({"fc2": sparse(32, 60)}, ValueError, r"expected fc2 of shape \(32, 64\), got \(32, 60\)"),
        ({"fc2": sparse(32, 64, torch.bfloat16)}, TypeError, "expected fc2 of dtype torch.float32, got torch.bfloat16"),
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors(change, error, message):
    fc1, fc2 = CASE.weights()
    with pytest.raises(error, match=f"sparse_ffn: {message}"):
        sparse_ffn(**{"x": CASE.x(), "fc1": fc1, "fc2": fc2} | change)


def test_native_backend_runs_or_raises(needs_native, monkeypatch):
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch.float16"):
        sparse_ffn(CASE.x().half(), *CASE.weights(), backend="native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="sparse_ffn: backend 'native' cannot run: not built"):
        sparse_ffn(CASE.x(), *CASE.weights(), backend="native")


def test_int8_rows_that_could_overflow_are_refused(needs_native):
    case = replace(CASE, neurons=66312, density=0.0, weight_dtype=torch.int8)
    with pytest.raises(RuntimeError, match="sparse_ffn: expected at most 66311 columns of int8 in fc2, got 66312"):
        sparse_ffn(case.x(), *case.weights())


@pytest.mark.parametrize("index", range(4))
def test_raw_op_refuses_inconsistent_tensors(index, needs_native):
    fc1, fc2 = (projection.tensors() for projection in CASE.weights())
    wrong = [fc1[0].long(), fc1[1][:-1], fc1[2].double(), fc1[3][:-1]]
    fc1[index] = wrong[index]
    with pytest.raises(RuntimeError, match="sparse_ffn: "):
        torch.ops.sparsenlp.sparse_ffn(CASE.x(), fc1, fc2, "gelu")
