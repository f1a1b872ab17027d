"""Multi-head attention within sequences in plain torch: any floating dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from .add_layer_norm import widen


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float,
    position_bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale Q Kᵀ + position_bias) V of each head over real tokens, zeros at padding; halves in float32."""
    padding = torch.zeros(query.shape[:2], dtype=torch.bool, device=query.device) if mask is None else ~mask
    q, k, v = (
        widen(t).masked_fill(padding[:, :, None], 0).unflatten(2, (heads, t.shape[2] // heads)).transpose(1, 2)
        for t in (query, key, value)
    )
    scores = scale * (q @ k.transpose(2, 3))
    if position_bias is not None:
        scores = scores + position_bias.to(scores.dtype)
    scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    context = (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    return context.masked_fill(padding[:, :, None], 0).to(query.dtype)
