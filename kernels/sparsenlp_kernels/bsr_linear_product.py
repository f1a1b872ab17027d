"""x Wᵀ for a weight in BSR, the product behind bsr_linear and its gradient in x: compiled and simulated, not run
on hardware.

Two kernels divide the stored blocks among programs:

_tile_kernel    a program computes a tile of tokens for one block row (BLOCK_N rows of it, where blocks are tall)
_stream_kernel  a program takes as many stored blocks as every other, wherever rows begin and end, so that few rows
                or rows of uneven length still fill the GPU; _join_kernel adds up the rows that were divided

Both sum in one of four ways. A step of the reduction reads BLOCK_K columns of one block, which lie side by side in a
row of x, where BLOCK_K divides k; for any other block (8x1, 4x4, ...) it gathers BLOCK_K of the stored columns of
several blocks. It multiplies by `tl.dot` (tensor cores; FMA for float32, unless TF32 is allowed), or, for few tokens,
by FMA in registers, where a token does not take the place of 16.

Where a dot gathers columns, each is contiguous, tokens last, so that threads that follow each other read neighbours.
Of int8 that holds for units of 4 columns: tensor cores take int8 with the columns of a token side by side, in units of
4, and an asynchronous copy moves no fewer than 4 bytes.

Source: BSR after Gray, Radford, Kingma 2017, "GPU Kernels for Block-Sparse Weights"; the gather of columns after
Chen et al. 2021, "Efficient Tensor Core-Based GPU Kernels for Structured Sparsity", doi:10.1145/3458817.3476182;
equal shares of the work after Osama et al. 2023, "Stream-K", arXiv:2301.03598.
"""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Device, Launch, tuned

INT8_UNIT = 4
"""Columns of int8 that stay side by side; k of a block is a multiple."""


@triton.jit
def _locate(tile, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, row_blocks):
    """(tokens of the tile [BM], block row or range, rows within the block [BN]) of a program, the tiles int64.

    Programs that follow each other share a token tile, so that its part of x stays in L2.
    """
    tiles_per_block: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_tiles = row_blocks * tiles_per_block
    row_tile = tile % row_tiles
    token = tl.cast(tile // row_tiles, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    row = tl.cast(row_tile % tiles_per_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.int64)  # [BN]
    return token, row_tile // tiles_per_block, row


@triton.jit
def _step(
    col_ptr,
    order_ptr,
    start,
    stored,
    step,
    x_stride_k,
    K: tl.constexpr,
    STRIDE_P: tl.constexpr,
    STRIDE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(offsets in a row of x [BK], offsets in values [BK], which columns exist [BK]) of a step.

    Column t of the blocks from `start` on is column t % K of block start + t // K. UNIT columns of x lie side by side,
    and x_stride_k is counted in them.
    """
    if K % BLOCK_K == 0:  # one block
        p = start + step // (K // BLOCK_K)
        inner = tl.cast(step % (K // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K), tl.int64)  # [BK]
        exists = tl.full((BLOCK_K,), True, tl.int1)  # [BK]
        block_column = tl.load(col_ptr + p)
        unit, within = inner, 0
        place = p
        if order_ptr is not None:
            place = tl.load(order_ptr + p)
    else:
        t = step * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
        exists = t < stored  # [BK]
        p = start + t // K  # [BK]
        inner = tl.cast(t % K, tl.int64)  # [BK]
        block_column = tl.load(col_ptr + p, mask=exists, other=0)  # [BK]
        unit, within = t // UNIT % (K // UNIT), t % UNIT  # [BK]; of `inner` Triton would not see which are contiguous
        place = p
        if order_ptr is not None:
            place = tl.load(order_ptr + p, mask=exists, other=0)  # [BK]
    x_offset = (tl.cast(block_column, tl.int64) * (K // UNIT) + unit) * x_stride_k * UNIT + within  # [BK]
    return x_offset, tl.cast(place, tl.int64) * STRIDE_P + inner * STRIDE_K, exists


@triton.jit
def _sum_blocks(
    x_ptr,
    col_ptr,
    values_ptr,
    order_ptr,
    start,
    end,
    token,
    row,
    tokens,
    x_stride_m,
    x_stride_k,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_P: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x Wᵀ of blocks start..end, which are of one block row: [BM, BN], float32, for int8 int32."""
    SUM: tl.constexpr = tl.int32 if values_ptr.dtype.element_ty == tl.int8 else tl.float32
    stored = (end - start) * K
    steps = (stored + BLOCK_K - 1) // BLOCK_K
    if DOT:
        UNIT: tl.constexpr = 4 if values_ptr.dtype.element_ty == tl.int8 and K % BLOCK_K else 1  # INT8_UNIT
        x_rows = x_ptr + token[:, None] * x_stride_m * UNIT  # [BM, 1]
        w_rows = values_ptr + row[None, :] * STRIDE_N  # [1, BN]
        total = tl.zeros((BLOCK_M, BLOCK_N), SUM)  # [BM, BN]
        for step in range(0, steps):
            x_offset, w_offset, exists = _step(
                col_ptr, order_ptr, start, stored, step, x_stride_k, K, STRIDE_P, STRIDE_K, BLOCK_K, UNIT
            )
            x_mask = (token[:, None] < tokens) & exists[None, :]
            x = tl.load(x_rows + x_offset[None, :], mask=x_mask, other=0)  # [BM, BK]
            w = tl.load(w_rows + w_offset[:, None], mask=exists[:, None] & (row[None, :] < N), other=0)  # [BK, BN]
            total = tl.dot(x, w, total, input_precision=PRECISION)
        return total
    else:
        x_rows = x_ptr + token[:, None, None] * x_stride_m  # [BM, 1, 1]
        w_rows = values_ptr + row[None, :, None] * STRIDE_N  # [1, BN, 1]
        parts = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), SUM)  # [BM, BN, BK]
        for step in range(0, steps):
            x_offset, w_offset, exists = _step(
                col_ptr, order_ptr, start, stored, step, x_stride_k, K, STRIDE_P, STRIDE_K, BLOCK_K, 1
            )
            x_mask = (token[:, None, None] < tokens) & exists[None, None, :]
            x = tl.load(x_rows + x_offset[None, None, :], mask=x_mask, other=0)  # [BM, 1, BK]
            w_mask = exists[None, None, :] & (row[None, :, None] < N)
            w = tl.load(w_rows + w_offset[None, None, :], mask=w_mask, other=0)  # [1, BN, BK]
            parts += tl.cast(x, SUM) * tl.cast(w, SUM)
        return tl.sum(parts, 2)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """The activation of a float32 tile; NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3)
        y = y / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    return y


@triton.jit
def _finish(
    total,
    bias_ptr,
    residual_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    token,
    block_row,
    row,
    tokens,
    block_rows,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store act(total [BM, BN] * scales + bias + residual) into y (tokens, block_rows * N)."""
    column = tl.cast(block_row, tl.int64) * N + row  # [BN]
    y = tl.cast(total, tl.float32)  # [BM, BN]
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)  # [BM]
        w_scale = tl.load(w_scale_ptr + column, mask=row < N, other=0.0)  # [BN]
        y *= x_scale[:, None] * w_scale[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=row < N, other=0.0)  # [BN]
        y += tl.cast(bias, tl.float32)[None, :]
    place = token[:, None] * (tl.cast(block_rows, tl.int64) * N) + column[None, :]  # [BM, BN]
    mask = (token[:, None] < tokens) & (row[None, :] < N)
    if residual_ptr is not None:
        y += tl.cast(tl.load(residual_ptr + place, mask=mask, other=0.0), tl.float32)
    tl.store(y_ptr + place, tl.cast(_activate(y, ACTIVATION), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    order_ptr,
    bias_ptr,
    residual_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    tokens,
    block_rows,
    x_stride_m,
    x_stride_k,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_P: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program is a tile of tokens and of one block row."""
    token, block_row, row = _locate(tl.program_id(0), N, BLOCK_M, BLOCK_N, block_rows)
    start, end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)
    total = _sum_blocks(
        x_ptr, col_ptr, values_ptr, order_ptr, start, end, token, row, tokens, x_stride_m, x_stride_k,
        N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    _finish(
        total, bias_ptr, residual_ptr, x_scale_ptr, w_scale_ptr, y_ptr,
        token, block_row, row, tokens, block_rows, N, ACTIVATION,
    )  # fmt: skip


@triton.jit
def find_row(crow_ptr, block_rows, p):
    """The block row of stored block p."""
    low, high = 0, block_rows - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(crow_ptr + middle + 1) <= p:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _part(parts_ptr, share, slot, token, row, tokens, N: tl.constexpr):
    """Pointers [BM, BN] to the sum of a share (2 slots: a row that began before it, a row that ends after it)."""
    rows = (tl.cast(share, tl.int64) * 2 + slot) * tokens + token  # [BM]
    return parts_ptr + rows[:, None] * N + row[None, :]


@triton.jit
def _stream_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    order_ptr,
    bias_ptr,
    residual_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    parts_ptr,
    tokens,
    block_rows,
    blocks,
    share_blocks,
    x_stride_m,
    x_stride_k,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_P: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program is a tile of tokens and a share of the stored blocks; rows that others share with it go to parts."""
    shares = (blocks + share_blocks - 1) // share_blocks
    token, share, row = _locate(tl.program_id(0), N, BLOCK_M, BLOCK_N, shares)
    first = share * share_blocks
    last = tl.minimum(first + share_blocks, blocks)
    p = first
    block_row = find_row(crow_ptr, block_rows, first)
    while p < last:
        row_start, row_end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)
        stop = tl.minimum(row_end, last)
        if stop > p:
            total = _sum_blocks(
                x_ptr, col_ptr, values_ptr, order_ptr, p, stop, token, row, tokens, x_stride_m, x_stride_k,
                N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
            )  # fmt: skip
            if (row_start >= first) & (row_end <= last):
                _finish(
                    total, bias_ptr, residual_ptr, x_scale_ptr, w_scale_ptr, y_ptr,
                    token, block_row, row, tokens, block_rows, N, ACTIVATION,
                )  # fmt: skip
            else:
                slot = tl.where(p == first, 0, 1)
                mask = (token[:, None] < tokens) & (row[None, :] < N)
                tl.store(_part(parts_ptr, share, slot, token, row, tokens, N), total, mask=mask)
        p = stop
        block_row += 1


@triton.jit
def _join_kernel(
    crow_ptr,
    bias_ptr,
    residual_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    parts_ptr,
    tokens,
    block_rows,
    share_blocks,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Finish the rows that _stream_kernel divided, adding up their parts in order, and the empty rows."""
    token, block_row, row = _locate(tl.program_id(0), N, BLOCK_M, BLOCK_N, block_rows)
    start, end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)
    first_share, last_share = start // share_blocks, (end - 1) // share_blocks
    if (first_share < last_share) | (start == end):
        mask = (token[:, None] < tokens) & (row[None, :] < N)
        total = tl.zeros((BLOCK_M, BLOCK_N), parts_ptr.dtype.element_ty)  # [BM, BN]
        if start < end:
            for share in range(first_share, last_share + 1):
                slot = tl.where((share == first_share) & (start > share * share_blocks), 1, 0)
                total += tl.load(_part(parts_ptr, share, slot, token, row, tokens, N), mask=mask, other=0)
        _finish(
            total, bias_ptr, residual_ptr, x_scale_ptr, w_scale_ptr, y_ptr,
            token, block_row, row, tokens, block_rows, N, ACTIVATION,
        )  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Where blocks are, as in BSR; `order` says where in values the blocks lie, None as they come.

    crow    (block_rows + 1,)  int32
    col     (nnzb,)            int32
    order   (nnzb,)            int32
    """

    crow: Tensor
    col: Tensor
    order: Tensor | None = None

    @property
    def block_rows(self) -> int:
        return self.crow.shape[0] - 1


@dataclass(frozen=True)
class Epilogue:
    """What follows the product: y = act(product * x_scale * w_scale + bias + residual), tensors contiguous or None."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    x_scale: Tensor | None = None
    w_scale: Tensor | None = None
    activation: str = "none"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.bias, self.residual, self.x_scale, self.w_scale


def plan_product(
    rows: Tensor, pattern: Pattern, values: Tensor, epilogue: Epilogue, y: Tensor, device: Device
) -> list[Launch]:
    """The launches that fill y (tokens, N), contiguous and not empty, with the epilogue of rows (tokens, K) Wᵀ.

    Rows of int8 whose columns are gathered are in units, (tokens, K / INT8_UNIT, INT8_UNIT), as of plan_quantize.
    The stored blocks are streamed where tiles would not fill the GPU `waves` times over, so that the longest row
    cannot be what the GPU waits for.
    """
    blocks, n, k = values.shape
    tokens, block_rows = rows.shape[0], pattern.block_rows
    tile, options = choose_tile(tokens, n, k, values.dtype, device)
    if rows.dim() == 3:
        stride = tuple(step // INT8_UNIT for step in rows.stride()[:2])
    else:
        if gathers(tokens, n, k, values.dtype, device) and rows.stride(0) != 1:
            rows = rows.t().contiguous().t()
        stride = rows.stride()
    sides = {name: tile[name] for name in ("BLOCK_M", "BLOCK_N")}
    token_tiles, tiles_per_block = triton.cdiv(tokens, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"])
    per_block_row = token_tiles * tiles_per_block
    strides = dict(zip(("STRIDE_P", "STRIDE_N", "STRIDE_K"), values.stride(), strict=True))
    constants = {"N": n, "K": k, **strides, "ACTIVATION": epilogue.activation, "PRECISION": precision(rows), **tile}
    weight = (pattern.crow, pattern.col, values, pattern.order)
    share = _share(blocks, k * n, block_rows, per_block_row, device)
    if not share:
        arguments: tuple = (rows, *weight, *epilogue.tensors, y, tokens, block_rows, *stride)
        return [Launch(_tile_kernel, per_block_row * block_rows, arguments, constants, options)]
    shares = triton.cdiv(blocks, share)
    sums = torch.int32 if values.dtype == torch.int8 else torch.float32
    parts = torch.empty(shares, 2, tokens, n, dtype=sums, device=rows.device)
    arguments = (rows, *weight, *epilogue.tensors, y, parts, tokens, block_rows, blocks, share, *stride)
    joined = (pattern.crow, *epilogue.tensors, y, parts, tokens, block_rows, share)
    join = {"N": n, "ACTIVATION": epilogue.activation, **sides}
    return [
        Launch(_stream_kernel, per_block_row * shares, arguments, constants, options),
        Launch(_join_kernel, per_block_row * block_rows, joined, join, options),
    ]


def _share(blocks: int, block_size: int, block_rows: int, per_block_row: int, device: Device) -> int:
    """Blocks of a share where blocks are to be streamed, else 0."""
    limits = tuned("bsr_linear", device.arch, "stream")
    if per_block_row * block_rows >= limits["waves"] * device.processors:
        return 0
    shares = max(2 * device.processors // per_block_row, 1)
    share = max(triton.cdiv(blocks, shares), triton.cdiv(limits["values"], block_size))
    return share if share < blocks else 0


def choose_tile(
    tokens: int, n: int, k: int, dtype: torch.dtype, device: Device
) -> tuple[dict[str, int], dict[str, int | bool]]:
    """A program's tile (sides that are powers of two, and whether it multiplies by dot) and its compiler options.

    From a row of the tuned table: "fma", or for dots "float32", "half" or "int8". `m`, `n` and `k` are the longest
    sides, `least_n` the shortest that tensor cores take, `stages` those of the pipeline; "fma" is used for up to
    `tokens` tokens, and a step of it reads `values` values of the weight.
    A dot gathers 32 columns a step, of int8 64: the fewest for which a thread's part of 8 rows of W is 4 bytes.
    A dot takes 1 warp for 16 x 16, 4 from a side of 64 on, 8 for 128 x 128; FMA 1 for 256 values, up to 4 (on 4 warps,
    small tiles spilled).
    """
    power = k & -k  # the largest power of two that divides k
    fma = tuned("bsr_linear", device.arch, "fma")
    if tokens <= fma["tokens"]:
        m, side = triton.next_power_of_2(tokens), min(triton.next_power_of_2(n), fma["n"])
        depth = max(fma["values"] // (m * side), 32)
        tile = {"DOT": False, "BLOCK_M": m, "BLOCK_N": side, "BLOCK_K": min(power, depth) if power >= 32 else depth}
        values = side * tile["BLOCK_K"]
        return tile, compiler_options(max(1, min(values // 256, 4)), fma["stages"])
    kind = {torch.int8: "int8", torch.float32: "float32"}.get(dtype, "half")
    longest = tuned("bsr_linear", device.arch, kind)
    m = min(max(triton.next_power_of_2(tokens), 16), longest["m"])
    side = min(max(triton.next_power_of_2(n), longest["least_n"]), longest["n"])
    by_block = power >= (32 if kind == "int8" else 16)  # the shortest k of a tensor core's product
    gathered = 64 if kind == "int8" else 32
    tile = {"DOT": True, "BLOCK_M": m, "BLOCK_N": side, "BLOCK_K": min(power, longest["k"]) if by_block else gathered}
    return tile, compiler_options(dot_warps(m, side), longest["stages"])


def gathers(tokens: int, n: int, k: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether a dot takes scattered columns of x, so that each of them (of int8: each unit) should be contiguous."""
    tile, _ = choose_tile(tokens, n, k, dtype, device)
    return bool(tile["DOT"] and k % tile["BLOCK_K"])


def dot_warps(m: int, n: int) -> int:
    return 8 if m * n >= 128 * 128 else max(1, min(max(m, n) // 16, 4))


def compiler_options(warps: int, stages: int) -> dict[str, int | bool]:
    """Triton 3.10 fuses multiply and add only where it is asked to."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def precision(x: Tensor) -> str:
    """How float32 is multiplied: by TF32 only where torch may, since it misses the op's tolerance."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
