"""Gradients of block_sparse_attention: compiled and simulated, not run on hardware.

_grad_query_kernel      a program: a tile of queries of one head, over the blocks of its block row
_grad_key_value_kernel  a program: a tile of keys of one key head, over the blocks of its block column, for all query
                        heads that share it; nothing is added atomically, so results are the same every time

Probabilities come again from the scores and their log-sum-exp. Source: Dao 2023, arXiv:2307.08691.
"""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sparse_attention import (
    Shapes,
    check,
    load_real_rows,
    load_rows,
    locate_queries,
    masked,
    options_of,
    sides_of,
    store_rows,
    tile_of,
)
from .bsr_linear_product import compiler_options
from .launch import Device, Launch, run


@triton.jit
def _grad_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    crow_ptr,
    col_ptr,
    index_ptr,
    patterns_ptr,
    key_mask_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    scale,
    queries,
    keys,
    query_stride_b,
    query_stride_h,
    query_stride_l,
    key_stride_b,
    key_stride_h,
    key_stride_l,
    value_stride_b,
    value_stride_h,
    value_stride_l,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_PATTERNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_query (B, H, Lq, D); it and grad (B, H, Lq, E) are contiguous."""
    batch, head, batch_head, row, start, count = locate_queries(crow_ptr, queries, HEADS, ROWS, PER_HEAD, BLOCK_M)
    k_rows = key_ptr + batch * key_stride_b + head // GROUP * key_stride_h
    v_rows = value_ptr + batch * value_stride_b + head // GROUP * value_stride_h
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q_rows = query_ptr + batch * query_stride_b + head * query_stride_h
    q = load_rows(q_rows, row, queries, query_stride_l, D, BLOCK_D)  # [BM, BD]
    g = load_rows(grad_ptr + batch_head * queries * E, row, queries, E, E, BLOCK_E)  # [BM, BE]
    lse = tl.load(lse_ptr + batch_head * queries + row, mask=row < queries, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + batch_head * queries + row, mask=row < queries, other=0.0)  # [BM]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    steps: tl.constexpr = COLUMNS // BLOCK_N
    for step in range(0, count * steps):
        p = start + step // steps
        key = tl.cast(tl.load(col_ptr + p), tl.int64) * COLUMNS + step % steps * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        k = load_real_rows(k_rows, key, keys, key_stride_l, key_mask_ptr, D, BLOCK_D)  # [BN, BD]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)  # [BM, BN]
        weight = masked(
            tl.exp2(s - lse[:, None]),
            0.0,
            row[:, None],
            key[None, :],
            keys,
            key_mask_ptr,
            patterns_ptr,
            tl.load(index_ptr + p),
            HAS_PATTERNS,
            ROWS,
            COLUMNS,
        )
        v = load_real_rows(v_rows, key, keys, value_stride_l, key_mask_ptr, E, BLOCK_E)  # [BN, BE]
        change = tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None]  # [BM, BN]
        grad_s = weight * change * scale
        acc = tl.dot(tl.cast(grad_s, k.dtype), k, acc, input_precision="ieee")
    store_rows(grad_query_ptr + batch_head * queries * D, row, queries, acc, D, BLOCK_D)


@triton.jit
def _grad_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    ccol_ptr,
    row_ptr,
    index_ptr,
    patterns_ptr,
    key_mask_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    scale,
    queries,
    keys,
    query_stride_b,
    query_stride_h,
    query_stride_l,
    key_stride_b,
    key_stride_h,
    key_stride_l,
    value_stride_b,
    value_stride_h,
    value_stride_l,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_PATTERNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_key (B, Hkv, Lk, D) and grad_value (B, Hkv, Lk, E), contiguous; ccol, row: the mask by block columns."""
    tiles = tl.cdiv(keys, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    batch_head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    kv_heads: tl.constexpr = HEADS // GROUP
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    key = tl.cast(first + tl.arange(0, BLOCK_N), tl.int64)  # [BN]
    k_rows = key_ptr + batch * key_stride_b + kv_head * key_stride_h
    v_rows = value_ptr + batch * value_stride_b + kv_head * value_stride_h
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    k = load_real_rows(k_rows, key, keys, key_stride_l, key_mask_ptr, D, BLOCK_D)  # [BN, BD]
    v = load_real_rows(v_rows, key, keys, value_stride_l, key_mask_ptr, E, BLOCK_E)  # [BN, BE]
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    steps: tl.constexpr = ROWS // BLOCK_M
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        column = first // COLUMNS
        if PER_HEAD:
            column += head * tl.cdiv(keys, COLUMNS)
        start = tl.load(ccol_ptr + column)
        count = tl.load(ccol_ptr + column + 1) - start
        q_rows = query_ptr + batch * query_stride_b + head * query_stride_h
        rows = (batch * HEADS + head) * queries
        for step in range(0, count * steps):
            p = start + step // steps
            row = (
                tl.cast(tl.load(row_ptr + p), tl.int64) * ROWS + step % steps * BLOCK_M + tl.arange(0, BLOCK_M)
            )  # [BM]
            q = load_rows(q_rows, row, queries, query_stride_l, D, BLOCK_D)  # [BM, BD]
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)  # [BN, BM]
            lse = tl.load(lse_ptr + rows + row, mask=row < queries, other=0.0) * 1.4426950408889634  # [BM]
            weight = masked(
                tl.exp2(s - lse[None, :]),
                0.0,
                row[None, :],
                key[:, None],
                keys,
                key_mask_ptr,
                patterns_ptr,
                tl.load(index_ptr + p),
                HAS_PATTERNS,
                ROWS,
                COLUMNS,
            )  # [BN, BM]
            g = load_rows(grad_ptr + rows * E, row, queries, E, E, BLOCK_E)  # [BM, BE]
            grad_v = tl.dot(tl.cast(weight, g.dtype), g, grad_v, input_precision="ieee")
            delta = tl.load(delta_ptr + rows + row, mask=row < queries, other=0.0)  # [BM]
            change = tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :]  # [BN, BM]
            grad_s = weight * change * scale
            grad_k = tl.dot(tl.cast(grad_s, q.dtype), q, grad_k, input_precision="ieee")
    store_rows(grad_key_ptr + batch_head * keys * D, key, keys, grad_k, D, BLOCK_D)
    store_rows(grad_value_ptr + batch_head * keys * E, key, keys, grad_v, E, BLOCK_E)


def block_sparse_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    grad   (B, H, Lq, E)  of the context, in its dtype
    lse    (B, H, Lq)     float32, as forward returned it
    delta  (B, H, Lq)     float32, sum of grad * context over E, minus the gradient of lse
    """
    mask = (crow_indices, col_indices, pattern_indices, patterns)
    check(query, key, value, *mask, key_mask)
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    if lse.numel() and key.shape[2]:
        arguments = (grad.contiguous(), query, key, value, lse.contiguous(), delta.contiguous(), *mask, key_mask, scale)
        run(plan_backward(*arguments, *grads), query)
    return grads


def plan_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    device: Device | None = None,
) -> list[Launch]:
    """The launches that fill the gradients of query, and of key and value, from arguments that are known to fit."""
    shapes = Shapes(query, key, value, crow_indices, patterns)
    sides = sides_of("backward", shapes, query, device)
    by_rows = tile_of(shapes, sides["tile"], sides["step"])
    by_columns = tile_of(shapes, sides["step"], sides["tile"])
    columns = _by_columns(crow_indices, col_indices, pattern_indices, shapes)
    shared = (patterns.view(torch.uint8), None if key_mask is None else key_mask.contiguous().view(torch.uint8))
    rows = (grad, lse, delta)
    return [
        Launch(
            kernel=_grad_query_kernel,
            programs=shapes.batch * shapes.heads * triton.cdiv(shapes.queries, by_rows["BLOCK_M"]),
            arguments=(
                *shapes.rows,
                crow_indices,
                col_indices,
                pattern_indices,
                *shared,
                *rows,
                grad_query,
                scale,
                *shapes.sizes,
            ),
            constants={**shapes.constants, **by_rows},
            options=compiler_options(sides["warps"], sides["stages"]),  # on 8, widths above 128 spill
        ),
        Launch(
            kernel=_grad_key_value_kernel,
            programs=shapes.batch * shapes.kv_heads * triton.cdiv(shapes.keys, by_columns["BLOCK_N"]),
            arguments=(*shapes.rows, *columns, *shared, *rows, grad_key, grad_value, scale, *shapes.sizes),
            constants={**shapes.constants, **by_columns},
            options=options_of(shapes, by_columns, sides),
        ),
    ]


def _by_columns(
    crow_indices: Tensor, col_indices: Tensor, pattern_indices: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask by block columns, as BlockMask has it by rows: (ccol_indices, row_indices, pattern_indices), int32."""
    blocks, device = col_indices.numel(), col_indices.device
    rows, columns = (crow_indices.numel() - 1) // shapes.mask_heads, triton.cdiv(shapes.keys, shapes.block_columns)
    row = torch.arange(crow_indices.numel() - 1, device=device)
    row = row.repeat_interleave(crow_indices.diff().long(), output_size=blocks)
    column = row.div(rows, rounding_mode="floor") * columns + col_indices
    order = column.argsort(stable=True)
    counts = torch.zeros(shapes.mask_heads * columns, dtype=torch.int64, device=device)
    counts = counts.scatter_add(0, column, torch.ones_like(column))
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    row_indices = (row % rows).index_select(0, order).to(torch.int32)
    return starts, row_indices, pattern_indices.index_select(0, order)
