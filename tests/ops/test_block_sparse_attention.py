from __future__ import annotations

import resource
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BLOCK_SPARSE_ATTENTION, BlockSparseAttentionCase, attention_cases
from backends import each_backend

from sparsenlp import native
from sparsenlp.formats import BlockMask, MaskRule
from sparsenlp.ops import block_sparse_attention

CASE = BlockSparseAttentionCase(40, mask="random", heads=4, kv_heads=2, padding=True)
DOUBLES = [replace(case, dtype=torch.float64) for case in BLOCK_SPARSE_ATTENTION if case.dtype == torch.float32]


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(
    ("backend", "case"), each_backend("block_sparse_attention", BLOCK_SPARSE_ATTENTION), indirect=["backend"]
)
def test_forward(case, backend):
    arguments, (expected, expected_lse) = case.arguments(), case.expected()
    poison(expected.numel())
    y, lse = block_sparse_attention(**arguments, return_lse=True, backend=backend)
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, **case.tolerance)
    assert torch.equal(block_sparse_attention(**arguments, backend=backend), y)


@pytest.mark.parametrize(
    ("backend", "case"), each_backend("block_sparse_attention", BLOCK_SPARSE_ATTENTION), indirect=["backend"]
)
def test_gradients(case, backend):
    arguments = case.arguments()
    leaves = [arguments[n].requires_grad_() for n in ("query", "key", "value")]
    outputs = block_sparse_attention(**arguments, return_lse=True, backend=backend)
    poison(max(leaf.numel() for leaf in leaves))
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(case.grad(), outputs, strict=True)])
    for got, expected, leaf in zip(grads, case.expected_grads(), leaves, strict=True):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got.double(), expected, **case.grad_tolerance)


def dense_mask(case: BlockSparseAttentionCase) -> torch.Tensor:
    """The equivalent mask of scaled_dot_product_attention."""
    arguments = case.arguments()
    keep, key_mask = arguments["mask"].to_dense()[None], arguments["key_mask"]
    return keep if key_mask is None else keep & key_mask[:, None, None, :]


@pytest.mark.parametrize("case", [c for c in DOUBLES if c.batch], ids=str)
def test_the_reference_is_scaled_dot_product_attention(case):
    """Which gives zeros to rows without any key, too."""
    a, keep = case.arguments(), dense_mask(case)
    query, key, value = (a[n].nan_to_num(0) for n in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(query, key, value, keep, scale=case.scale, enable_gqa=True)
    expected = expected.masked_fill(~keep.any(dim=3, keepdim=True), 0)
    torch.testing.assert_close(block_sparse_attention(**a), expected, **case.tolerance)


def test_causal_is_that_of_torch():
    """torch aligns the diagonal top left, which differs where there are fewer queries than keys."""
    q, k, v = torch.randn(3, 2, 4, 50, 16).unbind()
    y = block_sparse_attention(q, k, v, BlockMask.causal(50))
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_decoding_with_a_cache_repeats_the_whole_sequence(backend):
    case = BlockSparseAttentionCase(50, mask="window", heads=4, kv_heads=2)
    window = {"left": 20, "right": 0, "block": (16, 16)}
    a = case.arguments() | {"mask": BlockMask.sliding_window(50, **window)}
    whole = block_sparse_attention(**a, backend=backend)
    for first, last in ((0, 30), (30, 33), *((i, i + 1) for i in range(33, 50))):
        mask = BlockMask.sliding_window(last - first, keys=last, **window)
        step = {"query": a["query"][:, :, first:last], "mask": mask}
        step |= {name: a[name][:, :, :last] for name in ("key", "value")}
        y = block_sparse_attention(**step, backend=backend)
        torch.testing.assert_close(y, whole[:, :, first:last], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "case"),
    each_backend("block_sparse_attention", attention_cases(70, mask="random")),
    indirect=["backend"],
)
def test_nan_reaches_those_that_attend_to_it(case, backend):
    """And leaves alone those in whose blocks it does not lie, which torch's dense attention does not."""
    a, keep = case.arguments(), dense_mask(case)
    expected = block_sparse_attention(**a, backend=backend)
    for name in ("key", "value"):
        changed = a[name].clone()
        changed[1, 1, 20] = torch.nan
        y = block_sparse_attention(**a | {name: changed}, backend=backend)
        assert bool(y[1, 1, keep[0, 1, :, 20]].isnan().all())
        assert torch.equal(y[0], expected[0])
        assert torch.equal(y[1, 0], expected[1, 0])
        if backend == "native":
            in_block = keep[0, 1, :, 16:32].any(dim=1).unfold(0, 1, 1).flatten()
            blocks = F.pad(in_block, (0, 10)).view(5, 16).any(dim=1).repeat_interleave(16)[:70]
            assert torch.equal(y[1, 1, ~blocks], expected[1, 1, ~blocks])
    query = a["query"].clone()
    query[1, 1, 3] = torch.nan
    y = block_sparse_attention(**a | {"query": query}, backend=backend)
    assert bool(y[1, 1, 3].isnan().all())
    others = torch.arange(70) != 3
    assert torch.equal(y[1, 1, others], expected[1, 1, others])


@pytest.mark.parametrize(
    ("backend", "case"),
    each_backend("block_sparse_attention", attention_cases(40, mask="causal", scale=1e4)),
    indirect=["backend"],
)
def test_large_scores_do_not_overflow(case, backend):
    a = case.arguments()
    y = block_sparse_attention(**a, backend=backend)
    scores = (a["query"].double() @ a["key"].double().transpose(2, 3)).masked_fill(~dense_mask(case), -torch.inf)
    best = scores.argmax(dim=3)
    expected = a["value"].double().gather(2, best[..., None].expand(-1, -1, -1, 16))
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_free(dtype, backend):
    a = BlockSparseAttentionCase(40, mask="random", dtype=dtype).arguments()
    names = ("query", "key", "value")
    grad = torch.randn(2, 2, 40, 16).to(dtype)

    def run(change):
        leaves = [t.detach().requires_grad_() for t in change.values()]
        y = block_sparse_attention(**a | dict(zip(names, leaves, strict=True)), backend=backend)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    expected = run({n: a[n] for n in names})
    side_by_side = torch.cat([a[n].transpose(1, 2).flatten(2) for n in names], dim=2)
    fused = {n: t.unflatten(2, (2, 16)).transpose(1, 2) for n, t in zip(names, side_by_side.chunk(3, 2), strict=True)}
    features_first = {n: a[n].transpose(2, 3).contiguous().transpose(2, 3) for n in names}
    for change in (fused, features_first):
        for got, wanted in zip(run(change), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads, needs_native):
    for case in attention_cases(300, mask="random", heads=4, kv_heads=2, width=32):
        arguments = case.arguments()
        leaves = [arguments[n].requires_grad_() for n in ("query", "key", "value")]

        def run(arguments=arguments, leaves=leaves):
            y = block_sparse_attention(**arguments)
            return y, *torch.autograd.grad(y.float().square().sum(), leaves)

        expected = run()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert all(torch.equal(got, wanted) for got, wanted in zip(run(), expected, strict=True))
        finally:
            torch.set_num_threads(before)


def peak_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def test_memory_is_linear_in_the_length(needs_native):
    """Scores of all pairs, or a mask of them in bytes, would take 4.3 and 1.1 GB."""
    query, key, value = (torch.randn(1, 1, 32768, 16, requires_grad=True) for _ in range(3))
    before = peak_bytes()
    mask = MaskRule(window=64)(32768)
    block_sparse_attention(query, key, value, mask).sum().backward()
    assert peak_bytes() - before < 2**28


def test_gradcheck():
    a = replace(CASE, queries=20, dtype=torch.float64).arguments()
    leaves = [a[n].nan_to_num(0).requires_grad_() for n in ("query", "key", "value")]

    def f(query, key, value):
        y, lse = block_sparse_attention(query, key, value, a["mask"], a["key_mask"], return_lse=True)
        return y, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    query, key, value, *rest = CASE.raw_arguments()
    tensors = [t.nan_to_num(0).requires_grad_(requires_grad) for t in (query, key, value)]
    torch.library.opcheck(torch.ops.sparsenlp.block_sparse_attention.default, (*tensors, *rest))


def test_opcheck_backward():
    query, key, value, *rest = (t.nan_to_num(0) if torch.is_tensor(t) else t for t in CASE.raw_arguments())
    y, lse = torch.ops.sparsenlp.block_sparse_attention(query, key, value, *rest)
    arguments = (torch.randn_like(y), query, key, value, lse, torch.randn_like(lse), *rest)
    torch.library.opcheck(torch.ops.sparsenlp.block_sparse_attention_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    mask = BlockMask.causal(40, block=(16, 16))

    def f(qkv):
        query, key, value = (qkv * 2).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return block_sparse_attention(query, key, value, mask).transpose(1, 2).flatten(2) + 1

    qkv = torch.randn(2, 40, 96, requires_grad=True)
    got = torch.compile(f, fullgraph=True, dynamic=dynamic)(qkv)
    torch.testing.assert_close(got, f(qkv))
    grads = [torch.autograd.grad(y.square().sum(), qkv)[0] for y in (got, f(qkv))]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-3)  # those of the first query cancel to nothing


def test_default_backend_is_native_where_it_can_run(needs_native):
    a = CASE.arguments()
    assert torch.equal(block_sparse_attention(**a), block_sparse_attention(**a, backend="native"))
    half = {n: t.half() if n in ("query", "key", "value") else t for n, t in a.items()}
    assert block_sparse_attention(**half).dtype == torch.float16


def zeros(*shape: int, **options: object) -> torch.Tensor:
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": zeros(4, 40, 16)}, ValueError, r"expected a floating query of 4 dimensions, .* \(4, 40, 16\)"),
        ({"value": zeros(2, 2, 40, 16).int()}, ValueError, "expected a floating value .* got torch.int32"),
        ({"key": zeros(2, 2, 40, 16).half()}, TypeError, "expected key of dtype torch.float32, got torch.float16"),
        ({"key": zeros(2, 2, 40, 16, device="meta")}, ValueError, "expected key on cpu, got meta"),
        ({"key": zeros(2, 2, 40, 8)}, ValueError, r"expected key of shape \(2, Hkv, Lk, 16\), got \(2, 2, 40, 8\)"),
        ({"key": zeros(3, 2, 40, 16)}, ValueError, r"expected key of shape \(2, Hkv, Lk, 16\)"),
        ({"value": zeros(2, 2, 41, 16)}, ValueError, r"expected value of shape \(2, 2, 40\) x E"),
        ({"query": zeros(2, 3, 40, 16)}, ValueError, "expected query heads in multiples of 2 key heads, got 3"),
        ({"query": zeros(2, 4, 41, 16)}, ValueError, r"expected a mask of 41 queries x 40 keys, got \(40, 40\)"),
        ({"mask": BlockMask.causal(48)}, ValueError, r"expected a mask of 40 queries x 40 keys, got \(48, 48\)"),
        ({"query": zeros(2, 2, 40, 16)}, ValueError, "expected a mask of 1 or 2 heads, got 4"),
        ({"mask": BlockMask.causal(40).to("meta")}, ValueError, "expected a mask on cpu, got meta"),
        ({"key_mask": zeros(2, 40)}, TypeError, "expected a key_mask of dtype torch.bool, got torch.float32"),
        ({"key_mask": zeros(2, 41).bool()}, ValueError, r"expected a key_mask of shape \(2, 40\) on cpu"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, triton, reference, got 'cudnn'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' cannot run: expected .* on cuda, got torch.float32"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"block_sparse_attention: .*{message}"):
        block_sparse_attention(**CASE.arguments() | change)


def test_native_backend_runs_or_raises(needs_native, monkeypatch):
    a = BlockSparseAttentionCase(20).arguments()
    half = {n: t.half() if n in ("query", "key", "value") else t for n, t in a.items()}
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch.float16"):
        block_sparse_attention(**half, backend="native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="block_sparse_attention: backend 'native' cannot run: not built"):
        block_sparse_attention(**a, backend="native")


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        (0, zeros(4, 40, 16)),
        (0, zeros(2, 4, 40, 16).double()),
        (0, zeros(2, 3, 40, 16)),
        (1, zeros(2, 2, 40, 8)),
        (2, zeros(2, 2, 41, 16)),
        (3, zeros(10).int()),
        (3, zeros(13)),
        (4, zeros(1).int()),
        (6, zeros(1, 16, 8).bool()),
        (6, zeros(1, 16, 16)),
        (7, zeros(2, 41).bool()),
        (7, zeros(2, 40)),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(at, wrong, needs_native):
    arguments = list(CASE.raw_arguments())
    arguments[at] = wrong
    with pytest.raises(RuntimeError, match="block_sparse_attention: expected"):
        torch.ops.sparsenlp.block_sparse_attention(*arguments)
