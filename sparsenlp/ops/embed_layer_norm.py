"""The embeddings of an encoder: rows of up to three tables, added and normalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import add_layer_norm as norm_reference
from ..reference import embed_layer_norm as reference
from .add_layer_norm import call_op, check_like, check_norm, choose_backend
from .devices import on_one_device, register_fake


def embed_layer_norm(
    ids: Tensor,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = LayerNorm(word[ids] + token_type[token_type_ids] + position[position_ids]) * weight + bias.

    ids             (..., S)  int64, below V
    word            (V, H)    any floating dtype
    position        (P, H)    dtype of word; None adds no positions
    token_type      (T, H)    dtype of word; None adds no token types
    weight, bias    (H,)      dtype of word; no bias counts as zeros
    eps             added to the variance
    position_ids    int64, below P, the shape of ids or (S,) or (1, S); None is 0, 1, ..., S - 1
    token_type_ids  int64, below T, the shape of ids or (S,) or (1, S); None is all 0
    padding_idx     instead of position_ids, as in RoBERTa: ids that differ from padding_idx have the positions
                    padding_idx + 1, padding_idx + 2, ... of each sequence, the others padding_idx
    backend         None chooses: "native" for float32 and bfloat16 tables on a CPU where the extension is built,
                    else "reference". A named backend runs or raises RuntimeError.
    returns         (..., S, H)  dtype of word; the sum and the statistics are kept in float32 (float64 for float64)

    Every index is checked before a row is read; while torch.compile traces, only shapes are.
    Differentiable in the tables, weight and bias; gradients of tables are dense.

    Raises IndexError for an id outside of its table, ValueError if a sequence has more positions than the table, or
    shapes or devices disagree, TypeError if dtypes do.
    """
    _check(ids, word, position, token_type, weight, bias, position_ids, token_type_ids, padding_idx)
    tensors = (ids, word, position, token_type, position_ids, token_type_ids, weight, bias)
    if choose_backend("embed_layer_norm", word, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(*tensors, eps, padding_idx)
    return call(*tensors, eps, padding_idx)


def call(
    ids: Tensor,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    padding_idx: int | None,
) -> Tensor:
    """embed_layer_norm on CPU tensors of a native dtype, for layers: the op itself checks what layers do not know."""
    tensors = (ids, word, position, token_type, position_ids, token_type_ids, weight, bias)
    return call_op(_op, *tensors, eps, padding_idx)


def _check(
    ids: Tensor,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    padding_idx: int | None,
) -> None:
    op = "embed_layer_norm"
    if word.dim() != 2 or not word.is_floating_point():
        raise ValueError(f"{op}: expected a floating word (V, H), got {word.dtype} of shape {tuple(word.shape)}")
    if not ids.dim():
        raise ValueError(f"{op}: expected ids (..., S), got a scalar")
    if position is None and (position_ids is not None or padding_idx is not None):
        raise ValueError(f"{op}: expected position_ids or padding_idx only with a table of positions")
    if padding_idx is not None and (position_ids is not None or padding_idx < 0):
        raise ValueError(f"{op}: expected padding_idx of at least 0, and no position_ids beside it, got {padding_idx}")
    if token_type is None and token_type_ids is not None:
        raise ValueError(f"{op}: expected token_type_ids only with a table of token types")
    length = ids.shape[-1]
    for name, t in (("ids", ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if t is None:
            continue
        if t.dtype != torch.int64:
            raise TypeError(f"{op}: expected {name} of dtype torch.int64, got {t.dtype}")
        if t.shape != ids.shape and tuple(t.shape) not in ((length,), (1, length)):
            shapes = f"{tuple(ids.shape)} or ({length},) or (1, {length})"
            raise ValueError(f"{op}: expected {name} of shape {shapes}, got {tuple(t.shape)}")
        if t.device != word.device:
            raise ValueError(f"{op}: expected {name} on {word.device}, got {t.device}")
    hidden = word.shape[1]
    for name, table in (("position", position), ("token_type", token_type)):
        if table is not None:
            check_like(op, name, table, (table.shape[0] if table.dim() else 0, hidden), word)
    check_norm(op, weight, bias, hidden, word)
    if token_type is not None and not token_type.shape[0]:
        raise ValueError(f"{op}: expected at least one row in token_type, got none")
    if position is not None and position_ids is None and padding_idx is None:
        reference.check_length(length, position.shape[0])


# The torch.library op. It exists without the extension too (then it runs the reference), so that exported
# programs load everywhere.
torch.library.define(
    "sparsenlp::embed_layer_norm",
    "(Tensor ids, Tensor word, Tensor? position, Tensor? token_type, Tensor? position_ids, Tensor? token_type_ids, "
    "Tensor weight, Tensor? bias, float eps, int? padding_idx=None) -> Tensor",
)
_op = torch.ops.sparsenlp.embed_layer_norm.default
_reference = on_one_device("embed_layer_norm", reference.embed_layer_norm)
if not native.available:
    torch.library.impl("sparsenlp::embed_layer_norm", "cpu", reference.embed_layer_norm)


@register_fake("embed_layer_norm")
def _fake(ids: Tensor, word: Tensor, *_: Any, **__: Any) -> Tensor:
    return word.new_empty(*ids.shape, word.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    ids, word, position, token_type, position_ids, token_type_ids, weight, bias = ctx.saved_tensors
    total = reference.embed(ids, word, position, token_type, position_ids, token_type_ids, ctx.padding_idx)
    grad_total, grad_weight, grad_bias = norm_reference.normalize_backward(grad, total, weight, bias, ctx.eps)

    def rows(table: Tensor | None, indices: Tensor) -> Tensor | None:
        if table is None:
            return None
        return torch.ops.aten.embedding_dense_backward(grad_total, indices, table.shape[0], -1, False).to(table.dtype)

    grad_position = rows(position, reference.position_indices(ids, position_ids, ctx.padding_idx))
    grad_type = rows(token_type, reference.token_type_indices(ids, token_type_ids))
    return None, rows(word, ids), grad_position, grad_type, None, None, grad_weight, grad_bias, None, None


torch.library.register_autograd("sparsenlp::embed_layer_norm", _backward, setup_context=_setup_context)
