"""embed_layer_norm in plain torch: any dtype and device, differentiable by torch itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .add_layer_norm import normalize, widen


def embed_layer_norm(
    ids: Tensor,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    padding_idx: int | None = None,
) -> Tensor:
    """LayerNorm of the sum of rows of up to three tables, (..., S) -> (..., S, H); halves are computed in float32."""
    if not (ids.is_meta or torch.compiler.is_compiling()):  # then there are no values, only shapes
        _check_indices(ids, word, position, token_type, position_ids, token_type_ids, padding_idx)
    total = embed(ids, word, position, token_type, position_ids, token_type_ids, padding_idx)
    return normalize(total, weight, bias, eps).to(word.dtype)


def embed(
    ids: Tensor,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    padding_idx: int | None = None,
) -> Tensor:
    """The sum before the LayerNorm, (..., S, H) in float32 or wider, for indices that were checked."""
    total = widen(F.embedding(ids, word))
    if token_type is not None:
        total = total + widen(F.embedding(token_type_indices(ids, token_type_ids), token_type))
    if position is not None:
        total = total + widen(F.embedding(position_indices(ids, position_ids, padding_idx), position))
    return total


def token_type_indices(ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """The row of token_type for every id."""
    return torch.zeros_like(ids) if token_type_ids is None else _repeated(token_type_ids, ids)


def position_indices(ids: Tensor, position_ids: Tensor | None, padding_idx: int | None) -> Tensor:
    """The row of position for every id."""
    if position_ids is not None:
        return _repeated(position_ids, ids)
    if padding_idx is None:
        return torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    real = ids.ne(padding_idx).long()
    return padding_idx + real * real.cumsum(-1)


def _repeated(indices: Tensor, ids: Tensor) -> Tensor:
    """Indices of the shape of ids, or of one sequence, for every id."""
    return indices if indices.shape == ids.shape else indices.reshape(-1).expand(ids.shape)


def _check_indices(
    ids: Tensor,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    padding_idx: int | None,
) -> None:
    """Raise IndexError for an id outside of its table, ValueError for more positions than there are."""
    for name, indices, table in (
        ("ids", ids, word),
        ("token_type_ids", token_type_ids, token_type),
        ("position_ids", position_ids, position),
    ):
        if indices is None or table is None or not indices.numel():
            continue
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= table.shape[0]:
            got = low if low < 0 else high
            raise IndexError(f"embed_layer_norm: expected {name} from 0 to {table.shape[0] - 1}, got {got}")
    if position is not None and padding_idx is not None and ids.numel():
        check_length(int(ids.ne(padding_idx).sum(-1).max()), position.shape[0] - padding_idx - 1)


def check_length(length: int, positions: int) -> None:
    """Raise ValueError unless a sequence of `length` has no more than this many positions."""
    if length > positions:
        raise ValueError(f"embed_layer_norm: expected at most P = {positions} positions, got S = {length}")
