"""A transformer encoder layer on packed tokens, token by token: slow, float32 or float64, any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .bsr_linear import bsr_linear


def encoder_pack(x: Tensor, mask: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """The real tokens of x (B, S, H), one after the other: stream (tiles, H, tile) and spans (4, tiles * tile)."""
    batch, length, hidden = x.shape
    tiles = -(-batch * length // tile)
    keys = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    keep = keys.clone()
    keep[:, :1] |= keys.any(dim=1, keepdim=True)
    source = keep.flatten().nonzero().flatten()
    ends = keep.sum(dim=1).cumsum(0)
    sequence = source // max(length, 1)
    used = source.numel()
    tokens = x.new_zeros(tiles * tile, hidden, dtype=torch.float32)
    tokens[:used] = x.reshape(-1, hidden)[source].float()
    spans = torch.zeros(4, tiles * tile, dtype=torch.int32, device=x.device)
    spans[0, used:] = -1
    spans[0, :used] = source.int()
    spans[1, :used] = (ends - keys.sum(dim=1))[sequence].int()
    spans[2, :used] = ends[sequence].int()
    spans[3, :used] = (source % max(length, 1)).int()
    if used:
        spans[1:, used:] = spans[1:, used - 1 : used]
    return tokens.view(tiles, tile, hidden).transpose(1, 2).contiguous(), spans


def encoder_unpack(stream: Tensor, spans: Tensor, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """(B, S, H) in `dtype`, zeros where nothing was packed."""
    hidden = stream.shape[1]
    used = spans[0] >= 0
    x = stream.new_zeros(batch * length, hidden)
    x[spans[0, used].long()] = _tokens(stream)[used]
    return x.view(batch, length, hidden).to(dtype)


def encoder_layer(
    stream: Tensor,
    spans: Tensor,
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    output: list[Tensor],
    fc1: list[Tensor],
    fc2: list[Tensor],
    norms: list[Tensor],
    query_rows: list[int],
    value_rows: list[int],
    scale: float,
    activation: str,
    eps: float,
    pre_norm: bool,
    position_bias: Tensor | None = None,
    precision: str = "float32",
) -> Tensor:
    """The next residual stream, in the dtype of this one; unused lanes get numbers without a meaning."""
    round_ = _ROUNDINGS[precision]

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)

    def attend(x: Tensor) -> Tensor:
        x = round_(x)
        q, k, v = (round_(project(x, projection)) for projection in (query, key, value))
        context = torch.zeros_like(v)
        for queries, keys in _sequences(spans):
            for head in range(len(query_rows) - 1):
                rows = slice(query_rows[head], query_rows[head + 1])
                scores = scale * (q[queries, rows] @ k[keys, rows].t())
                if position_bias is not None:
                    bias = position_bias[head, spans[3, queries].long()][:, spans[3, keys].long()]
                    scores = scores + bias.to(scores.dtype)
                rows = slice(value_rows[head], value_rows[head + 1])
                context[queries, rows] = round_(scores.softmax(dim=1)) @ v[keys, rows]
        return project(round_(context), output)

    def feed_forward(x: Tensor) -> Tensor:
        return project(round_(project(round_(x), fc1, activation)), fc2)

    x = _tokens(stream)
    if pre_norm:
        x = x + attend(normalize(x, *norms[:2]))
        x = x + feed_forward(normalize(x, *norms[2:]))
    else:
        x = normalize(x + attend(x), *norms[:2])
        x = normalize(x + feed_forward(x), *norms[2:])
    tiles, hidden, tile = stream.shape
    return x.view(tiles, tile, hidden).transpose(1, 2).contiguous()


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x,
    "bfloat16": lambda x: x.to(torch.bfloat16).to(x.dtype),
}


def _tokens(stream: Tensor) -> Tensor:
    """(tiles * tile, H)"""
    return stream.transpose(1, 2).flatten(0, 1)


def _sequences(spans: Tensor) -> list[tuple[slice, slice]]:
    """The packed tokens of each sequence, and those among them that they attend to."""
    used = spans[1:3, spans[0] >= 0]
    keys, counts = used.unique_consecutive(dim=1, return_counts=True)
    ends = counts.cumsum(0).tolist()
    queries = map(slice, [0, *ends], ends)
    return [(of, slice(first, last)) for of, (first, last) in zip(queries, keys.t().tolist(), strict=True)]


def project(x: Tensor, projection: list[Tensor], activation: str = "none") -> Tensor:
    """act(x Wᵀ + b), (..., K) -> (..., N), in the dtype of x: `projection` as SparseProjection.tensors() has it."""
    crow, col, values, bias, *scales = projection
    if not scales:
        return bsr_linear(x, crow, col, values.to(x.dtype), bias.to(x.dtype), activation)
    return bsr_linear(x, crow, col, values, bias.to(x.dtype), activation, scales=scales[0])
