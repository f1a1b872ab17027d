"""sparse_gru in plain torch: any dtype and device, differentiable by torch itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.block import to_dense
from .recurrent import before, in_order, linear, saved_dtype, steps_of, update

GATES = 3


def sparse_gru(
    x: Tensor,
    batch_sizes: Tensor | None,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    h0: Tensor,
    reverse: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_n, gates): with `save` gates (D, tokens, 4 H): reset, update, new, and what reset multiplies."""
    directions, _, hidden = h0.shape
    rows = x.reshape(-1, x.shape[-1])
    ys, hs, all_gates = [], [], []
    for d in range(directions):
        steps = steps_of(x, batch_sizes, reverse != (d == 1))
        bias_input, bias_recurrent = biases[2 * d : 2 * d + 2] if biases else (None, None)
        lists = (crow_indices, col_indices, values, scales)
        inputs = linear(2 * d, x.shape[-1], *lists, bias_input)(rows)
        recurrent = linear(2 * d + 1, hidden, *lists, bias_recurrent)
        h = h0[d]
        outputs, gates = [], []
        for step in steps:
            from_input = inputs[step.tokens].chunk(GATES, dim=-1)
            from_state = recurrent(h[: step.size]).chunk(GATES, dim=-1)
            r, z = (from_input[i] + from_state[i] for i in range(2))
            r, z = r.sigmoid(), z.sigmoid()
            n = (from_input[2] + r * from_state[2]).tanh()
            output = n + z * (h[: step.size] - n)
            h = update(h, output)
            outputs.append(output)
            if save:
                gates.append(torch.cat([r, z, n, from_state[2]], dim=-1))
        ys.append(in_order(outputs, steps))
        hs.append(h)
        if save:
            all_gates.append(in_order(gates, steps))
    y = torch.cat(ys, dim=-1).reshape(*x.shape[:-1], directions * h0.shape[-1])
    dtype = saved_dtype(x.dtype)
    return y, torch.stack(hs), torch.stack(all_gates).to(dtype) if save else x.new_empty(0, dtype=dtype)


def sparse_gru_backward(
    grad_y: Tensor,
    grad_h: Tensor,
    batch_sizes: Tensor | None,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    gates: Tensor,
    y: Tensor,
    h0: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer's sums and initial states.

    grad_y   (T, B, D H) or (tokens, D H), as y; grad_h (D, B, H) of h_n
    returns  (D, tokens, 3 H) of what the inputs add to the gates; (D, tokens, 3 H) of what the states add;
             (D, B, H) of h0; all of the dtype of grad_y
    """
    directions, _, hidden = h0.shape
    rows, wide = grad_y.reshape(-1, grad_y.shape[-1]), gates.dtype
    all_inputs, all_states, grads_h0 = [], [], []
    for d in range(directions):
        steps = steps_of(grad_y, batch_sizes, reverse != (d == 1))
        recurrent = to_dense(crow_indices[2 * d + 1], col_indices[2 * d + 1], values[2 * d + 1], hidden).to(wide)
        own = slice(d * hidden, (d + 1) * hidden)
        h_before = before(y.reshape(-1, y.shape[-1])[:, own], h0[d], steps)
        dh = grad_h[d].to(wide)
        inputs, states = [], []
        for step in reversed(steps):
            output = rows[step.tokens, own] + dh[: step.size]
            r, z, n, reset = gates[d, step.tokens].chunk(4, dim=-1)
            dn = output * (1 - z) * (1 - n * n)
            dz = output * (h_before[step.tokens] - n) * z * (1 - z)
            dr = dn * reset * r * (1 - r)
            inputs.append(torch.cat([dr, dz, dn], dim=-1))
            states.append(torch.cat([dr, dz, dn * r], dim=-1))
            dh = update(dh, output * z + states[-1] @ recurrent)
        all_inputs.append(in_order(inputs[::-1], steps))
        all_states.append(in_order(states[::-1], steps))
        grads_h0.append(dh)
    stacked = [torch.stack(grads).to(grad_y.dtype) for grads in (all_inputs, all_states, grads_h0)]
    return stacked[0], stacked[1], stacked[2]
