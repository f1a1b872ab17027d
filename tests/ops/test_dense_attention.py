from __future__ import annotations

import pytest
import torch
from backends import each_backend
from encoder_cases import DENSE_ATTENTION, DenseAttentionCase, attention_cases

from sparsenlp import native
from sparsenlp.ops import dense_attention

CASE = DenseAttentionCase((20, 5), heads=3)


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("dense_attention", DENSE_ATTENTION), indirect=["backend"])
def test_forward(case, backend):
    arguments, expected = case.arguments(), case.expected()
    poison(expected.numel())
    y = dense_attention(**arguments, backend=backend)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, **case.tolerance)
    assert not y[~case.mask()].any()


def test_the_reference_is_the_textbook_formula():
    """torch's own attention, whose mask takes the bias and the padding."""
    case = DenseAttentionCase((20, 5), heads=3, position_bias=True, holes=True)
    a, mask = case.arguments(), case.mask()
    q, k, v = (a[n].nan_to_num(0).unflatten(2, (3, 16)).transpose(1, 2) for n in ("query", "key", "value"))
    bias = a["position_bias"].masked_fill(~mask[:, None, None, :], -torch.inf)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(case.expected().float(), y * mask[:, :, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "case"), each_backend("dense_attention", attention_cases(40, 40, 7)), indirect=["backend"]
)
def test_nan_stays_in_its_sequence(case, backend):
    arguments = case.arguments()
    expected = dense_attention(**arguments, backend=backend)
    for name in ("query", "key", "value"):
        changed = arguments[name].clone()
        changed[1, 3, 2] = torch.nan
        y = dense_attention(**arguments | {name: changed}, backend=backend)
        assert torch.equal(y[::2], expected[::2])
        assert bool(y[1, 3, 2].isnan())


@pytest.mark.parametrize(
    ("backend", "case"), each_backend("dense_attention", attention_cases(17)), indirect=["backend"]
)
def test_large_scores_do_not_overflow(case, backend):
    arguments = case.arguments() | {"scale": 1e4}
    y = dense_attention(**arguments, backend=backend)
    q, k, v = (arguments[n].double().unflatten(2, (2, 16)).transpose(1, 2) for n in ("query", "key", "value"))
    best = (q @ k.transpose(2, 3)).argmax(dim=3)
    expected = v.gather(2, best[..., None].expand(-1, -1, -1, 16)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_of_its_inputs_gives_the_same(dtype, backend):
    case = DenseAttentionCase((33, 33, 33), dtype=dtype)
    a = case.arguments()
    expected = dense_attention(**a, backend=backend)
    side_by_side = torch.cat([a["query"], a["key"], a["value"]], dim=2)
    views = dict(zip(("query", "key", "value"), side_by_side.chunk(3, dim=2), strict=True))
    length_first = {n: a[n].transpose(0, 1).contiguous().transpose(0, 1) for n in views}
    features_first = {n: a[n].transpose(1, 2).contiguous().transpose(1, 2) for n in views}
    mask = torch.ones(33, 3, dtype=torch.bool).t()
    for change in (views, length_first, features_first, views | {"mask": mask}):
        assert torch.equal(dense_attention(**a | change, backend=backend), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads, needs_native):
    for case in attention_cases(130, 70, 1, heads=5, width=32, value_width=32):
        arguments = case.arguments()
        expected = dense_attention(**arguments)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(dense_attention(**arguments), expected)
        finally:
            torch.set_num_threads(before)


def test_default_backend_is_native_where_it_can_run(needs_native):
    arguments = DenseAttentionCase((20, 20)).arguments()
    assert torch.equal(dense_attention(**arguments), dense_attention(**arguments, backend="native"))
    half = {n: t.half() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    assert dense_attention(**half).dtype == torch.float16


@pytest.mark.parametrize("case", attention_cases(20, 5, position_bias=True, views=True), ids=str)
def test_opcheck(case):
    arguments = case.arguments() | {"scale": 0.25}
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].nan_to_num(0)
    torch.library.opcheck(torch.ops.sparsenlp.dense_attention.default, tuple(arguments.values()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def f(qkv, mask):
        query, key, value = (qkv * 2).chunk(3, dim=2)
        return dense_attention(query, key, value, 3, mask) + 1

    qkv = torch.randn(2, 20, 144)
    got = torch.compile(f, fullgraph=True, dynamic=dynamic)(qkv, CASE.mask())
    torch.testing.assert_close(got, f(qkv, CASE.mask()))


def test_is_for_inference():
    arguments = CASE.arguments()
    arguments["value"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"dense_attention: .* it is for inference"):
        dense_attention(**arguments)
    with torch.no_grad():
        dense_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 48)}, ValueError, r"expected a floating query \(B, S, heads . d\), got .* \(2, 48\)"),
        ({"query": torch.zeros(2, 20, 48).int()}, ValueError, "expected a floating query .* got torch.int32"),
        ({"heads": 0}, ValueError, "expected columns of query in multiples of heads, got 48 for 0"),
        ({"heads": 5}, ValueError, "expected columns of query in multiples of heads, got 48 for 5"),
        ({"key": torch.zeros(2, 20, 45)}, ValueError, r"expected key of shape \(2, 20, 48\), got \(2, 20, 45\)"),
        ({"key": torch.zeros(2, 20, 48).half()}, TypeError, "expected key of dtype torch.float32, got torch.float16"),
        (
            {"value": torch.zeros(2, 20, 47)},
            ValueError,
            "expected columns of value in multiples of heads, got 47 for 3",
        ),
        ({"value": torch.zeros(2, 19, 48)}, ValueError, r"expected value of shape \(2, 20, 48\), got \(2, 19, 48\)"),
        ({"value": torch.zeros(2, 20, 48, device="meta")}, ValueError, "expected value on cpu, got meta"),
        ({"mask": torch.ones(2, 20)}, TypeError, "expected a mask of dtype torch.bool, got torch.float32"),
        (
            {"mask": torch.ones(2, 1, 20).bool()},
            ValueError,
            r"expected a mask of shape \(2, 20\) on cpu, got \(2, 1, 20",
        ),
        (
            {"position_bias": torch.zeros(2, 20, 20)},
            ValueError,
            r"expected a float32 position_bias of shape \(3, 20, 20\)",
        ),
        (
            {"position_bias": torch.zeros(3, 20, 20).double()},
            ValueError,
            "float32 position_bias .* got .* torch.float64",
        ),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"dense_attention: .*{message}"):
        dense_attention(**CASE.arguments() | change)


def test_native_backend_runs_or_raises(needs_native, monkeypatch):
    q = torch.zeros(2, 20, 48)
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch.float16"):
        dense_attention(q.half(), q.half(), q.half(), 3, backend="native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="dense_attention: backend 'native' cannot run: not built"):
        dense_attention(q, q, q, 3, backend="native")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("query", torch.zeros(2, 48)),
        ("query", torch.zeros(2, 20, 48).double()),
        ("key", torch.zeros(2, 20, 45)),
        ("value", torch.zeros(2, 20, 47)),
        ("value", torch.zeros(2, 19, 48)),
        ("heads", 5),
        ("heads", 0),
        ("mask", torch.ones(2, 20)),
        ("mask", torch.ones(2, 19).bool()),
        ("position_bias", torch.zeros(2, 20, 20)),
        ("position_bias", torch.zeros(3, 20, 20).double()),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(name, wrong, needs_native):
    arguments = CASE.arguments() | {"scale": 1.0, name: wrong}
    with pytest.raises(RuntimeError, match="dense_attention: expected"):
        torch.ops.sparsenlp.dense_attention(*arguments.values())
