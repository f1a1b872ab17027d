"""The gradients of bsr_linear: compiled and simulated, not run on hardware.

In x:       grad W is a product with Wᵀ, whose blocks are those of W, transposed, in another order: plan_product.
In values:  gradᵀ x at the stored blocks only. _block_wgrad_kernel takes a tile of one block; _gather_wgrad_kernel,
            where k is no multiple of 16, takes BLOCK_K of the stored columns of a block row, of several blocks.

Both add in an order that is the same at every run, without atomics, in float32.
"""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .bsr_linear_product import (
    Epilogue,
    Pattern,
    compiler_options,
    dot_warps,
    find_row,
    plan_product,
    precision,
)
from .launch import Device, Launch, tuned


@triton.jit
def _block_wgrad_kernel(
    grad_ptr,
    x_ptr,
    crow_ptr,
    col_ptr,
    dvalues_ptr,
    tokens,
    block_rows,
    blocks,
    part_tokens,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_k,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program sums a tile of a stored block over one part of the tokens; dvalues is (parts, blocks, N, K)."""
    row_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    column_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    p = tile // (row_tiles * column_tiles) % blocks
    part = tile // (row_tiles * column_tiles) // blocks
    row = tl.cast(tile // column_tiles % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N), tl.int64)  # [BN]
    inner = tl.cast(tile % column_tiles * BLOCK_K + tl.arange(0, BLOCK_K), tl.int64)  # [BK]
    grad_columns = grad_ptr + (tl.cast(find_row(crow_ptr, block_rows, p), tl.int64) * N + row) * grad_stride_n  # [BN]
    x_columns = x_ptr + (tl.cast(tl.load(col_ptr + p), tl.int64) * K + inner) * x_stride_k  # [BK]
    last = tl.minimum((part + 1) * part_tokens, tokens)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # [BN, BK]
    for first in range(part * part_tokens, last, BLOCK_M):
        token = tl.cast(first + tl.arange(0, BLOCK_M), tl.int64)  # [BM]
        exists = token < last
        grad_mask = exists[None, :] & (row[:, None] < N)
        grad = tl.load(grad_columns[:, None] + token[None, :] * grad_stride_m, mask=grad_mask, other=0.0)  # [BN, BM]
        x_mask = exists[:, None] & (inner[None, :] < K)
        x = tl.load(x_columns[None, :] + token[:, None] * x_stride_m, mask=x_mask, other=0.0)  # [BM, BK]
        total = tl.dot(grad, x, total, input_precision=PRECISION)
    rows = (tl.cast(part, tl.int64) * blocks + p) * N + row  # [BN]
    tl.store(dvalues_ptr + rows[:, None] * K + inner[None, :], total, mask=(row[:, None] < N) & (inner[None, :] < K))


@triton.jit
def _gather_wgrad_kernel(
    grad_ptr,
    x_ptr,
    crow_ptr,
    col_ptr,
    dvalues_ptr,
    tokens,
    block_rows,
    blocks,
    part_tokens,
    row_programs,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_k,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As above, for every row_programs-th step of BLOCK_K stored columns, where t is column t % K of block t // K."""
    row_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    turn = tile % row_programs
    block_row = tile // (row_programs * row_tiles) % block_rows
    part = tile // (row_programs * row_tiles) // block_rows
    row = tl.cast(tile // row_programs % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N), tl.int64)  # [BN]
    start = tl.load(crow_ptr + block_row)
    stored = (tl.load(crow_ptr + block_row + 1) - start) * K
    grad_columns = grad_ptr + (tl.cast(block_row, tl.int64) * N + row) * grad_stride_n  # [BN]
    last = tl.minimum((part + 1) * part_tokens, tokens)
    for first_column in range(turn * BLOCK_K, stored, row_programs * BLOCK_K):
        t = first_column + tl.arange(0, BLOCK_K)  # [BK]
        stores = t < stored  # [BK]
        p = start + t // K  # [BK]
        column = tl.cast(tl.load(col_ptr + p, mask=stores, other=0), tl.int64) * K + t % K  # [BK]
        total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)  # [BK, BN]
        for first in range(part * part_tokens, last, BLOCK_M):
            token = tl.cast(first + tl.arange(0, BLOCK_M), tl.int64)  # [BM]
            exists = token < last
            x_columns = x_ptr + column[:, None] * x_stride_k  # [BK, 1]
            x_mask = stores[:, None] & exists[None, :]
            x = tl.load(x_columns + token[None, :] * x_stride_m, mask=x_mask, other=0.0)  # [BK, BM]
            grad_mask = exists[:, None] & (row[None, :] < N)
            grad_rows = token[:, None] * grad_stride_m  # [BM, 1]
            grad = tl.load(grad_columns[None, :] + grad_rows, mask=grad_mask, other=0.0)  # [BM, BN]
            total = tl.dot(x, grad, total, input_precision=PRECISION)
        rows = (tl.cast(part, tl.int64) * blocks + p)[:, None] * N + row[None, :]  # [BK, BN]
        mask = stores[:, None] & (row[None, :] < N)
        tl.store(dvalues_ptr + rows * K + (t % K)[:, None], total, mask=mask)


def plan_dgrad(
    grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, dx: Tensor, device: Device
) -> list[Launch]:
    """The launches that fill dx (M, K), not empty and contiguous, with grad (M, N) W."""
    pattern = transposed(crow_indices, col_indices, dx.shape[1] // values.shape[2])
    return plan_product(grad, pattern, values.transpose(1, 2), Epilogue(), dx, device)


_TRANSPOSED = WeakTensorKeyDictionary()


def transposed(crow_indices: Tensor, col_indices: Tensor, block_columns: int) -> Pattern:
    """Where the blocks of Wᵀ are, in the order of its rows. Kept for as long as col_indices lives unchanged."""
    keeps = type(col_indices) is Tensor and not col_indices.is_inference()  # has a version, and is not being traced
    if keeps:
        version = (crow_indices.data_ptr(), crow_indices._version, col_indices._version, block_columns)
        known = _TRANSPOSED.get(col_indices)
        if known is not None and known[0] == version:
            return known[1]
    blocks = torch.arange(col_indices.shape[0], device=col_indices.device, dtype=torch.int32)
    block_row = torch.searchsorted(crow_indices, blocks, right=True, out_int32=True) - 1  # (nnzb,)
    columns, order = torch.sort(col_indices, stable=True)
    borders = torch.arange(block_columns + 1, device=col_indices.device, dtype=torch.int32)
    crow = torch.searchsorted(columns, borders, out_int32=True)
    pattern = Pattern(crow, block_row.index_select(0, order), order.to(torch.int32))
    if keeps:
        _TRANSPOSED[col_indices] = (version, pattern)
    return pattern


def plan_wgrad(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block: tuple[int, int],
    device: Device,
) -> tuple[list[Launch], Tensor]:
    """The launch that fills (parts, nnzb, n, k), float32, and that tensor; its sum over the parts is the gradient.

    grad (M, N), x (M, K); M and nnzb are not 0. Tokens are parted where blocks are too few to fill the GPU.
    """
    n, k = block
    tokens, blocks, block_rows = x.shape[0], col_indices.shape[0], crow_indices.shape[0] - 1
    by_block = k % 16 == 0
    longest = tuned("bsr_linear", device.arch, "wgrad_float32" if x.dtype == torch.float32 else "wgrad_half")
    sides = {
        "BLOCK_M": min(max(triton.next_power_of_2(tokens), 16), longest["m"]),
        "BLOCK_N": min(max(triton.next_power_of_2(n), 16 if by_block else longest["least_n"]), longest["n"]),
        "BLOCK_K": min(triton.next_power_of_2(k), longest["k"]) if by_block else 64,
    }
    row_tiles = triton.cdiv(n, sides["BLOCK_N"])
    row_programs = triton.cdiv(blocks * k, block_rows * sides["BLOCK_K"])  # an average row takes one turn
    if by_block:
        tiles = blocks * row_tiles * triton.cdiv(k, sides["BLOCK_K"])
    else:
        tiles = block_rows * row_tiles * row_programs
        x = x.t().contiguous().t()  # columns are scattered: store each of them contiguously, tokens last
    steps = triton.cdiv(tokens, sides["BLOCK_M"])
    wanted = min(max(2 * device.processors // tiles, 1), triton.cdiv(steps, 4))
    part_tokens = triton.cdiv(steps, wanted) * sides["BLOCK_M"]
    parts = triton.cdiv(tokens, part_tokens)
    dvalues = torch.empty(parts, blocks, n, k, dtype=torch.float32, device=x.device)
    sizes = (tokens, block_rows, blocks, part_tokens, *(() if by_block else (row_programs,)))
    launch = Launch(
        kernel=_block_wgrad_kernel if by_block else _gather_wgrad_kernel,
        programs=parts * tiles,
        arguments=(grad, x, crow_indices, col_indices, dvalues, *sizes, *grad.stride(), *x.stride()),
        constants={"N": n, "K": k, "PRECISION": precision(x), **sides},
        options=compiler_options(dot_warps(sides["BLOCK_N"], sides["BLOCK_K"]), longest["stages"]),
    )
    return [launch], dvalues
