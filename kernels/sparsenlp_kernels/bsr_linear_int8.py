"""Tokens rounded to int8, for bsr_linear with int8 weights: compiled and simulated, not run on hardware."""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bsr_linear_product import INT8_UNIT
from .launch import Launch

COLUMNS = 2**31 // 127**2
"""Columns of int8 that int32 can add up, all of them 127 times 127."""


@triton.jit
def _round(v):
    """v in [-127, 127] to the nearest whole number, halves to even."""
    return (v + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no fractions there


@triton.jit
def _quantize_kernel(
    x_ptr,
    rounded_ptr,
    scale_ptr,
    tokens,
    columns,
    x_stride_m,
    x_stride_k,
    rounded_stride_m,
    rounded_stride_k,
    input_scale,
    BY_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program rounds BLOCK_M tokens: by input_scale, or each by its largest magnitude / 127, or 1 if that is 0.

    UNIT columns of rounded lie side by side, and its strides are counted in them.
    """
    token = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    x_rows = x_ptr + token[:, None] * x_stride_m  # [BM, 1]
    rounded_rows = rounded_ptr + token[:, None] * rounded_stride_m * UNIT  # [BM, 1]
    scale = tl.zeros((BLOCK_M,), tl.float32) + input_scale  # [BM]
    if BY_TOKEN:
        largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)  # [BM, BK]
        for first in range(0, columns, BLOCK_K):
            column = tl.cast(first + tl.arange(0, BLOCK_K), tl.int64)  # [BK]
            mask = (token[:, None] < tokens) & (column[None, :] < columns)
            x = tl.load(x_rows + column[None, :] * x_stride_k, mask=mask, other=0.0)  # [BM, BK]
            largest = tl.maximum(largest, tl.abs(tl.cast(x, tl.float32)))
        peak = tl.max(largest, 1)  # [BM]
        scale = tl.where(peak == 0, 1.0, tl.div_rn(peak, tl.full((BLOCK_M,), 127.0, tl.float32)))
    inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), scale)[:, None]  # [BM, 1]
    nan = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)  # [BM, BK], NaN where x has been, else 0
    for first in range(0, columns, BLOCK_K):
        column = tl.cast(first + tl.arange(0, BLOCK_K), tl.int64)  # [BK]
        mask = (token[:, None] < tokens) & (column[None, :] < columns)
        x = tl.cast(tl.load(x_rows + column[None, :] * x_stride_k, mask=mask, other=0.0), tl.float32)  # [BM, BK]
        nan += tl.where(x != x, x, 0.0)
        v = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
        rounded = tl.cast(_round(tl.where(v == v, v, 0.0)), tl.int8)
        place = column // UNIT * rounded_stride_k * UNIT + column % UNIT  # [BK]
        tl.store(rounded_rows + place[None, :], rounded, mask=mask)
    tl.store(scale_ptr + token, scale + tl.sum(nan, 1), mask=token < tokens)  # a scale of NaN makes NaN of the token


def plan_quantize(rows: Tensor, input_scale: float, in_units: bool) -> tuple[Tensor, Tensor, Launch]:
    """(int8 rows (tokens, K), float32 scales (tokens,), the launch that fills them); input_scale 0: one per token.

    in_units  the int8 rows are (tokens, K / INT8_UNIT, INT8_UNIT), tokens before units in memory, for a kernel that
              gathers columns; K is a multiple of INT8_UNIT
    """
    tokens, columns = rows.shape
    unit = INT8_UNIT if in_units else 1
    shape = (columns // unit, tokens, unit) if in_units else (tokens, columns)
    rounded = torch.empty(shape, dtype=torch.int8, device=rows.device)
    rounded = rounded.transpose(0, 1) if in_units else rounded
    strides = (step // unit for step in rounded.stride()[:2])
    scale = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    sides = {"BLOCK_M": 32, "BLOCK_K": 64} if in_units else {"BLOCK_M": 1, "BLOCK_K": 1024}
    launch = Launch(
        kernel=_quantize_kernel,
        programs=triton.cdiv(tokens, sides["BLOCK_M"]),
        arguments=(rows, rounded, scale, tokens, columns, *rows.stride(), *strides, float(input_scale)),
        constants={"BY_TOKEN": not input_scale, "UNIT": unit, **sides},
        options={"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False},
    )
    return rounded, scale, launch
