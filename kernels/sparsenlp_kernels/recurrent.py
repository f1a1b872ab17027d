"""The steps of sparse_lstm and sparse_gru, after the product of all inputs: compiled and simulated, not run on
hardware.

Two kernels compute the same tiles of sequences and hidden units, each with the sums of all gates, what the gates do,
and the new state:

_step_kernel      a launch for each step; a program is one tile
_sequence_kernel  one launch for all steps; a program has some sequences and all hidden units, so that no program waits
                  for another, and takes the tiles of a step one after the other

Sums are those of bsr_linear_product.py. The hidden state is in a buffer of its own, twice: a step reads one half and
writes the other.
"""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .bsr_linear_product import _sum_blocks, choose_tile, gathers, precision
from .launch import Device, Launch, run

SEQUENCE_BYTES = 128 * 1024
"""Stored recurrent weights up to which one launch does all steps: about what one multiprocessor reads from L2 while a
kernel is launched. Reasoned, not measured."""


@triton.jit
def _tanh(v):
    return 2 * tl.sigmoid(2 * v) - 1


@triton.jit
def _gate(
    gate,
    bias_ptr,
    h_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    block,
    row,
    sequence,
    batch,
    h_stride_m,
    h_stride_k,
    UNITS: tl.constexpr,
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
    """What the state adds to a gate: W_hh h + b_hh of its rows, [BM, BN], float32; also of sequences that have ended.

    Those are not masked, as only of the batch, an argument, is it known that 16 divides it, which wide copies need.
    """
    block_row = gate * (UNITS // N) + block
    start, end = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)
    total = _sum_blocks(
        h_ptr, col_ptr, values_ptr, None, start, end, sequence, row, batch, h_stride_m, h_stride_k,
        N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + tl.cast(block_row, tl.int64) * N + row, mask=row < N, other=0.0)  # [BN]
        total += tl.cast(bias, tl.float32)[None, :]
    return total


@triton.jit
def _tile(
    tile,
    sequence,
    step,
    inputs_ptr,
    bias_ptr,
    h_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    c_ptr,
    y_ptr,
    h_n_ptr,
    gates_ptr,
    cells_ptr,
    table_ptr,
    batch,
    h_stride_m,
    h_stride_k,
    y_stride,
    GATES: tl.constexpr,
    UNITS: tl.constexpr,
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
    """One step of BM sequences [BM] and of a tile of at most BN units, which are rows of one block in every gate."""
    tiles_per_block: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tile // tiles_per_block
    row = tl.cast(tile % tiles_per_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.int64)  # [BN]
    unit = tl.cast(block, tl.int64) * N + row  # [BN]
    start, size = tl.load(table_ptr + 2 * step), tl.load(table_ptr + 2 * step + 1)
    following = tl.load(table_ptr + 2 * step + 3)
    token = tl.cast(start, tl.int64) + sequence  # [BM]
    mask = (sequence[:, None] < size) & (row[None, :] < N)  # [BM, BN]
    half = tl.cast(batch, tl.int64) * UNITS
    before_ptr, after_ptr = h_ptr + step % 2 * half, h_ptr + (step + 1) % 2 * half
    h_place = sequence[:, None] * h_stride_m + unit[None, :] * h_stride_k  # [BM, BN]
    state_place = sequence[:, None] * UNITS + unit[None, :]  # [BM, BN]
    input_place = token[:, None] * (GATES * UNITS) + unit[None, :]  # [BM, BN]
    gates_place = token[:, None] * (4 * UNITS) + unit[None, :]  # [BM, BN]

    first = tl.cast(tl.load(inputs_ptr + input_place, mask=mask, other=0.0), tl.float32)  # [BM, BN]
    first += _gate(
        0, bias_ptr, before_ptr, crow_ptr, col_ptr, values_ptr, block, row, sequence, batch, h_stride_m, h_stride_k,
        UNITS, N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    first = tl.sigmoid(first)
    second = tl.cast(tl.load(inputs_ptr + (input_place + UNITS), mask=mask, other=0.0), tl.float32)  # [BM, BN]
    second += _gate(
        1, bias_ptr, before_ptr, crow_ptr, col_ptr, values_ptr, block, row, sequence, batch, h_stride_m, h_stride_k,
        UNITS, N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    second = tl.sigmoid(second)
    third = tl.cast(tl.load(inputs_ptr + (input_place + 2 * UNITS), mask=mask, other=0.0), tl.float32)  # [BM, BN]
    of_state = _gate(
        2, bias_ptr, before_ptr, crow_ptr, col_ptr, values_ptr, block, row, sequence, batch, h_stride_m, h_stride_k,
        UNITS, N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    if GATES == 4:  # input, forget, cell, output
        third = _tanh(third + of_state)
        fourth = tl.cast(tl.load(inputs_ptr + (input_place + 3 * UNITS), mask=mask, other=0.0), tl.float32)  # [BM, BN]
        fourth += _gate(
            3, bias_ptr, before_ptr, crow_ptr, col_ptr, values_ptr, block, row, sequence, batch, h_stride_m, h_stride_k,
            UNITS, N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        fourth = tl.sigmoid(fourth)
        cell = second * tl.load(c_ptr + state_place, mask=mask, other=0.0) + first * third
        tl.store(c_ptr + state_place, cell, mask=mask)
        if cells_ptr is not None:
            tl.store(cells_ptr + token[:, None] * UNITS + unit[None, :], cell, mask=mask)
        h = fourth * _tanh(cell)
    else:  # reset, update, new
        third = _tanh(third + first * of_state)
        fourth = of_state
        h = third + second * (tl.cast(tl.load(before_ptr + h_place, mask=mask, other=0.0), tl.float32) - third)
    if gates_ptr is not None:
        tl.store(gates_ptr + gates_place, first, mask=mask)
        tl.store(gates_ptr + (gates_place + UNITS), second, mask=mask)
        tl.store(gates_ptr + (gates_place + 2 * UNITS), third, mask=mask)
        tl.store(gates_ptr + (gates_place + 3 * UNITS), fourth, mask=mask)
    h = tl.cast(h, y_ptr.dtype.element_ty)
    tl.store(after_ptr + h_place, h, mask=mask)
    tl.store(y_ptr + token[:, None] * y_stride + unit[None, :], h, mask=mask)
    tl.store(h_n_ptr + state_place, h, mask=mask & (sequence[:, None] >= following))


@triton.jit(do_not_specialize=["step"])
def _step_kernel(
    inputs_ptr,
    bias_ptr,
    h_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    c_ptr,
    y_ptr,
    h_n_ptr,
    gates_ptr,
    cells_ptr,
    table_ptr,
    batch,
    h_stride_m,
    h_stride_k,
    y_stride,
    step,
    GATES: tl.constexpr,
    UNITS: tl.constexpr,
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
    """A program is a tile of one step. Programs that follow each other share sequences."""
    tiles: tl.constexpr = UNITS // N * ((N + BLOCK_N - 1) // BLOCK_N)
    sequence = tl.cast(tl.program_id(0) // tiles, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    _tile(
        tl.program_id(0) % tiles, sequence, step, inputs_ptr, bias_ptr, h_ptr, crow_ptr, col_ptr, values_ptr, c_ptr,
        y_ptr, h_n_ptr, gates_ptr, cells_ptr, table_ptr, batch, h_stride_m, h_stride_k, y_stride,
        GATES, UNITS, N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip


@triton.jit
def _sequence_kernel(
    inputs_ptr,
    bias_ptr,
    h_ptr,
    crow_ptr,
    col_ptr,
    values_ptr,
    c_ptr,
    y_ptr,
    h_n_ptr,
    gates_ptr,
    cells_ptr,
    table_ptr,
    batch,
    h_stride_m,
    h_stride_k,
    y_stride,
    steps,
    GATES: tl.constexpr,
    UNITS: tl.constexpr,
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
    """A program is BM sequences: all steps and all units of them."""
    tiles: tl.constexpr = UNITS // N * ((N + BLOCK_N - 1) // BLOCK_N)
    sequence = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    for step in range(0, steps):
        if tl.load(table_ptr + 2 * step + 1) > tl.program_id(0) * BLOCK_M:
            for tile in range(0, tiles):
                _tile(
                    tile, sequence, step, inputs_ptr, bias_ptr, h_ptr, crow_ptr, col_ptr, values_ptr, c_ptr,
                    y_ptr, h_n_ptr, gates_ptr, cells_ptr, table_ptr, batch, h_stride_m, h_stride_k, y_stride,
                    GATES, UNITS, N, K, STRIDE_P, STRIDE_N, STRIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
                )  # fmt: skip
        tl.debug_barrier()  # the next step reads what other threads of the program wrote


def recurrent(
    inputs: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    table: Tensor,
) -> None:
    """All steps of one direction of a layer with H units, B sequences and G gates: 4 for an LSTM, 3 for a GRU.

    inputs   (tokens, G H)  W_ih x + b_ih; float32, float16 or bfloat16, on a GPU (on CPU where Triton interprets)
    weight   W_hh, (G H, H) in BSR, whose blocks have a height that divides H; dtype of inputs. It is trusted
    bias     (G H,)         b_hh, or None
    h        (B, H)         the initial state
    c        (B, H)         float32, contiguous: the initial cells of an LSTM, which become the final ones; else None
    y        (tokens, H)    to fill; rows may lie apart
    h_n      (B, H)         contiguous, to fill
    gates    (tokens, 4 H)  float32, contiguous, to fill, or None: gates after sigmoid and tanh; of a GRU reset, update,
                            new, and what reset multiplies
    cells    (tokens, H)    float32, contiguous, to fill, or None
    table    (T + 1, 2)     int32: first token and sequences of each step, in the order they are taken, then zeros
    """
    arguments = (inputs, crow_indices, col_indices, values, bias, h, c, y, h_n, gates, cells, table)
    run(plan(*arguments, device=Device.of(inputs)), inputs)


def whole_sequence(values: Tensor, steps: int) -> bool:
    """Whether one launch does all steps of a direction with these recurrent weights."""
    return steps > 1 and values.numel() * values.element_size() <= SEQUENCE_BYTES


def plan(
    inputs: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    table: Tensor,
    *,
    device: Device,
    whole: bool | None = None,
) -> list[Launch]:
    """The launches, in order. whole: one for all steps, or one for each; None chooses."""
    batch, units = h.shape
    _, n, k = values.shape
    steps = table.shape[0] - 1
    tile, options = _narrower(*choose_tile(batch, n, k, values.dtype, device))
    if gathers(batch, n, k, values.dtype, device):
        h = h.expand(2, batch, units).transpose(1, 2).contiguous().transpose(1, 2)
    else:
        h = h.repeat(2, 1, 1)
    constants: dict[str, Any] = {"GATES": inputs.shape[1] // units, "UNITS": units, "N": n, "K": k}
    constants |= dict(zip(("STRIDE_P", "STRIDE_N", "STRIDE_K"), values.stride(), strict=True))
    constants |= {**tile, "PRECISION": precision(values)}
    tensors = (inputs, bias, h, crow_indices, col_indices, values, c, y, h_n, gates, cells, table)
    arguments = (*tensors, batch, *h.stride()[1:], y.stride(0))
    sequence_tiles = triton.cdiv(batch, tile["BLOCK_M"])
    if whole_sequence(values, steps) if whole is None else whole:
        return [Launch(_sequence_kernel, sequence_tiles, (*arguments, steps), constants, options)]
    programs = sequence_tiles * (units // n) * triton.cdiv(n, tile["BLOCK_N"])
    return [Launch(_step_kernel, programs, (*arguments, step), constants, options) for step in range(steps)]


def _narrower(tile: dict[str, int], options: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """The tile of bsr_linear, smaller and on more warps: a thread keeps the sums of several gates at once."""
    m, n = (min(tile[name], 32) for name in ("BLOCK_M", "BLOCK_N"))
    warps = max(m, n) // 8 if tile["DOT"] else options["num_warps"]
    return tile | {"BLOCK_M": m, "BLOCK_N": n}, options | {"num_warps": warps}
