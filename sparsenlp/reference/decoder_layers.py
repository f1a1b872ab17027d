"""decoder_layers in plain torch: any dtype and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .bsr_linear import ACTIVATIONS as FUSED_ACTIVATIONS
from .bsr_linear import bsr_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    **{name: function for name, function in FUSED_ACTIVATIONS.items() if name != "none"},
}


def decoder_layers(
    x: Tensor,
    cache: Tensor,
    past: int,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    biases: list[Tensor],
    scales: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    heads: int,
    scale: float,
    activation: str,
    eps: float,
    rope: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """x (B, T, H) through all layers and the last norm; writes keys and values of the T tokens into the cache."""
    _, layers, batch, kv_heads, _, head_dim = cache.shape
    each = len(values) // max(layers, 1)
    length = x.shape[1]
    act = ACTIVATIONS[activation]

    def norm(x: Tensor, at: int) -> Tensor:
        if norm_biases:
            return F.layer_norm(x, x.shape[-1:], norm_weights[at], norm_biases[at], eps)
        return F.rms_norm(x, x.shape[-1:], norm_weights[at], eps)

    def project(x: Tensor, at: int) -> Tensor:
        bias = biases[at] if biases and biases[at].numel() else None
        if values[at].dim() == 2:
            return F.linear(x, values[at], bias)
        row_scales = scales[at] if scales and scales[at].numel() else None
        return bsr_linear(x, crow_indices[at], col_indices[at], values[at], bias, "none", None, row_scales)

    def split_heads(x: Tensor) -> Tensor:
        return x.view(batch, length, x.shape[-1] // head_dim, head_dim).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        if rope is None or positions is None:
            return x
        cos, sin = rope.to(x.dtype)[positions][:, None].chunk(2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    seen = torch.arange(past + length, device=x.device) <= past + torch.arange(length, device=x.device)[:, None]
    seen = seen.expand(batch, 1, length, past + length)
    if mask is not None:
        seen = seen & mask[:, None, None]
    for layer in range(layers):
        first = layer * each
        normed = norm(x, 2 * layer)
        if each >= 6:
            query, key, value = (project(normed, first + i) for i in range(3))
            after = first + 3
        else:
            rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
            query, key, value = project(normed, first).split(rows, dim=-1)
            after = first + 1
        keys, stored = cache[:, layer, :, :, : past + length]
        keys[:, :, past:] = rotate(split_heads(key))
        stored[:, :, past:] = split_heads(value)
        group = heads // kv_heads
        scores = rotate(split_heads(query)) @ keys.repeat_interleave(group, 1).mT * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        attended = weights @ stored.repeat_interleave(group, 1)
        x = x + project(attended.transpose(1, 2).reshape(batch, length, heads * head_dim), after)
        normed = norm(x, 2 * layer + 1)
        if each % 2:
            inner = act(project(normed, after + 1)) * project(normed, after + 2)
        else:
            inner = act(project(normed, after + 1))
        x = x + project(inner, first + each - 1)
    return norm(x, 2 * layers)
