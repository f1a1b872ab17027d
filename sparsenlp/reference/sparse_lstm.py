"""sparse_lstm in plain torch: any dtype and device, differentiable by torch itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.block import to_dense
from .recurrent import before, in_order, linear, saved_dtype, steps_of, update

GATES = 4


def sparse_lstm(
    x: Tensor,
    batch_sizes: Tensor | None,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    h0: Tensor,
    c0: Tensor,
    reverse: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, gates, cells): with `save` gates (D, tokens, 4 H) after sigmoid and tanh, cells (D, tokens, H)."""
    directions, _, hidden = c0.shape
    each = len(values) // directions
    rows = x.reshape(-1, x.shape[-1])
    ys, hs, cs, all_gates, all_cells = [], [], [], [], []
    for d in range(directions):
        steps = steps_of(x, batch_sizes, reverse != (d == 1))
        bias_input, bias_recurrent = biases[2 * d : 2 * d + 2] if biases else (None, None)
        lists = (crow_indices, col_indices, values, scales)
        inputs = linear(each * d, x.shape[-1], *lists, bias_input)(rows)
        recurrent = linear(each * d + 1, h0.shape[-1], *lists, bias_recurrent)
        project = linear(each * d + 2, hidden, *lists, None) if each == 3 else None
        h, c = h0[d], c0[d]
        outputs, gates, cells = [], [], []
        for step in steps:
            sums = inputs[step.tokens] + recurrent(h[: step.size])
            i, f, g, o = sums.chunk(GATES, dim=-1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cell = f * c[: step.size] + i * g
            output = o * cell.tanh()
            if project is not None:
                output = project(output)
            h, c = update(h, output), update(c, cell)
            outputs.append(output)
            if save:
                gates.append(torch.cat([i, f, g, o], dim=-1))
                cells.append(cell)
        ys.append(in_order(outputs, steps))
        hs.append(h)
        cs.append(c)
        if save:
            all_gates.append(in_order(gates, steps))
            all_cells.append(in_order(cells, steps))
    y = torch.cat(ys, dim=-1).reshape(*x.shape[:-1], directions * h0.shape[-1])
    states = (torch.stack(hs), torch.stack(cs))
    dtype = saved_dtype(x.dtype)
    if not save:
        return y, *states, x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    return y, *states, torch.stack(all_gates).to(dtype), torch.stack(all_cells).to(dtype)


def sparse_lstm_backward(
    grad_y: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    batch_sizes: Tensor | None,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a layer's sums, hidden states and initial states.

    grad_y   (T, B, D P) or (tokens, D P), grad_h (D, B, P), grad_c (D, B, H): of y, h_n and c_n
    returns  (D, tokens, 4 H) of the sums that enter the gates; (D, tokens, P) of the hidden state after each step;
             (D, B, P) of h0; (D, B, H) of c0; all of the dtype of grad_y
    """
    directions, _, hidden = c0.shape
    each, size = len(values) // directions, grad_h.shape[-1]
    rows, wide = grad_y.reshape(-1, grad_y.shape[-1]), gates.dtype
    all_sums, all_outputs, grads_h0, grads_c0 = [], [], [], []
    for d in range(directions):
        steps = steps_of(grad_y, batch_sizes, reverse != (d == 1))
        recurrent, project = (
            to_dense(crow_indices[at], col_indices[at], values[at], columns).to(wide) if at < each * (d + 1) else None
            for at, columns in ((each * d + 1, size), (each * d + 2, hidden))
        )
        assert recurrent is not None
        cells_before = before(cells[d], c0[d].to(wide), steps)
        dh, dc = grad_h[d].to(wide), grad_c[d].to(wide)
        sums, outputs = [], []
        for step in reversed(steps):
            output = rows[step.tokens, d * size : (d + 1) * size] + dh[: step.size]
            dm = output if project is None else output @ project
            i, f, g, o = gates[d, step.tokens].chunk(GATES, dim=-1)
            squashed = cells[d, step.tokens].tanh()
            cell = dc[: step.size] + dm * o * (1 - squashed * squashed)
            di, df = cell * g * i * (1 - i), cell * cells_before[step.tokens] * f * (1 - f)
            dg, do = cell * i * (1 - g * g), dm * squashed * o * (1 - o)
            sums.append(torch.cat([di, df, dg, do], dim=-1))
            outputs.append(output)
            dh, dc = update(dh, sums[-1] @ recurrent), update(dc, cell * f)
        all_sums.append(in_order(sums[::-1], steps))
        all_outputs.append(in_order(outputs[::-1], steps))
        grads_h0.append(dh)
        grads_c0.append(dc)
    stacked = [torch.stack(grads).to(grad_y.dtype) for grads in (all_sums, all_outputs, grads_h0, grads_c0)]
    return stacked[0], stacked[1], stacked[2], stacked[3]
