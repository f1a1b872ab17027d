"""bsr_linear by building the dense matrix: slow, any dtype and device, differentiable by torch itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.block import block_rows, split_blocks, to_dense

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> Tensor:
    """act(x Wᵀ + b + residual), (..., K) -> (..., N)."""
    if scales is None:
        y = F.linear(x, to_dense(crow_indices, col_indices, values, x.shape[-1]), bias)
    else:
        y = int8_linear(x, to_dense(crow_indices, col_indices, values.double(), x.shape[-1]), scales, bias, input_scale)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, input_scale: float) -> Tensor:
    """x Wᵀ + b in x's dtype: weight (N, K) whole numbers in float64, `scales` (N,) what they stand for."""
    rounded, x_scale = quantize_tokens(x, input_scale)
    y = F.linear(rounded.double(), weight) * (x_scale.double() * scales)
    return y.to(x.dtype) if bias is None else (y + bias).to(x.dtype)


def quantize_tokens(x: Tensor, input_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """x (..., K) as whole numbers in [-127, 127] and the scale (..., 1) that gives x back within scale / 2, in float32.

    input_scale   the scale of every token; 0 takes max |x| / 127 for each, and 1 for a token of zeros
    """
    x = x.float()
    if input_scale:
        scale = torch.full_like(x[..., :1], input_scale)
    else:
        largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.sum(dim=-1, keepdim=True)
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
    return (x * scale.reciprocal()).clamp(-127, 127).round(), scale


def bsr_linear_dgrad(grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """grad W: grad (M, N) -> (M, columns)."""
    return grad @ to_dense(crow_indices, col_indices, values, columns)


def bsr_linear_wgrad(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int]
) -> Tensor:
    """Blocks of gradᵀ x that the pattern stores, in float32: grad (M, N), x (M, K) -> (nnzb, n, k)."""
    dense = split_blocks(grad.t() @ x, block)
    blocks = dense[block_rows(crow_indices, col_indices.numel()), col_indices.long()]
    return blocks.to(torch.promote_types(blocks.dtype, torch.float32))
