"""A layer of GRU cells with block-sparse weights, one or two directions, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats.recurrent import RecurrentTensors, RecurrentWeights
from ..reference import sparse_gru as reference
from ..reference.recurrent import saved_dtype
from . import recurrent_gpu
from .devices import on_one_device, register_fake
from .recurrent import (
    batch_of,
    check_gradients,
    check_state,
    check_weights,
    choose,
    input_gradient,
    matrix_gradient,
    states_before,
)


def sparse_gru(
    x: Tensor,
    weights: Sequence[RecurrentWeights],
    state: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """All steps of a GRU layer: y of each step, and the state after the last.

        r, z = sigmoid of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh      (their rows)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)),   h_t = (1 - z) n + z h_{t-1}

    x            (T, B, K), or (tokens, K) packed as by torch's pack_padded_sequence, with batch_sizes; any float dtype
    weights      one direction or two, D in all, without projection: matrices in blocks of any n x k, of the dtype of x,
                 or all int8 (see BlockSparse.quantize), biases of the dtype of x
    state        (D, B, H) before the first step, dtype of x; None: zeros
    returns      y (T, B, D H) or (tokens, D H), h_n (D, B, H), of the dtype of x

    batch_sizes, reverse, backend, int8, gradients and errors are those of `sparse_lstm`. The kernels round sums
    and hidden states to the dtype of x.
    Source: Cho et al. 2014, arXiv:1406.1078, in the form of torch and cuDNN (reset after the product).
    """
    batch = batch_of("sparse_gru", x, batch_sizes)
    if any(direction.projection is not None for direction in weights):
        raise ValueError("sparse_gru: expected weights without a projection")
    hidden, _ = check_weights("sparse_gru", weights, reference.GATES, x)
    h = check_state("sparse_gru", "h", state, (len(weights), batch, hidden), x)
    return call(x, batch_sizes, RecurrentTensors.of(weights), h, reverse, backend)


def call(
    x: Tensor,
    batch_sizes: Tensor | None,
    tensors: RecurrentTensors,
    h0: Tensor,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sparse_gru on lists of tensors that were checked before; returns y, h_n."""
    grad = torch.is_grad_enabled()
    if grad:
        check_gradients("sparse_gru", tensors.scales, x, h0, *tensors.biases)
    chosen = choose("sparse_gru", x, h0, h0.shape[-1], tensors.values, backend)
    if chosen == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(x, batch_sizes, *tensors, h0, reverse)[:2]
    op = _persistent_op if chosen == "cuda" else _op
    if grad or torch.compiler.is_compiling():
        needed = any(t.requires_grad for t in (x, h0, *tensors.values, *tensors.biases))
        return op(x, batch_sizes, *tensors, h0, reverse, grad and needed)[:2]
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python of register_autograd
        return op(x, batch_sizes, *tensors, h0, reverse, False)[:2]


_MATRICES = "Tensor[] crow_indices, Tensor[] col_indices, Tensor[] values"
_SCHEMA = (
    f"(Tensor x, Tensor? batch_sizes, {_MATRICES}, Tensor[] scales, Tensor[] biases, Tensor h0, "
    "bool reverse=False, bool save=False) -> (Tensor y, Tensor h_n, Tensor gates)"
)
torch.library.define(
    "sparsenlp::sparse_gru_backward",
    f"(Tensor grad_y, Tensor grad_h, Tensor? batch_sizes, {_MATRICES}, Tensor gates, Tensor y, Tensor h0, "
    "bool reverse=False) -> (Tensor grad_inputs, Tensor grad_states, Tensor grad_h0)",
)
for _name in ("sparse_gru", "sparse_gru_persistent"):  # the second by CUDA C++, for few sequences
    torch.library.define(f"sparsenlp::{_name}", _SCHEMA)
_op = torch.ops.sparsenlp.sparse_gru.default
_persistent_op = torch.ops.sparsenlp.sparse_gru_persistent.default
_backward_op = torch.ops.sparsenlp.sparse_gru_backward.default
_reference = on_one_device("sparse_gru", reference.sparse_gru)

if not native.available:
    torch.library.impl("sparsenlp::sparse_gru", "cpu", reference.sparse_gru)
    torch.library.impl("sparsenlp::sparse_gru_backward", "cpu", reference.sparse_gru_backward)


def _on_gpu(
    backend: str,
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
    matrices = (crow_indices, col_indices, values)
    y, h_n, _, gates, _ = recurrent_gpu.layer(
        backend, "sparse_gru", x, batch_sizes, *matrices, biases, h0, None, reverse, save
    )
    return y, h_n, gates


for _name, _kernel in (
    ("sparse_gru", partial(_on_gpu, "triton")),
    ("sparse_gru_persistent", partial(_on_gpu, "cuda")),
    ("sparse_gru_backward", reference.sparse_gru_backward),
):
    torch.library.impl(f"sparsenlp::{_name}", "cuda", on_one_device(_name, _kernel))


@register_fake("sparse_gru")
@register_fake("sparse_gru_persistent")
def _fake(
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
    directions, _, hidden = h0.shape
    tokens = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    y = x.new_empty(*x.shape[:-1], directions * hidden)
    shape = (directions, tokens, 4 * hidden) if save else (0,)
    return y, h0.new_empty(h0.shape), x.new_empty(shape, dtype=saved_dtype(x.dtype))


@register_fake("sparse_gru_backward")
def _fake_backward(grad_y: Tensor, grad_h: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    directions, tokens, wide = others[4].shape
    shape = (directions, tokens, wide // 4 * reference.GATES)
    return grad_y.new_empty(shape), grad_y.new_empty(shape), grad_y.new_empty(grad_h.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, batch_sizes, crow, col, values, scales, biases, h0, ctx.reverse, _ = inputs
    y, _, gates = output
    ctx.count, ctx.biases, ctx.quantized = len(values), len(biases), bool(scales)
    ctx.mark_non_differentiable(gates)
    ctx.save_for_backward(x, batch_sizes, h0, y, gates, *crow, *col, *values)


def _backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, *_: Any) -> tuple:
    x, batch_sizes, h0, y, gates, *matrices = ctx.saved_tensors
    if ctx.quantized:
        raise RuntimeError("sparse_gru: expected no gradients with int8 weights")
    crow, col, values = (matrices[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
    grads = (grad_y.contiguous(), grad_h.contiguous())
    inputs, states, grad_h0 = _backward_op(*grads, batch_sizes, crow, col, values, gates, y, h0, ctx.reverse)
    directions, _, hidden = h0.shape
    rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    grad_x = torch.zeros_like(rows)
    grad_values, grad_biases = [], []
    for d in range(directions):
        at = 2 * d
        grad_x += input_gradient(inputs[d], crow[at], col[at], values[at], rows.shape[1])
        own = y_rows[:, d * hidden : (d + 1) * hidden]
        h_before = states_before(own, h0[d], x, batch_sizes, ctx.reverse != (d == 1))
        grad_values.append(matrix_gradient(inputs[d], rows, crow[at], col[at], values[at]))
        grad_values.append(matrix_gradient(states[d], h_before, crow[at + 1], col[at + 1], values[at + 1]))
        if ctx.biases:
            grad_biases += [inputs[d].sum(0), states[d].sum(0)]
    none = [None] * ctx.count
    return grad_x.reshape(x.shape), None, none, none, grad_values, [], grad_biases, grad_h0, None, None


for _name in ("sparse_gru", "sparse_gru_persistent"):
    torch.library.register_autograd(f"sparsenlp::{_name}", _backward, setup_context=_setup_context)
