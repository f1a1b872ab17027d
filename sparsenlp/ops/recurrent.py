"""What the front ends of sparse_lstm and sparse_gru share: checks, which backend runs, gradients of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import native
from ..formats import BlockSparse
from ..formats.recurrent import RecurrentWeights
from ..reference.recurrent import before, steps_of
from . import recurrent_gpu

BACKENDS = ("native", "triton", "cuda", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def check_weights(op: str, weights: Sequence[RecurrentWeights], gates: int, x: Tensor) -> tuple[int, int]:
    """(hidden size H, output size P) of a layer, or an error unless one or two directions fit x and each other."""
    if len(weights) not in (1, 2):
        raise ValueError(f"{op}: expected weights of 1 or 2 directions, got {len(weights)}")
    hidden = weights[0].input.shape[0] // gates
    projection = weights[0].projection
    size = hidden if projection is None else projection.shape[0]
    columns = x.shape[-1] if x.dim() else 0
    int8 = weights[0].input.scales is not None
    for d, own in enumerate(weights):
        if (own.projection is None) != (projection is None):
            raise ValueError(f"{op}: expected a projection in all directions, or in none")
        shapes = ((gates * hidden, columns), (gates * hidden, size), (size, hidden))
        for name, matrix, shape in zip(("input", "recurrent", "projection"), own.matrices, shapes, strict=False):
            if matrix.shape != shape:
                raise ValueError(
                    f"{op}: expected {name} weights of {shape[0]} x {shape[1]} in direction {d}, "
                    f"got {matrix.shape[0]} x {matrix.shape[1]}"
                )
            _check_matrix(op, matrix, name, x, int8)
        biases = {"bias_input": own.bias_input, "bias_recurrent": own.bias_recurrent}
        if len({bias is None for bias in biases.values()} | {weights[0].bias_input is None}) > 1:
            raise ValueError(f"{op}: expected both biases in all directions, or none")
        for name, bias in biases.items():
            if bias is not None and bias.dtype != x.dtype:
                raise TypeError(f"{op}: expected {name} of dtype {x.dtype}, got {bias.dtype}")
            if bias is not None and bias.shape != (gates * hidden,):
                raise ValueError(f"{op}: expected {name} of shape ({gates * hidden},), got {tuple(bias.shape)}")
    return hidden, size


def _check_matrix(op: str, matrix: BlockSparse, name: str, x: Tensor, int8: bool) -> None:
    if int8 != (matrix.scales is not None):
        raise TypeError(f"{op}: expected weights that are all int8, or none, got {matrix.values.dtype} in {name}")
    if not int8 and matrix.values.dtype != x.dtype:
        raise TypeError(f"{op}: expected {name} weights of dtype {x.dtype} or int8, got {matrix.values.dtype}")
    if matrix.values.device != x.device:
        raise ValueError(f"{op}: expected {name} weights on {x.device}, got {matrix.values.device}")


def batch_of(op: str, x: Tensor, batch_sizes: Tensor | None) -> int:
    """Sequences in x (T, B, K), or (tokens, K) with `batch_sizes` (T,), or ValueError."""
    if batch_sizes is None:
        if x.dim() != 3:
            raise ValueError(f"{op}: expected x of shape (T, B, K), got {tuple(x.shape)}")
        if not x.shape[0]:
            raise ValueError(f"{op}: expected at least one step, got x of shape {tuple(x.shape)}")
        return x.shape[1]
    if x.dim() != 2:
        raise ValueError(f"{op}: expected packed x of shape (tokens, K) with batch_sizes, got {tuple(x.shape)}")
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu or not len(batch_sizes):
        raise ValueError(
            f"{op}: expected batch_sizes (T,) of int64 on the CPU, "
            f"got {batch_sizes.dtype} {tuple(batch_sizes.shape)} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if sizes[-1] < 1 or any(b > a for a, b in pairwise(sizes)) or sum(sizes) != x.shape[0]:
        raise ValueError(
            f"{op}: expected batch_sizes that never grow, stay above 0 and add up to {x.shape[0]}, got {sizes}"
        )
    return sizes[0]


def check_state(op: str, name: str, state: Tensor | None, shape: tuple[int, int, int], x: Tensor) -> Tensor:
    """The state, zeros for None; an error unless it is (D, B, F) of the dtype and device of x."""
    if state is None:
        return x.new_zeros(shape)
    if state.dtype != x.dtype:
        raise TypeError(f"{op}: expected {name} of dtype {x.dtype}, got {state.dtype}")
    if state.shape != shape or state.device != x.device:
        raise ValueError(
            f"{op}: expected {name} of shape {shape} on {x.device}, got {tuple(state.shape)} on {state.device}"
        )
    return state


def check_gradients(op: str, scales: list[Tensor], *tensors: Tensor) -> None:
    """Raise RuntimeError if gradients through int8 weights are asked for."""
    if scales and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op}: expected no gradients with int8 weights, got inputs that require them")


def choose(op: str, x: Tensor, h0: Tensor, hidden: int, values: list[Tensor], backend: str | None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot, or none for a GPU."""
    if backend in recurrent_gpu.BACKENDS or (backend is None and x.is_cuda):
        return recurrent_gpu.choose(op, x, h0, hidden, values, backend)
    runs = x.dtype in NATIVE_DTYPES and x.is_cpu
    if backend is None:
        return "native" if native.available and runs else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native":
        if not native.available:
            raise RuntimeError(f"{op}: backend 'native' cannot run: {native.why_unavailable}")
        if not runs:
            raise RuntimeError(
                f"{op}: backend 'native' cannot run: expected float32 or bfloat16 on cpu, got {x.dtype} on {x.device}"
            )
    return backend


def states_before(rows: Tensor, initial: Tensor, x: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """The state (tokens, F) that each token met, from what it left, `rows` (tokens, F), and the initial ones (B, F)."""
    if batch_sizes is not None:
        return before(rows, initial, steps_of(x, batch_sizes, reverse))
    batch = initial.shape[0]
    return torch.cat([rows[batch:], initial] if reverse else [initial, rows[: rows.shape[0] - batch]])


def matrix_gradient(grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> Tensor:
    """Of stored blocks: grad (tokens, N) is that of the outputs for x (tokens, K)."""
    wgrad = torch.ops.sparsenlp.bsr_linear_wgrad.default
    blocks = wgrad(grad.contiguous(), x.contiguous(), crow_indices, col_indices, list(values.shape[1:]))
    return blocks.to(values.dtype)


def input_gradient(grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """grad W: grad (tokens, N) -> (tokens, columns)."""
    dgrad = torch.ops.sparsenlp.bsr_linear_dgrad.default
    return dgrad(grad.contiguous(), crow_indices, col_indices, values, columns)
