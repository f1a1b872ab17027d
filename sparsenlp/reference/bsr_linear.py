"""bsr_linear by building the dense matrix: slow, any dtype and device, differentiable by torch itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..formats.block import block_rows, pack_values, split_blocks, to_dense

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """act(x Wᵀ + b), (..., K) -> (..., N)."""
    weight = to_dense(crow_indices, col_indices, values, x.shape[-1])
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def bsr_linear_wgrad(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int]
) -> Tensor:
    """Blocks of gradᵀ x that the pattern stores, packed: grad (M, N), x (M, K) -> (nnzb, n, k)."""
    dense = split_blocks(grad.t() @ x, block)
    return pack_values(dense[block_rows(crow_indices, col_indices.numel()), col_indices.long()])
