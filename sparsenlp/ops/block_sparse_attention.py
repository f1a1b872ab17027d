"""Attention that computes only the blocks of queries x keys that a mask keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native, triton_kernels
from ..formats import BlockMask
from ..reference import block_sparse_attention as reference
from .add_layer_norm import call_op
from .bsr_linear import NATIVE_DTYPES
from .devices import on_one_device, register_fake

BACKENDS = ("native", "triton", "reference")


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = softmax(scale Q Kᵀ) V for each head, each query over the keys that `mask` gives it.

    query     (B, H, Lq, D)    any floating dtype
    key       (B, Hkv, Lk, D)  dtype of query; H a multiple of Hkv, query head h uses key head h // (H / Hkv)
    value     (B, Hkv, Lk, E)  dtype of query
    mask      Lq x Lk          for 1 head (all share it) or H, on the device of query; see BlockMask
    key_mask  (B, Lk)          bool, False for padding, which is not read; None: there is none
    scale     None is 1 / sqrt(D)
    backend   None chooses: "native" for float32 and bfloat16 on a CPU where the extension is built, "triton" on
              CUDA, else "reference". A named or chosen backend runs or raises RuntimeError.
    returns   (B, H, Lq, E)    dtype of query; with return_lse also the log-sum-exp of the scaled scores of each
              query, (B, H, Lq), float32 (float64 for float64)

    A query without any key gives zeros, a log-sum-exp of -inf, and no gradient. Time and memory follow the stored
    blocks, but for the reference, which is dense. NaN or infinity reaches the queries that attend to it, as in
    scaled_dot_product_attention, and may reach others in whose stored blocks it lies.

    The native op looks at every index of the mask; on a GPU they are trusted, as they were checked when the mask was
    built, or by `mask.validate()`.
    Differentiable, once, in query, key and value, through the log-sum-exp too. Sums are kept in float32.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree.
    Source: Dao et al. 2022, arXiv:2205.14135; Zaheer et al. 2020, arXiv:2007.14062.
    """
    _check(query, key, value, mask, key_mask)
    if scale is None:
        scale = (query.shape[3] or 1) ** -0.5
    tensors = (mask.crow_indices, mask.col_indices, mask.pattern_indices, mask.patterns)
    arguments = (query, key, value, *tensors, key_mask, scale)
    if _choose(query, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            y, lse = _reference(*arguments)
    else:
        y, lse = call_op(_op, *arguments)
    return (y, lse) if return_lse else y


def _check(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, key_mask: Tensor | None) -> None:
    op = "block_sparse_attention"
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4 or not t.is_floating_point():
            raise ValueError(f"{op}: expected a floating {name} of 4 dimensions, got {t.dtype} of {tuple(t.shape)}")
        if t.dtype != query.dtype:
            raise TypeError(f"{op}: expected {name} of dtype {query.dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ValueError(f"{op}: expected {name} on {query.device}, got {t.device}")
    (batch, heads, queries, width), (_, kv_heads, keys, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != width:
        raise ValueError(f"{op}: expected key of shape ({batch}, Hkv, Lk, {width}), got {tuple(key.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"{op}: expected value of shape {(batch, kv_heads, keys)} x E, got {tuple(value.shape)}")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"{op}: expected query heads in multiples of {kv_heads} key heads, got {heads}")
    if tuple(mask.shape) != (queries, keys):
        raise ValueError(f"{op}: expected a mask of {queries} queries x {keys} keys, got {mask.shape}")
    if mask.heads not in (1, heads):
        raise ValueError(f"{op}: expected a mask of 1 or {heads} heads, got {mask.heads}")
    if mask.col_indices.device != query.device:
        raise ValueError(f"{op}: expected a mask on {query.device}, got {mask.col_indices.device}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{op}: expected a key_mask of dtype torch.bool, got {key_mask.dtype}")
        if key_mask.shape != (batch, keys) or key_mask.device != query.device:
            raise ValueError(
                f"{op}: expected a key_mask of shape {(batch, keys)} on {query.device}, "
                f"got {tuple(key_mask.shape)} on {key_mask.device}"
            )


def _choose(query: Tensor, backend: str | None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot."""
    runs = query.is_cpu and query.dtype in NATIVE_DTYPES
    if backend is None:
        if query.is_cuda:
            backend = "triton"
        else:
            return "native" if native.available and runs else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"block_sparse_attention: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    got = f"got {query.dtype} on {query.device}"
    why = ""
    if backend == "native" and not native.available:
        why = native.why_unavailable
    elif backend == "native" and not runs:
        why = f"expected float32 or bfloat16 on cpu, {got}"
    elif backend == "triton" and not (query.is_cuda and query.dtype in triton_kernels.DTYPES):
        why = f"expected float32, float16 or bfloat16 on cuda, {got}"
    if why:
        raise RuntimeError(f"block_sparse_attention: backend {backend!r} cannot run: {why}")
    return backend


# The torch.library ops. They exist without the extension too (then they run the reference), so that exported
# programs load everywhere.
_MASK = "Tensor crow_indices, Tensor col_indices, Tensor pattern_indices, Tensor patterns, Tensor? key_mask"
_SCHEMAS = {
    "block_sparse_attention": f"(Tensor query, Tensor key, Tensor value, {_MASK}, float scale) -> (Tensor, Tensor)",
    "block_sparse_attention_backward": "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, "
    f"Tensor delta, {_MASK}, float scale) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"sparsenlp::{_name}", _schema)
_op = torch.ops.sparsenlp.block_sparse_attention.default
_backward_op = torch.ops.sparsenlp.block_sparse_attention_backward.default
_reference = on_one_device("block_sparse_attention", reference.block_sparse_attention)
if not native.available:
    torch.library.impl("sparsenlp::block_sparse_attention", "cpu", reference.block_sparse_attention)
    torch.library.impl("sparsenlp::block_sparse_attention_backward", "cpu", reference.block_sparse_attention_backward)


def _triton(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return triton_kernels.load("block_sparse_attention", query).block_sparse_attention(query, *rest)


def _triton_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernels.load("block_sparse_attention_backward", grad).block_sparse_attention_backward(grad, *rest)


for _name, _function in (("block_sparse_attention", _triton), ("block_sparse_attention_backward", _triton_backward)):
    triton_kernels.register(_name, on_one_device(_name, _function))


@register_fake("block_sparse_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = query.new_empty(*query.shape[:3], value.shape[3])
    return y, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@register_fake("block_sparse_attention_backward")
def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple:
    query, key, value, *mask, y, lse = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(y)
    delta = (grad.to(lse.dtype) * y.to(lse.dtype)).sum(3)
    if grad_lse is not None:
        delta = delta - grad_lse
    grads = _backward_op(grad, query, key, value, lse, delta, *mask, ctx.scale)
    return *grads, None, None, None, None, None, None


torch.library.register_autograd("sparsenlp::block_sparse_attention", _backward, setup_context=_setup_context)
