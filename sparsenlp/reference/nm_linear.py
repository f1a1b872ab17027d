"""nm_linear by building the dense matrix: slow, any pattern, dtype and device, differentiable by torch itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats.nm import columns_of, to_dense
from .bsr_linear import ACTIVATIONS, int8_linear


def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    pattern: tuple[int, int],
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> Tensor:
    """act(x Wᵀ + b + residual), (..., K) -> (..., N)."""
    if scales is None:
        y = F.linear(x, to_dense(values, indices, pattern, x.shape[-1]), bias)
    else:
        y = int8_linear(x, to_dense(values.double(), indices, pattern, x.shape[-1]), scales, bias, input_scale)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def nm_linear_dgrad(grad: Tensor, values: Tensor, indices: Tensor, pattern: tuple[int, int], columns: int) -> Tensor:
    """grad W: grad (M, N) -> (M, columns)."""
    return grad @ to_dense(values, indices, pattern, columns)


def nm_linear_wgrad(grad: Tensor, x: Tensor, indices: Tensor, pattern: tuple[int, int]) -> Tensor:
    """What gradᵀ x holds at the stored places: grad (M, N), x (M, K) -> (N, K / m * n)."""
    return (grad.t() @ x).gather(1, columns_of(indices, pattern))
