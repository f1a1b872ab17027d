"""Multi-head attention of an encoder, on queries, keys and values as linear layers leave them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import dense_attention as reference
from .add_layer_norm import check_like, choose_backend
from .devices import on_one_device, register_fake


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = softmax(scale Q Kᵀ + position_bias) V for each head, over the real tokens of each sequence. For inference.

    query, key     (B, S, heads * d)  any floating dtype; d to 256 is tested
    value          (B, S, heads * e)  dtype of query
    mask           (B, S)             bool, True for a real token, anywhere in the sequence; None: all are
    scale          None is 1 / sqrt(d)
    position_bias  (heads, S, S)      float32, added to the scaled scores of [head, query, key]
    backend        None chooses: "native" for float32 and bfloat16 on a CPU where the extension is built, else
                   "reference". A named backend runs or raises RuntimeError.
    returns        (B, S, heads * e)  dtype of query; zeros at padding, and where a sequence is all padding

    query, key and value may be views of one (B, S, (2 d + e) heads): they are not copied as long as the features of
    a token are next to each other and tokens are evenly apart. Padding is neither read nor computed, and
    scores never leave the cache. Sums are kept in float32; in bfloat16 on a CPU with dot products for it,
    probabilities are rounded to bfloat16 before they meet the values.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree, RuntimeError if a gradient is asked
    for.
    Source: Dao et al. 2022, arXiv:2205.14135.
    """
    _check(query, key, value, heads, mask, position_bias)
    if scale is None:
        scale = (query.shape[2] // heads or 1) ** -0.5
    return call(query, key, value, heads, mask, scale, position_bias, backend)


def call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float,
    position_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dense_attention for layers: the op itself checks shapes and dtypes."""
    inputs = (query, key, value, heads, mask, scale, position_bias)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise RuntimeError(
            "dense_attention: expected torch.no_grad() or tensors without gradients; it is for inference"
        )
    if choose_backend("dense_attention", query, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(*inputs)
    return _op(*inputs)


def _check(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, position_bias: Tensor | None
) -> None:
    op = "dense_attention"
    if query.dim() != 3 or not query.is_floating_point():
        shape = tuple(query.shape)
        raise ValueError(f"{op}: expected a floating query (B, S, heads * d), got {query.dtype} of shape {shape}")
    if heads < 1 or query.shape[2] % heads:
        raise ValueError(f"{op}: expected columns of query in multiples of heads, got {query.shape[2]} for {heads}")
    check_like(op, "key", key, query.shape, query)
    columns = value.shape[2] if value.dim() == 3 else 0
    if columns % heads:
        raise ValueError(f"{op}: expected columns of value in multiples of heads, got {columns} for {heads}")
    batch, length = query.shape[:2]
    check_like(op, "value", value, (batch, length, columns), query)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: expected a mask of dtype torch.bool, got {mask.dtype}")
        if mask.shape != (batch, length) or mask.device != query.device:
            raise ValueError(
                f"{op}: expected a mask of shape {(batch, length)} on {query.device}, "
                f"got {tuple(mask.shape)} on {mask.device}"
            )
    if position_bias is not None:
        shape = (heads, length, length)
        wrong = position_bias.dtype != torch.float32 or position_bias.device != query.device
        if wrong or position_bias.shape != shape:
            raise ValueError(
                f"{op}: expected a float32 position_bias of shape {shape} on {query.device}, "
                f"got {tuple(position_bias.shape)} {position_bias.dtype} on {position_bias.device}"
            )


# The torch.library op. It exists without the extension too (then it runs the reference), so that exported
# programs load everywhere.
torch.library.define(
    "sparsenlp::dense_attention",
    "(Tensor query, Tensor key, Tensor value, int heads, Tensor? mask, float scale, Tensor? position_bias=None) "
    "-> Tensor",
)
_op = torch.ops.sparsenlp.dense_attention.default
_reference = on_one_device("dense_attention", reference.dense_attention)
if not native.available:
    torch.library.impl("sparsenlp::dense_attention", "cpu", reference.dense_attention)


@register_fake("dense_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(value.shape)
