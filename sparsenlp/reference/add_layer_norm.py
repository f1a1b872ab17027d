"""add_layer_norm in plain torch: any dtype and device, differentiable by torch itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm(x + residual) * weight + bias over the last dimension; halves are computed in float32."""
    total = widen(x) if residual is None else widen(x) + widen(residual)
    return normalize(total, weight, bias, eps).to(x.dtype)


def normalize(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of `total` in its own dtype."""
    weight, bias = weight.to(total.dtype), bias.to(total.dtype) if bias is not None else None
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def normalize_backward(
    grad: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `normalize` for its total, in the dtype of total, and for its weight and bias, in theirs."""
    row, dtype = total.shape[-1:], total.dtype
    wide_weight, wide_bias = weight.to(dtype), bias.to(dtype) if bias is not None else None
    _, mean, rstd = torch.ops.aten.native_layer_norm(total, row, wide_weight, wide_bias, eps)
    grad_total, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype), total, row, mean, rstd, wide_weight, wide_bias, [True, True, bias is not None]
    )
    return grad_total, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype) if bias is not None else None


def widen(t: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
