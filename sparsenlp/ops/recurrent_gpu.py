"""sparse_lstm and sparse_gru on a GPU: what the kernels take, and the directions of a layer one after the other.

"triton"  kernels/sparsenlp_kernels/recurrent.py, for any number of sequences
"cuda"    csrc/cuda/persistent.h, for few: all steps in one launch that keeps the weights in shared memory

Both get the products of all inputs from bsr_linear. Compiled and simulated, not run on hardware.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import triton_kernels
from . import recurrent_cuda

COUNTABLE = 2**30
"""Tokens are fewer: kernels count them in 32 bits; addresses have 64."""


class Direction(NamedTuple):
    """One direction: H units, B sequences, T steps, G gates.

    inputs        (tokens, G H)  W_ih x + b_ih
    crow_indices  of W_hh, as col_indices and values (blocks, n, k); n divides H
    bias          (G H,)         b_hh, or None
    h             (B, H)         the initial state
    c             (B, H)         float32, the initial cells of an LSTM, which become the final ones; None for a GRU
    y             (tokens, H)    to fill; rows may lie apart
    h_n           (B, H)         to fill
    gates         (tokens, 4 H)  float32, to fill, or None
    cells         (tokens, H)    float32, to fill, or None
    table         see `table_of_steps`
    """

    inputs: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None
    h: Tensor
    c: Tensor | None
    y: Tensor
    h_n: Tensor
    gates: Tensor | None
    cells: Tensor | None
    table: Tensor


class RunSteps(Protocol):
    def __call__(self, what: str, direction: Direction) -> None: ...


def table_of_steps(sizes: list[int], reverse: bool, device: torch.device) -> Tensor:
    """(T + 1, 2) int32: first token and sequences of each step, in the order a direction takes them, then zeros."""
    counts = torch.tensor(sizes)
    rows = torch.stack([counts.cumsum(0) - counts, counts], 1)
    rows = rows.flip(0) if reverse else rows
    return torch.cat([rows, rows.new_zeros(1, 2)]).to(device, torch.int32)


def triton_steps(what: str, direction: Direction) -> None:
    triton_kernels.load("recurrent", direction.inputs).recurrent(*direction)


BACKENDS: dict[str, RunSteps] = {"triton": triton_steps, "cuda": recurrent_cuda.run_steps}


def why_not(backend: str, x: Tensor, h0: Tensor, hidden: int, values: list[Tensor]) -> str:
    """Why no kernel of the backend takes x, the states h0 (D, B, P) and the values of each matrix, "" if one does.

    Reads no data.
    """
    directions, batch, size = h0.shape
    if not x.is_cuda:
        return f"expected x on a CUDA device, got {x.device}"
    if x.dtype not in triton_kernels.DTYPES:
        return f"expected x in float32, float16 or bfloat16, got {x.dtype}"
    if any(v.dtype == torch.int8 for v in values):
        return "expected weights that are not int8"
    if (tokens := math.prod(x.shape[:-1])) >= COUNTABLE:
        return f"expected fewer than {COUNTABLE} tokens, got {tokens} (run fewer sequences at once)"
    if len(values) != 2 * directions or size != hidden:
        return "expected no projection"
    for n in {v.shape[1] for v in values[1::2]}:
        if hidden % n:
            return f"expected recurrent weights in blocks whose height divides {hidden} hidden units, got {n}"
    return recurrent_cuda.why_not(batch, values[1::2]) if backend == "cuda" else ""


def choose(op: str, x: Tensor, h0: Tensor, hidden: int, values: list[Tensor], backend: str | None) -> str:
    """The backend asked for, or None: "cuda" where it takes the layer and surely has the GPU for it, else "triton".

    Chosen by what the kernels were written for, not by timing. Raises RuntimeError if it cannot run.
    """
    arguments = (x, h0, hidden, values)
    few = hidden <= recurrent_cuda.SURE_UNITS and not why_not("cuda", *arguments)
    chosen = backend or ("cuda" if few else "triton")
    if reason := why_not(chosen, *arguments):
        raise RuntimeError(
            f"{describe(op, x, hidden)}: backend {chosen!r} cannot run: {reason}; "
            "or pass backend='reference', which multiplies by dense matrices"
        )
    return chosen


def layer(
    backend: str,
    op: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    biases: list[Tensor],
    h0: Tensor,
    c0: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """y, h_n, c_n (None without c0), gates and cells (empty unless `save`), as the op returns them.

    Raises RuntimeError naming the shapes where no kernel takes them, or a launch fails.
    """
    directions, batch, units = h0.shape
    hidden = units if c0 is None else c0.shape[-1]
    choose(op, x, h0, hidden, values, backend)
    rows = x.reshape(-1, x.shape[-1])
    sizes = [batch] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    y = x.new_empty(rows.shape[0], directions * units)
    h_n = h0.new_empty(h0.shape)
    c = None if c0 is None else c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    gates, cells = (
        x.new_empty((directions, rows.shape[0], width * units) if save and wanted else (0,), dtype=torch.float32)
        for width, wanted in ((4, True), (1, c is not None))
    )
    for d in range(directions if batch else 0):
        bias_input, bias_recurrent = biases[2 * d : 2 * d + 2] if biases else (None, None)
        of_input, of_state = ((crow_indices[at], col_indices[at], values[at]) for at in (2 * d, 2 * d + 1))
        direction = Direction(
            torch.ops.sparsenlp.bsr_linear.default(rows, *of_input, bias_input, "none"),
            *of_state,
            bias_recurrent,
            h0[d],
            None if c is None else c[d],
            y[:, d * units : (d + 1) * units],
            h_n[d],
            gates[d] if save else None,
            cells[d] if save and c is not None else None,
            table_of_steps(sizes, reverse != (d == 1), x.device),
        )
        BACKENDS[backend](describe(op, x, hidden), direction)
    y = y.reshape(*x.shape[:-1], directions * units)
    return y, h_n, None if c is None else c.to(x.dtype), gates, cells


def describe(op: str, x: Tensor, hidden: int) -> str:
    """Names op, shapes and dtype, for errors."""
    return f"{op} on x {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} with {hidden} hidden units"
