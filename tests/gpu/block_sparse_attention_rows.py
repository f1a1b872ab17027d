"""The rows of block_sparse_attention and its gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from attention_cases import BlockSparseAttentionCase
from problems import Mutation, Problem, Row

FORWARD, BACKWARD = "block_sparse_attention.py", "block_sparse_attention_backward.py"


def forward(case: BlockSparseAttentionCase) -> Callable[[str, str], Problem]:
    def build(package: str, target: str) -> Problem:
        module = importlib.import_module(f"{package}.block_sparse_attention")
        y, lse = case.expected()
        outputs = [torch.full(y.shape, torch.nan, dtype=case.dtype), torch.full(lse.shape, torch.nan)]
        launch = module.plan(*case.raw_arguments(), *outputs, module.Device(target, 1))
        return Problem([launch], outputs, [y, lse], case.tolerance)

    return build


def gradients(case: BlockSparseAttentionCase) -> Callable[[str, str], Problem]:
    """In query, key and value."""

    def build(package: str, target: str) -> Problem:
        module = importlib.import_module(f"{package}.block_sparse_attention_backward")
        query, key, value, *rest = case.raw_arguments()
        (y, lse), (grad, grad_lse) = case.expected(), case.grad()
        delta = ((grad.double() * y).sum(3) - grad_lse).float()
        outputs = [torch.full_like(t, torch.nan) for t in (query, key, value)]
        device = module.Device(target, 1)
        launches = module.plan_backward(grad, query, key, value, lse.float(), delta, *rest, *outputs, device)
        return Problem(launches, outputs, list(case.expected_grads()), case.grad_tolerance)

    return build


def small(queries: int, dtype: torch.dtype, keys: int = 0, **rest) -> BlockSparseAttentionCase:
    return BlockSparseAttentionCase(queries, keys, batch=1, kv_heads=1, dtype=dtype, **rest)


def large(dtype: torch.dtype, **rest) -> BlockSparseAttentionCase:
    return BlockSparseAttentionCase(256, batch=1, mask="causal", block=(128, 128), width=64, dtype=dtype, **rest)


ROWS = [
    Row(
        "block_sparse_attention float16",
        forward(small(37, torch.float16, mask="causal", padding=True)),
        forward(large(torch.float16, padding=True)),
        mutations=(
            Mutation("one block of keys too few", FORWARD, "mask_row + 1) - start", "mask_row + 1) - start - 1"),
            Mutation("patterns are not applied", FORWARD, "if pattern >= 0", "if pattern >= 99"),
            Mutation(
                "padding is attended to",
                FORWARD,
                "real = real & (tl.load(key_mask_ptr",
                "real = real | (tl.load(key_mask_ptr",
            ),
            Mutation("the sum of weights is not rescaled", FORWARD, "total = total * shrink", "total = total"),
            Mutation(
                "the values at padding are read",
                FORWARD,
                "inside = inside & (tl.load(key_mask_ptr",
                "_ = (tl.load(key_mask_ptr",
            ),
        ),
    ),
    Row(
        "block_sparse_attention bfloat16",
        forward(small(20, torch.bfloat16, 40, mask="random", block=(16, 32), width=72, value_width=40)),
        forward(large(torch.bfloat16)),
        mutations=(
            Mutation("the mask of the first head for all", FORWARD, "mask_row += head * tl", "mask_row += 0 * tl"),
            Mutation("every query head has keys of its own", FORWARD, "head // GROUP", "head"),
            Mutation("a width that is not masked", FORWARD, "if WIDTH < BLOCK:", "if WIDTH < 0:"),
            Mutation("the context is not rescaled", FORWARD, "acc * shrink[:, None]", "acc"),
            Mutation("keys that are not loaded ahead", FORWARD, 'sides["stages"]', "1"),
            Mutation(
                "addresses of queries in 32 bits",
                FORWARD,
                "tl.cast(first + tl.arange(0, BLOCK_M), tl.int64)",
                "(first + tl.arange(0, BLOCK_M))",
            ),
        ),
    ),
    Row(
        "block_sparse_attention gradients float16",
        gradients(small(37, torch.float16, mask="causal", padding=True)),
        gradients(large(torch.float16, padding=True)),
        synchronous={
            "sm_80": "Triton does not pipeline a tile that two dots take in two layouts, as it is and transposed"
        },
        mutations=(
            Mutation("delta is forgotten", BACKWARD, " - delta[None, :]", ""),
            Mutation("only the first of the heads that share keys", BACKWARD, "range(0, GROUP)", "range(0, 1)"),
            Mutation("rows are not those of the block", BACKWARD, "tl.load(row_ptr + p)", "tl.load(row_ptr + start)"),
            Mutation(
                "patterns in the order of rows", BACKWARD, "pattern_indices.index_select(0, order)", "pattern_indices"
            ),
        ),
    ),
]
