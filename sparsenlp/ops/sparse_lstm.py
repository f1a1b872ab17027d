"""A layer of LSTM cells with block-sparse weights, one or two directions, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats.recurrent import RecurrentTensors, RecurrentWeights
from ..reference import sparse_lstm as reference
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


def sparse_lstm(
    x: Tensor,
    weights: Sequence[RecurrentWeights],
    state: tuple[Tensor, Tensor] | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All steps of an LSTM layer: y of each step, and the state after the last.

        i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),   h_t = sigmoid(o) tanh(c_t), times W_hr if there is one

    x            (T, B, K), or (tokens, K) packed as by torch's pack_padded_sequence, with batch_sizes; any float dtype
    weights      one direction or two, D in all: matrices in blocks of any n x k, of the dtype of x, or all int8
                 (see BlockSparse.quantize), biases of the dtype of x
    state        (h, c) before the first step, (D, B, P) and (D, B, H), dtype of x; None: zeros
    batch_sizes  (T,) int64 on the CPU: sequences that reach each step; they never grow
    reverse      the first direction begins at the last step. A second one always takes the other way
    backend      None chooses: on a GPU "cuda" for at most 8 sequences where the CUDA library is built, else "triton";
                 on a CPU "native" for float32 and bfloat16 x where the extension is built, else "reference".
                 The GPU's take float32, float16 and bfloat16, weights that are not int8, recurrent ones in blocks
                 whose height divides H, and no projection. What they do not take raises RuntimeError: dense products
                 on a GPU have to be asked for. So does a named backend that cannot run.
    returns      y (T, B, D P) or (tokens, D P), (h_n (D, B, P), c_n (D, B, H)), of the dtype of x

    The kernels round sums and hidden states to the dtype of x, and keep cells in float32 between the steps.
    int8: x and the hidden state of each step are rounded with a scale for each token, as in bsr_linear.
    Differentiable in x, values, biases and states, values at stored blocks only; once, and not with int8 weights.
    On a GPU the gradients go back through the steps by dense products with W_hh; those of x and weights by bsr_linear.

    Raises TypeError if dtypes differ, ValueError if shapes, devices or batch_sizes disagree or there is no step,
    RuntimeError if gradients through int8 are asked for.
    Source: Hochreiter and Schmidhuber 1997; Sak et al. 2014, arXiv:1402.1128 (projection).
    """
    batch = batch_of("sparse_lstm", x, batch_sizes)
    hidden, size = check_weights("sparse_lstm", weights, reference.GATES, x)
    h, c = (None, None) if state is None else state
    h = check_state("sparse_lstm", "h", h, (len(weights), batch, size), x)
    c = check_state("sparse_lstm", "c", c, (len(weights), batch, hidden), x)
    y, h_n, c_n = call(x, batch_sizes, RecurrentTensors.of(weights), h, c, reverse, backend)
    return y, (h_n, c_n)


def call(
    x: Tensor,
    batch_sizes: Tensor | None,
    tensors: RecurrentTensors,
    h0: Tensor,
    c0: Tensor,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sparse_lstm on lists of tensors that were checked before; returns y, h_n, c_n."""
    grad = torch.is_grad_enabled()
    if grad:
        check_gradients("sparse_lstm", tensors.scales, x, h0, c0, *tensors.biases)
    chosen = choose("sparse_lstm", x, h0, c0.shape[-1], tensors.values, backend)
    if chosen == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(x, batch_sizes, *tensors, h0, c0, reverse)[:3]
    op = _persistent_op if chosen == "cuda" else _op
    if grad or torch.compiler.is_compiling():
        needed = any(t.requires_grad for t in (x, h0, c0, *tensors.values, *tensors.biases))
        return op(x, batch_sizes, *tensors, h0, c0, reverse, grad and needed)[:3]
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python of register_autograd
        return op(x, batch_sizes, *tensors, h0, c0, reverse, False)[:3]


_MATRICES = "Tensor[] crow_indices, Tensor[] col_indices, Tensor[] values"
_SCHEMA = (
    f"(Tensor x, Tensor? batch_sizes, {_MATRICES}, Tensor[] scales, Tensor[] biases, Tensor h0, Tensor c0, "
    "bool reverse=False, bool save=False) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
torch.library.define(
    "sparsenlp::sparse_lstm_backward",
    f"(Tensor grad_y, Tensor grad_h, Tensor grad_c, Tensor? batch_sizes, {_MATRICES}, Tensor gates, Tensor cells, "
    "Tensor c0, bool reverse=False) -> (Tensor grad_sums, Tensor grad_outputs, Tensor grad_h0, Tensor grad_c0)",
)
for _name in ("sparse_lstm", "sparse_lstm_persistent"):  # the second by CUDA C++, for few sequences
    torch.library.define(f"sparsenlp::{_name}", _SCHEMA)
_op = torch.ops.sparsenlp.sparse_lstm.default
_persistent_op = torch.ops.sparsenlp.sparse_lstm_persistent.default
_backward_op = torch.ops.sparsenlp.sparse_lstm_backward.default
_reference = on_one_device("sparse_lstm", reference.sparse_lstm)

if not native.available:
    torch.library.impl("sparsenlp::sparse_lstm", "cpu", reference.sparse_lstm)
    torch.library.impl("sparsenlp::sparse_lstm_backward", "cpu", reference.sparse_lstm_backward)


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
    c0: Tensor,
    reverse: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    matrices = (crow_indices, col_indices, values)
    y, h_n, c_n, gates, cells = recurrent_gpu.layer(
        backend, "sparse_lstm", x, batch_sizes, *matrices, biases, h0, c0, reverse, save
    )
    assert c_n is not None
    return y, h_n, c_n, gates, cells


for _name, _kernel in (
    ("sparse_lstm", partial(_on_gpu, "triton")),
    ("sparse_lstm_persistent", partial(_on_gpu, "cuda")),
    ("sparse_lstm_backward", reference.sparse_lstm_backward),
):
    torch.library.impl(f"sparsenlp::{_name}", "cuda", on_one_device(_name, _kernel))


@register_fake("sparse_lstm")
@register_fake("sparse_lstm_persistent")
def _fake(
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
    directions, hidden = h0.shape[0], c0.shape[-1]
    tokens = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    y = x.new_empty(*x.shape[:-1], directions * h0.shape[-1])
    dtype = saved_dtype(x.dtype)
    kept = [x.new_empty((directions, tokens, n * hidden) if save else (0,), dtype=dtype) for n in (reference.GATES, 1)]
    return y, h0.new_empty(h0.shape), c0.new_empty(c0.shape), kept[0], kept[1]


@register_fake("sparse_lstm_backward")
def _fake_backward(
    grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, batch_sizes: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates = others[3]
    tokens = gates.shape[:2]
    return (
        grad_y.new_empty(gates.shape),
        grad_y.new_empty(*tokens, grad_h.shape[-1]),
        grad_y.new_empty(grad_h.shape),
        grad_y.new_empty(grad_c.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, batch_sizes, crow, col, values, scales, biases, h0, c0, ctx.reverse, _ = inputs
    y, _, _, gates, cells = output
    ctx.set_materialize_grads(True)
    ctx.count, ctx.biases, ctx.quantized = len(values), len(biases), bool(scales)
    ctx.mark_non_differentiable(gates, cells)
    ctx.save_for_backward(x, batch_sizes, h0, c0, y, gates, cells, *crow, *col, *values)


def _backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, *_: Any) -> tuple:
    x, batch_sizes, h0, c0, y, gates, cells, *matrices = ctx.saved_tensors
    if ctx.quantized:
        raise RuntimeError("sparse_lstm: expected no gradients with int8 weights")
    crow, col, values = (matrices[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
    grads = (grad_y.contiguous(), grad_h.contiguous(), grad_c.contiguous())
    sums, outputs, grad_h0, grad_c0 = _backward_op(
        *grads, batch_sizes, crow, col, values, gates, cells, c0, ctx.reverse
    )
    directions, _, size = h0.shape
    each = ctx.count // directions
    rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    grad_x = torch.zeros_like(rows)
    grad_values, grad_biases = [], []
    for d in range(directions):
        first = each * d
        grad_x += input_gradient(sums[d], crow[first], col[first], values[first], rows.shape[1])
        own = y_rows[:, d * size : (d + 1) * size]
        met = [rows, states_before(own, h0[d], x, batch_sizes, ctx.reverse != (d == 1))]
        of = [sums[d], sums[d]]
        if each == 3:
            *_, o = gates[d].chunk(reference.GATES, dim=-1)
            met.append((o * cells[d].tanh()).to(x.dtype))
            of.append(outputs[d])
        for at, (grad, inputs) in enumerate(zip(of, met, strict=True), first):
            grad_values.append(matrix_gradient(grad, inputs, crow[at], col[at], values[at]))
        if ctx.biases:
            grad_biases += [sums[d].sum(0)] * 2
    none = [None] * ctx.count
    return grad_x.reshape(x.shape), None, none, none, grad_values, [], grad_biases, grad_h0, grad_c0, None, None


for _name in ("sparse_lstm", "sparse_lstm_persistent"):
    torch.library.register_autograd(f"sparsenlp::{_name}", _backward, setup_context=_setup_context)
