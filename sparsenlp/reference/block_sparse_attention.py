"""Block-sparse attention in plain torch, through the dense mask: any floating dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.block_mask import to_dense
from .add_layer_norm import widen


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(softmax(scale Q Kᵀ) V over the keys that each query attends to, log-sum-exp); halves in float32.

    Rows without any key give zeros, and a log-sum-exp of -inf. Differentiable by torch itself.
    """
    mask = (crow_indices, col_indices, pattern_indices, patterns)
    keep = _keep(query, key, *mask, key_mask)
    k, v = (_of_query_heads(t, query, key_mask) for t in (key, value))
    scores = (scale * (widen(query) @ k.transpose(2, 3))).masked_fill(~keep, -torch.inf)
    lowest = torch.finfo(scores.dtype).min
    largest = scores.detach().amax(dim=3, keepdim=True).clamp(min=lowest) if key.shape[2] else scores.sum(3, True)
    weights = (scores - largest).exp()
    total = weights.sum(dim=3, keepdim=True)
    empty = ~keep.any(dim=3, keepdim=True)
    total = total.masked_fill(empty, 1)
    context = (weights @ v / total).masked_fill(empty, 0)
    lse = (largest + total.log()).masked_fill(empty, -torch.inf)
    return context.to(query.dtype), lse[..., 0]


def block_sparse_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from that of the context (B, H, Lq, E) and what forward returned.

    lse    (B, H, Lq)  as forward returned it
    delta  (B, H, Lq)  sum of grad * context over E, minus the gradient of lse; dtype of lse
    """
    mask = (crow_indices, col_indices, pattern_indices, patterns)
    keep = _keep(query, key, *mask, key_mask)
    q, g = widen(query), widen(grad)
    k, v = (_of_query_heads(t, query, key_mask) for t in (key, value))
    scores = scale * (q @ k.transpose(2, 3)) - lse[..., None]
    p = scores.exp().masked_fill(~keep, 0)
    ds = (p * (g @ v.transpose(2, 3) - delta[..., None]) * scale).masked_fill(~keep, 0)
    heads, group = key.shape[1], query.shape[1] // max(key.shape[1], 1)
    grads = (t.unflatten(1, (heads, group)).sum(2) for t in (ds.transpose(2, 3) @ q, p.transpose(2, 3) @ g))
    grad_key, grad_value = grads
    return (ds @ k).to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _keep(
    query: Tensor,
    key: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """(B or 1, heads or 1, Lq, Lk) bool, True where a query attends to a key."""
    shape = (query.shape[2], key.shape[2])
    keep = to_dense(crow_indices, col_indices, pattern_indices, patterns, shape)[None]
    return keep if key_mask is None else keep & key_mask[:, None, None, :]


def _of_query_heads(t: Tensor, query: Tensor, key_mask: Tensor | None) -> Tensor:
    """Keys or values (B, Hkv, Lk, D) as (B, H, Lk, D) of float32 or wider, zeros at padding."""
    t = widen(t)
    if key_mask is not None:
        t = t.masked_fill(~key_mask[:, None, :, None], 0)
    return t.repeat_interleave(query.shape[1] // max(t.shape[1], 1), dim=1)
