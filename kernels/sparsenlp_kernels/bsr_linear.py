"""bsr_linear, act(x Wᵀ + b) for a weight in BSR: compiled and simulated, not run on hardware.

A program computes a tile of tokens for one block row (or for BLOCK_N rows of it, where blocks are tall).
Two kernels differ in what a step of the reduction reads:

_block_kernel   k a multiple of 16: BLOCK_K columns of one block, which lie side by side in a row of x
_gather_kernel  any other block (8x1, 4x4, ...): BLOCK_K of the block row's stored columns, of several blocks

Both feed `tl.dot`: tensor cores for float16 and bfloat16, FMA for float32 (TF32 would miss the op's tolerance).
Needs compute capability 8.0 (cp.async and bfloat16 mma).

Source: BSR after Gray, Radford, Kingma 2017, "GPU Kernels for Block-Sparse Weights"; the gather of columns
after Chen et al. 2021, "Efficient Tensor Core-Based GPU Kernels for Structured Sparsity", doi:10.1145/3458817.3476182.
"""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_STAGES = 5  # a tile's column index is loaded stages before its x, which leaves two tiles in flight
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors


@triton.jit
def _locate(tokens, block_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tokens of the tile [BM], block row, rows within the block [BN]) of this program, the tiles int64.

    Programs that follow each other share a token tile, so that its part of x stays in L2.
    """
    tiles_per_block: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_tiles = block_rows * tiles_per_block
    pid = tl.program_id(0)
    row_tile = pid % row_tiles
    token = tl.cast(pid // row_tiles, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    row = tl.cast(row_tile % tiles_per_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.int64)  # [BN]
    return token, row_tile // tiles_per_block, row


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
def _finish(acc, y_ptr, bias_ptr, token, block_row, row, tokens, block_rows, N: tl.constexpr, ACTIVATION: tl.constexpr):
    """Add the bias to acc [BM, BN], apply the activation and store it into y (tokens, block_rows * N)."""
    column = tl.cast(block_row, tl.int64) * N + row  # [BN]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=row < N, other=0.0)  # [BN]
        acc += tl.cast(bias, tl.float32)[None, :]
    y = _activate(acc, ACTIVATION)
    target = y_ptr + token[:, None] * (tl.cast(block_rows, tl.int64) * N) + column[None, :]  # [BM, BN]
    tl.store(target, tl.cast(y, y_ptr.dtype.element_ty), mask=(token[:, None] < tokens) & (row[None, :] < N))


@triton.jit
def _block_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    bias_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Blocks of N x K, K a multiple of BLOCK_K; a step multiplies BLOCK_K columns of one block."""
    token, block_row, row = _locate(tokens, block_rows, N, BLOCK_M, BLOCK_N)
    start = tl.load(crow_ptr + block_row)
    count = tl.load(crow_ptr + block_row + 1) - start
    steps_per_block: tl.constexpr = K // BLOCK_K
    x_rows = x_ptr + token[:, None] * x_stride_m  # [BM, 1]
    w_rows = values_ptr + row[None, :] * STRIDE_N  # [1, BN]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BM, BN]
    for step in range(0, count * steps_per_block):
        p = start + step // steps_per_block
        inner = tl.cast(step % steps_per_block * BLOCK_K + tl.arange(0, BLOCK_K), tl.int64)  # [BK]
        column = tl.load(col_ptr + p) * K + inner  # [BK]
        x = tl.load(x_rows + column[None, :] * x_stride_k, mask=token[:, None] < tokens, other=0.0)  # [BM, BK]
        w_block = w_rows + tl.cast(p, tl.int64) * STRIDE_P
        w = tl.load(w_block + inner[:, None] * STRIDE_K, mask=row[None, :] < N, other=0.0)  # [BK, BN]
        acc = tl.dot(x, w, acc, input_precision="ieee")
    _finish(acc, y_ptr, bias_ptr, token, block_row, row, tokens, block_rows, N, ACTIVATION)


@triton.jit
def _gather_kernel(
    x_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    bias_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Blocks of N x K; a step multiplies BLOCK_K of the columns that the block row stores, of one block or several.

    Column t of a block row is column t % K of its block t // K.
    """
    token, block_row, row = _locate(tokens, block_rows, N, BLOCK_M, BLOCK_N)
    start = tl.load(crow_ptr + block_row)
    stored = (tl.load(crow_ptr + block_row + 1) - start) * K
    x_rows = x_ptr + token[:, None] * x_stride_m  # [BM, 1]
    w_rows = values_ptr + row[None, :] * STRIDE_N  # [1, BN]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BM, BN]
    for first in range(0, stored, BLOCK_K):
        t = first + tl.arange(0, BLOCK_K)  # [BK]
        live = t < stored  # [BK]
        p = start + t // K  # [BK]
        inner = tl.cast(t % K, tl.int64)  # [BK]
        column = tl.load(col_ptr + p, mask=live, other=0) * K + inner  # [BK]
        x_mask = (token[:, None] < tokens) & live[None, :]
        x = tl.load(x_rows + column[None, :] * x_stride_k, mask=x_mask, other=0.0)  # [BM, BK]
        w_columns = w_rows + tl.cast(p, tl.int64)[:, None] * STRIDE_P + inner[:, None] * STRIDE_K  # [BK, BN]
        w = tl.load(w_columns, mask=live[:, None] & (row[None, :] < N), other=0.0)  # [BK, BN]
        acc = tl.dot(x, w, acc, input_precision="ieee")
    _finish(acc, y_ptr, bias_ptr, token, block_row, row, tokens, block_rows, N, ACTIVATION)


@dataclass(frozen=True)
class Launch:
    """One launch: `kernel[(programs,)](*arguments, **constants, **options)`."""

    kernel: Any
    programs: int
    arguments: tuple[Tensor | int | float | None, ...]
    constants: dict[str, int | str]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.options)


def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """y = act(x Wᵀ + b) for a block-sparse W; no gradient.

    x             (..., K)      float32, float16 or bfloat16, on CUDA (on CPU where Triton interprets)
    crow_indices  (N / n + 1,)  int32, contiguous
    col_indices   (nnzb,)       int32, contiguous
    values        (nnzb, n, k)  dtype of x, any strides; the kernel is compiled for these strides
    bias          (N,)          dtype of x, or None
    activation    "none", "relu", "gelu" (by erf) or "gelu_tanh"
    returns       (..., N)      dtype of x; sums and activation are in float32

    The content of the indices is trusted. Raises TypeError for a dtype, ValueError for a shape, a device
    or an activation that does not fit.
    """
    _check(x, crow_indices, col_indices, values, bias, activation)
    y = x.new_empty(*x.shape[:-1], (crow_indices.numel() - 1) * values.shape[1])
    if y.numel():
        launch = plan(x, crow_indices, col_indices, values, bias, activation, y)
        with torch.cuda.device_of(x):
            launch.run()
    return y


def plan(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    y: Tensor,
) -> Launch:
    """The launch that fills y (..., N), not empty and contiguous, from arguments that are known to fit."""
    _, n, k = values.shape
    tokens, block_rows = math.prod(x.shape[:-1]), crow_indices.numel() - 1
    rows = x.reshape(tokens, x.shape[-1])
    by_block = k % 16 == 0
    if not by_block:  # the columns a step needs are scattered: store each of them contiguously, tokens last
        rows = rows.t().contiguous().t()
    tile = _tile(tokens, n, k, x.dtype)
    return Launch(
        kernel=_block_kernel if by_block else _gather_kernel,
        programs=triton.cdiv(tokens, tile["BLOCK_M"]) * block_rows * triton.cdiv(n, tile["BLOCK_N"]),
        arguments=(
            rows,
            crow_indices,
            col_indices,
            values,
            bias.contiguous() if bias is not None else None,
            y,
            tokens,
            block_rows,
            *rows.stride(),
        ),
        constants={
            "N": n,
            "K": k,
            **dict(zip(("STRIDE_P", "STRIDE_N", "STRIDE_K"), values.stride(), strict=True)),
            "ACTIVATION": activation,
            **tile,
        },
        options=_options(tile),
    )


def _tile(tokens: int, n: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Sides of a program's tile: powers of two that `tl.dot` takes, that fit registers and 99 KiB of shared memory."""
    side, depth = (64, 32) if dtype == torch.float32 else (128, 64)
    return {
        "BLOCK_M": min(max(triton.next_power_of_2(tokens), 16), side),
        "BLOCK_N": min(max(triton.next_power_of_2(n), 8), side),
        "BLOCK_K": min(k & -k, depth) if k % 16 == 0 else 32,
    }


def _options(tile: dict[str, int]) -> dict[str, int | bool]:
    """Compiler options of a tile: 1 warp for 16 x 16, 4 from a side of 64 on, 8 for 128 x 128."""
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    return {
        "num_warps": 8 if m * n >= 128 * 128 else min(max(m, n) // 16, 4),
        "num_stages": NUM_STAGES,
        "enable_fp_fusion": True,  # Triton 3.10 turns it off where it is not asked for
    }


def _check(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> None:
    """Raise TypeError or ValueError unless the arguments of bsr_linear fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"bsr_linear: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dtype not in DTYPES:
        raise TypeError(f"bsr_linear: expected x of dtype float32, float16 or bfloat16, got {x.dtype}")
    device = "cpu" if INTERPRETED else "cuda"
    if x.device.type != device:
        raise ValueError(f"bsr_linear: expected x on {device}, got {x.device}")
    named = {"crow_indices": crow_indices, "col_indices": col_indices, "values": values}
    for name, tensor in {**named, **({} if bias is None else {"bias": bias})}.items():
        dtype = torch.int32 if name in ("crow_indices", "col_indices") else x.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"bsr_linear: expected {name} of dtype {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"bsr_linear: expected {name} on {x.device}, got {tensor.device}")
    if values.dim() != 3 or 0 in values.shape[1:]:
        raise ValueError(f"bsr_linear: expected values of shape (nnzb, n, k), got {tuple(values.shape)}")
    blocks, n, k = values.shape
    if crow_indices.dim() != 1 or not crow_indices.numel() or not crow_indices.is_contiguous():
        raise ValueError(f"bsr_linear: expected 1-D contiguous crow_indices, got shape {tuple(crow_indices.shape)}")
    if col_indices.shape != (blocks,) or not col_indices.is_contiguous():
        raise ValueError(f"bsr_linear: expected {blocks} contiguous col_indices, got shape {tuple(col_indices.shape)}")
    if not x.dim() or x.shape[-1] % k:
        raise ValueError(f"bsr_linear: expected K in x to be a multiple of {k}, got shape {tuple(x.shape)}")
    rows = (crow_indices.numel() - 1) * n
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bsr_linear: expected bias of shape ({rows},), got {tuple(bias.shape)}")
