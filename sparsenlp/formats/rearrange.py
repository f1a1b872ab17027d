"""Block-sparse matrices with rows and columns moved or left out, as index operations on their blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .block import INDEX_DTYPE, BlockSparse

VACANT = -1
"""In place of a row or column to take: one of zeros."""


def nonzero_rows(weight: BlockSparse) -> Tensor:
    """Which rows hold a nonzero, (N,) bool; a zero that is stored is still a zero."""
    n, _ = weight.block
    counts = torch.zeros(weight.shape[0] // n, n, dtype=INDEX_DTYPE, device=weight.values.device)
    nonzero = (weight.values != 0).any(dim=2)
    return counts.index_add_(0, weight.row_indices(), nonzero.to(INDEX_DTYPE)).flatten() > 0


def nonzero_columns(weight: BlockSparse) -> Tensor:
    """Which columns hold a nonzero, (K,) bool; a zero that is stored is still a zero."""
    _, k = weight.block
    counts = torch.zeros(weight.shape[1] // k, k, dtype=INDEX_DTYPE, device=weight.values.device)
    nonzero = (weight.values != 0).any(dim=1)
    return counts.index_add_(0, weight.col_indices, nonzero.to(INDEX_DTYPE)).flatten() > 0


def rearrange(weight: BlockSparse, rows: Tensor | None = None, columns: Tensor | None = None) -> BlockSparse:
    """The matrix whose row i is row rows[i] of `weight`, and column j column columns[j], without blocks of zeros.

    rows      (N',) int64, each row at most once; VACANT for a row of zeros (with the scale 1); None: all as they are
    columns   (K',) int64, the same
    returns   N' x K' in blocks of the same shape, `weight` itself if nothing changes

    Blocks move whole: the rows taken from one block row must lie in one block row again, in any order and beside
    rows of others, and so for columns. This is not checked.
    """
    n, k = weight.block
    old_rows, old_cols = weight.row_indices(), weight.col_indices.long()
    block_rows, block_cols, values = old_rows, old_cols, weight.values
    height, width = weight.shape[0] // n, weight.shape[1] // k
    if rows is not None:
        block_rows, values = _move(rows, n, height, block_rows, values, dim=1)
        height = rows.numel() // n
    if columns is not None:
        block_cols, values = _move(columns, k, width, block_cols, values, dim=2)
        width = columns.numel() // k

    kept = (values != 0).flatten(1).any(dim=1)
    if rows is not None or columns is not None:
        kept &= (block_rows < height) & (block_cols < width)
    if (
        (height * n, width * k) == weight.shape
        and bool(kept.all())
        and (values is weight.values or torch.equal(values, weight.values))
        and torch.equal(block_rows, old_rows)
        and torch.equal(block_cols, old_cols)
    ):
        return weight
    block_rows, block_cols, values = block_rows[kept], block_cols[kept], values[kept]
    stored = torch.zeros(height, width, dtype=torch.bool, device=values.device)
    stored[block_rows, block_cols] = True
    place = stored.flatten().cumsum(0)[block_rows * width + block_cols] - 1
    crow_indices = torch.zeros(height + 1, dtype=INDEX_DTYPE, device=values.device)
    crow_indices[1:] = stored.sum(dim=1).cumsum(0)
    col_indices = stored.nonzero()[:, 1].to(INDEX_DTYPE)
    # Blocks that meet in one place hold different rows or columns of it, so their sum only puts them together.
    merged = values.new_zeros(col_indices.numel(), n, k).index_add_(0, place, values)
    scales = weight.scales if weight.scales is None or rows is None else take(weight.scales, rows, 1.0)
    return BlockSparse(crow_indices, col_indices, merged, (height * n, width * k), scales)


def take(vector: Tensor, places: Tensor, vacant: float) -> Tensor:
    """vector[places], and `vacant` where a place is VACANT."""
    padded = torch.cat([vector, vector.new_full((1,), vacant)])
    return padded[places]  # VACANT, -1, is the last


def _move(lines: Tensor, side: int, count: int, index: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Where stored blocks go when line i (a row, or a column) becomes lines[i], and their values in the new order.

    index     (nnzb,)  the block row (column) of each stored block, of `count` of them, with `side` lines each
    returns   the new block row (column) of each, past the last one where nothing of it goes anywhere, and values
              (nnzb, n, k) moved along `dim`, with zeros where a line of the block goes nowhere
    """
    groups = lines.view(-1, side)
    target = groups.new_full((count,), groups.shape[0])
    group, slot = (groups != VACANT).nonzero(as_tuple=True)
    target[groups[group, slot] // side] = group
    groups = torch.cat([groups, groups.new_full((1, side), VACANT)])
    source = groups[target] - side * torch.arange(count, device=lines.device)[:, None]  # (count, side)
    changes = (source != torch.arange(side, device=lines.device)).any(dim=1) & (target < groups.shape[0] - 1)
    changed = changes[index].nonzero().squeeze(1)
    if changed.numel():
        new = source[index[changed]].view((-1, side, 1) if dim == 1 else (-1, 1, side))
        moved = values[changed]
        moved = moved.gather(dim, new.clamp(0, side - 1).expand_as(moved))
        values = values.index_copy(0, changed, moved.masked_fill_((new < 0) | (new >= side), 0))
    return target[index], values
