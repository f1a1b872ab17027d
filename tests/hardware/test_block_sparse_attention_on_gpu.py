"""block_sparse_attention and its gradients on a GPU against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import BlockSparseAttentionCase
from on_gpu import assert_close, on_gpu, poison

from sparsenlp.formats import BlockMask
from sparsenlp.ops import block_sparse_attention

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CASE = BlockSparseAttentionCase(40, mask="random", heads=4, kv_heads=2, padding=True)
CASES = [
    replace(case, dtype=dtype)
    for case in (
        *(BlockSparseAttentionCase(70, mask=mask) for mask in ("causal", "longformer", "bigbird", "whole", "none")),
        BlockSparseAttentionCase(50, mask="random", heads=6, kv_heads=2, padding=True),
        BlockSparseAttentionCase(1, 90, mask="causal", padding=True),
        BlockSparseAttentionCase(70, 33, mask="random", scale=0.5),
        BlockSparseAttentionCase(130, mask="longformer", block=(64, 32)),
        BlockSparseAttentionCase(300, batch=1, block=(64, 64), width=64),
        BlockSparseAttentionCase(260, mask="causal", batch=1, block=(64, 64), width=128),
        BlockSparseAttentionCase(40, width=33, value_width=20),
        BlockSparseAttentionCase(20, batch=0),
    )
    for dtype in FLOATS
]


def check(case: BlockSparseAttentionCase) -> None:
    """The context, the log-sum-exp and the gradients through both."""
    expected, expected_grads = case.expected(), case.expected_grads()
    arguments = dict(zip(case.arguments(), on_gpu(*case.arguments().values()), strict=True))
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    poison(*expected)
    outputs = block_sparse_attention(**arguments, return_lse=True, backend="triton")
    assert outputs[0].dtype == case.dtype
    for got, wanted in zip(outputs, expected, strict=True):
        assert_close(got.detach(), wanted, case.tolerance)
    poison(*leaves)
    for got, wanted in zip(torch.autograd.grad(outputs, leaves, on_gpu(*case.grad())), expected_grads, strict=True):
        assert got.dtype == case.dtype
        assert_close(got, wanted, case.grad_tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case):
    check(case)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_small(dtype):
    check(replace(CASE, dtype=dtype))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    query, key, value, *rest = on_gpu(*CASE.raw_arguments())
    tensors = [t.nan_to_num(0).requires_grad_(requires_grad) for t in (query, key, value)]
    torch.library.opcheck(torch.ops.sparsenlp.block_sparse_attention.default, (*tensors, *rest))


def test_compile_with_inductor():
    (mask,) = on_gpu(BlockMask.causal(40, block=(16, 16)))

    def f(qkv):
        query, key, value = (qkv * 2).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return block_sparse_attention(query, key, value, mask).transpose(1, 2).flatten(2) + 1

    (qkv,) = on_gpu(torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(0)))
    leaf = qkv.requires_grad_()
    got, expected = torch.compile(f, fullgraph=True)(leaf), f(leaf)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaf)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-3)  # those of the first query cancel to nothing
