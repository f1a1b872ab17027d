"""Recurrent layers whose matrices are nn.Linear: torch's own kernels with their weights, and what their hooks see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.recurrent import RecurrentTensors
from ..ops.recurrent import states_before
from ..reference.sparse_lstm import GATES, sparse_lstm

if TYPE_CHECKING:
    from .recurrent import SparseRecurrent

KINDS = ("ih", "hh", "hr")


def dense_layers(
    rnn: SparseRecurrent, x: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What torch's layer gives for x (T, B, K), or (tokens, K) with batch_sizes: y, then the states, for all layers.

    Each weight is read once, so that masks are applied once in a call. Where matrices have hooks, which statistics of
    their inputs need, the layers run one by one, and then each matrix is called on all of its inputs at once, without
    gradients and with its output unused: (B, T, K), or (tokens, K) as they are packed.

    Raises TypeError if one of the matrices is no nn.Linear.
    """
    matrices: dict[str, Any] = rnn.matrices
    for name, matrix in matrices.items():
        if not isinstance(matrix, nn.Linear):
            raise TypeError(
                f"{type(rnn).__name__}: expected {name} as nn.Linear, as ih_l0, got {type(matrix).__name__}"
            )
    if not any(matrix._forward_pre_hooks or matrix._forward_hooks for matrix in matrices.values()):
        weights = [tensor for layer in range(rnn.num_layers) for tensor in _weights(rnn, layer)]
        return _run(rnn, x, batch_sizes, states, weights, rnn.num_layers)
    directions = 2 if rnn.bidirectional else 1
    after = []
    for layer in range(rnn.num_layers):
        own = tuple(state[layer * directions : (layer + 1) * directions] for state in states)
        y, last = _run(rnn, x, batch_sizes, own, _weights(rnn, layer), 1)
        with torch.no_grad():
            _show(rnn, layer, x, y, batch_sizes, own)
        after.append(last)
        x = F.dropout(y, rnn.dropout, rnn.training) if layer + 1 < rnn.num_layers else y
    return x, tuple(torch.cat(parts) for parts in zip(*after, strict=True))


def _weights(rnn: SparseRecurrent, layer: int) -> list[Tensor]:
    """In torch's order: for each direction W_ih, W_hh, their biases, W_hr."""
    weights = []
    for direction in ("", "_reverse") if rnn.bidirectional else ("",):
        ih, hh, *hr = _matrices(rnn, layer, direction)
        weights += [ih.weight, hh.weight, *([ih.bias, hh.bias] if rnn.bias else []), *(m.weight for m in hr)]
    return weights


def _matrices(rnn: SparseRecurrent, layer: int, direction: str) -> list[Any]:
    return [rnn._modules[f"{kind}_l{layer}{direction}"] for kind in KINDS[: 3 if rnn.proj_size else 2]]


def _run(
    rnn: SparseRecurrent,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    layers: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    function: Any = getattr(torch, rnn.dense.__name__.lower())
    before = states if rnn.dense is nn.LSTM else states[0]
    options = (weights, rnn.bias, layers, rnn.dropout, rnn.training, rnn.bidirectional)
    if batch_sizes is None:
        y, *after = function(x, before, *options, False)
    else:
        y, *after = function(x, batch_sizes, before, *options)
    return y, tuple(after)


def _show(
    rnn: SparseRecurrent, layer: int, x: Tensor, y: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]
) -> None:
    """Call the matrices of a layer on what they multiplied: x, the hidden states before each step, those to project."""
    size = rnn.proj_size or rnn.hidden_size
    rows = y.reshape(-1, y.shape[-1])
    for d, direction in enumerate(("", "_reverse") if rnn.bidirectional else ("",)):
        ih, hh, *hr = _matrices(rnn, layer, direction)
        own = tuple(state[d] for state in states)
        before = states_before(rows[:, d * size : (d + 1) * size], own[0], x, batch_sizes, bool(d))
        ih(_by_sequence(x, x, batch_sizes))
        hh(_by_sequence(before, x, batch_sizes))
        if hr:
            tensors = _as_one_block([ih, hh, *hr])
            h, c = own
            *_, gates, cells = sparse_lstm(x, batch_sizes, *tensors, h[None], c[None], bool(d), save=True)
            output_gate = gates[0].chunk(GATES, dim=-1)[-1]
            hr[0](_by_sequence((output_gate * cells[0].tanh()).to(x.dtype), x, batch_sizes))


def _by_sequence(rows: Tensor, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """Rows (tokens, F) or (T, B, F) in the order of x (T, B, K) as (B, T, F); packed ones as they are."""
    return rows if batch_sizes is not None else rows.reshape(*x.shape[:2], -1).transpose(0, 1)


def _as_one_block(matrices: list[Any]) -> RecurrentTensors:
    """Dense matrices as the reference takes them."""
    device = matrices[0].weight.device
    crow, col = (torch.tensor(indices, dtype=torch.int32, device=device) for indices in ([0, 1], [0]))
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    count = len(matrices)
    return RecurrentTensors([crow] * count, [col] * count, [matrix.weight[None] for matrix in matrices], [], biases)
