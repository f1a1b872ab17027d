"""Which keys each query attends to, as blocks: what sparse attention skips and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import (
    INDEX_DTYPE,
    block_rows,
    check_col_indices,
    check_count,
    check_crow_indices,
    check_range,
    check_sizes,
)

SIDE = 16
"""Sides of blocks are multiples of this: the least that every kernel works in."""
WHOLE = -1
"""The pattern index of a block in which every query attends to every key."""

Block = tuple[int, int]
Allowed = Callable[[Tensor, Tensor], Tensor]
"""(positions of queries (r, 1), positions of keys (1, c)) -> which pairs attend, bool, broadcastable to (r, c)."""
Columns = Callable[[int, int], Tensor]
"""(first, last position of a block row) -> the block columns in which its queries may attend, increasing, int64."""


@dataclass(frozen=True, eq=False, slots=True)
class BlockMask:
    """Queries x keys, for each head, of which only some blocks of m x n hold a pair that attends.

    crow_indices     (heads * R + 1,)  int32  R = ceil(queries / m); block row r of head h is row h * R + r, and
                                              owns blocks crow_indices[row] .. crow_indices[row + 1]
    col_indices      (nnzb,)           int32  block column, strictly increasing within a block row
    pattern_indices  (nnzb,)           int32  -1: all of the block attends; else which of `patterns`
    patterns         (P, m, n)         bool   [query, key] of a block, True where the pair attends
    shape            (queries, keys)          the last block row and column may reach beyond; nothing there attends
    heads            int                      1: all heads share it

    A block is whole or refers to a pattern, and patterns are shared: the diagonal blocks of a causal mask all have
    the same one, a sliding window has a few, and a mask without any regularity has as many as it has blocks.
    One mechanism so serves every mask exactly, and a kernel needs to know of no other.

    m and n are multiples of 16, 64 by default. Building one checks nothing; `validate` checks everything.
    Queries are the last of the keys: query i of Lq is at position Lk - Lq + i, as with a cache of keys.
    """

    crow_indices: Tensor
    col_indices: Tensor
    pattern_indices: Tensor
    patterns: Tensor
    shape: tuple[int, int]
    heads: int = 1

    @classmethod
    def from_dense(cls, dense: Tensor, block: Block = (64, 64)) -> BlockMask:
        """The mask of bool (queries, keys) or (heads, queries, keys) on the CPU, True where a query attends."""
        if dense.dim() not in (2, 3) or dense.dtype != torch.bool:
            raise ValueError(
                f"BlockMask: expected a bool mask (queries, keys) or (heads, queries, keys), "
                f"got {dense.dtype} of shape {tuple(dense.shape)}"
            )
        _check_block(block)
        heads, queries, keys = shape = dense.shape if dense.dim() == 3 else (1, *dense.shape)
        (m, n), R = block, -(-queries // block[0])
        padded = torch.nn.functional.pad(dense.view(shape), (0, -keys % n, 0, -queries % m))
        every = torch.arange(padded.shape[2] // n)
        rows = ((every, row) for row in padded.reshape(heads * R, m, padded.shape[2]))
        return _from_rows(rows, (queries, keys), heads, block)

    @classmethod
    def from_function(
        cls,
        allowed: Allowed,
        queries: int,
        keys: int | None = None,
        block: Block = (64, 64),
        columns: Columns | None = None,
    ) -> BlockMask:
        """A mask shared by all heads from a function of positions, in memory for a block row at a time.

        keys     None: as many as queries
        columns  where to ask `allowed`, so that time follows the blocks that are kept; None: everywhere
        """
        keys = queries if keys is None else keys
        _check_block(block)
        (m, n), every = block, torch.arange(-(-keys // block[1]))

        def rows() -> Iterable[tuple[Tensor, Tensor]]:
            for first in range(keys - queries, keys, m):
                query = torch.arange(first, first + m)[:, None]
                asked = every if columns is None else columns(first, first + m - 1)
                asked = asked[(asked >= 0) & (asked < every.numel())]
                key = (asked[:, None] * n + torch.arange(n)).view(1, -1)
                yield asked, allowed(query, key).expand(m, key.shape[1])

        return _from_rows(rows(), (queries, keys), 1, block)

    @classmethod
    def stack(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """A mask whose heads are those of `masks`, one after the other; all of the same shape and block."""
        first = masks[0]
        for mask in masks:
            if mask.shape != first.shape or mask.block != first.block:
                raise ValueError(
                    f"BlockMask: expected masks of the same shape and block, "
                    f"got {first.shape}, {first.block} and {mask.shape}, {mask.block}"
                )
        check_count("BlockMask", sum(mask.nnz_blocks for mask in masks))
        crow, index, blocks, patterns = [first.crow_indices[:1]], [], 0, 0
        for mask in masks:
            crow.append(mask.crow_indices[1:] + blocks)
            index.append(torch.where(mask.pattern_indices < 0, WHOLE, mask.pattern_indices + patterns))
            blocks += mask.nnz_blocks
            patterns += mask.patterns.shape[0]
        col, shared = torch.cat([m.col_indices for m in masks]), torch.cat([m.patterns for m in masks])
        return cls(torch.cat(crow), col, torch.cat(index), shared, first.shape, sum(m.heads for m in masks))

    @classmethod
    def causal(cls, queries: int, keys: int | None = None, block: Block = (64, 64)) -> BlockMask:
        """Every query attends to its own position and those before."""
        return cls.from_function(lambda q, k: k <= q, queries, keys, block)

    @classmethod
    def sliding_window(
        cls, queries: int, left: int, right: int, keys: int | None = None, block: Block = (64, 64)
    ) -> BlockMask:
        """Every query attends to its own position, `left` before it and `right` after it.

        Source: Beltagy et al. 2020, arXiv:2004.05150.
        """

        def columns(first: int, last: int) -> Tensor:
            return torch.arange((first - left) // block[1], (last + right) // block[1] + 1)

        return cls.from_function(lambda q, k: (k >= q - left) & (k <= q + right), queries, keys, block, columns)

    @classmethod
    def global_tokens(
        cls, queries: int, positions: Iterable[int], keys: int | None = None, block: Block = (64, 64)
    ) -> BlockMask:
        """The tokens at `positions` attend to all, and all attend to them."""
        at = torch.tensor(sorted(positions), dtype=torch.int64)
        return cls.from_function(lambda q, k: torch.isin(q, at) | torch.isin(k, at), queries, keys, block)

    @classmethod
    def bigbird(
        cls,
        queries: int,
        window: int = 3,
        globals_: int = 1,
        random: int = 3,
        heads: int = 1,
        keys: int | None = None,
        block: Block = (64, 64),
        seed: int = 0,
    ) -> BlockMask:
        """Whole blocks: a window of `window` block columns around the diagonal, the first `globals_` block rows and
        columns, and `random` further block columns of each block row, drawn anew for every head.

        Source: Zaheer et al. 2020, arXiv:2007.14062.
        """
        keys = queries if keys is None else keys
        _check_block(block)
        R, C = -(-queries // block[0]), -(-keys // block[1])
        row, column = torch.arange(R)[:, None], torch.arange(C)[None, :]
        center = (row * block[0] + block[0] // 2 + keys - queries).div(block[1], rounding_mode="floor")
        fixed = ((column - center).abs() <= window // 2) | (row < globals_) | (column < globals_)
        drawn = torch.rand(heads, R, C, generator=torch.Generator().manual_seed(seed)).masked_fill(fixed, -1)
        last = drawn.topk(min(random, C), dim=2).indices
        kept = fixed | torch.zeros(heads, R, C, dtype=torch.bool).scatter_(2, last, True)
        crow, col = _csr(kept.flatten(0, 1))
        whole = torch.full_like(col, WHOLE)
        return cls(crow, col, whole, torch.zeros(0, *block, dtype=torch.bool), (queries, keys), heads)

    @property
    def block(self) -> Block:
        return self.patterns.shape[1], self.patterns.shape[2]

    @property
    def block_rows(self) -> int:
        return -(-self.shape[0] // self.block[0])

    @property
    def block_columns(self) -> int:
        return -(-self.shape[1] // self.block[1])

    @property
    def nnz_blocks(self) -> int:
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """Stored blocks / all blocks: the share of dense attention that is computed."""
        total = self.heads * self.block_rows * self.block_columns
        return self.nnz_blocks / total if total else 0.0

    def to_dense(self) -> Tensor:
        """(heads, queries, keys) bool, True where a query attends to a key."""
        tensors = (self.crow_indices, self.col_indices, self.pattern_indices, self.patterns)
        return to_dense(*tensors, self.shape)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that attend in one mask or the other."""
        return _combine(self, other, torch.logical_or)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that attend in both masks."""
        return _combine(self, other, torch.logical_and)

    def to(self, device: torch.device | str) -> BlockMask:
        crow, col, pattern_indices = (t.to(device) for t in (self.crow_indices, self.col_indices, self.pattern_indices))
        return BlockMask(crow, col, pattern_indices, self.patterns.to(device), self.shape, self.heads)

    def draw(self, head: int = 0, most: int = 96) -> str:
        """A picture, a character for each block: # all of it attends, + some, . none.

        most  lines and columns: of larger masks a character stands for a square of blocks
        """
        size = (self.block_rows, self.block_columns)
        side = max(-(-max(size) // most), 1)
        first = head % self.heads * self.block_rows
        crow = self.crow_indices[first : first + self.block_rows + 1].cpu()
        mine = slice(*crow[[0, -1]].tolist())
        rows = block_rows(crow - crow[:1], mine.stop - mine.start) // side
        columns = self.col_indices[mine].long().cpu() // side
        whole = (self.pattern_indices[mine] < 0).long().cpu()
        kept, full, blocks = torch.zeros(3, *(-(-n // side) for n in size), dtype=torch.int64).unbind()
        kept.index_put_((rows, columns), torch.ones_like(whole), accumulate=True)
        full.index_put_((rows, columns), whole, accumulate=True)
        row, column = (torch.arange(n) // side for n in size)
        blocks.index_put_((row[:, None], column[None, :]), torch.ones(1, dtype=torch.int64), accumulate=True)
        kinds = (kept > 0).long() + (full == blocks)
        return "\n".join("".join(".+#"[kind] for kind in line) for line in kinds.tolist())

    def __str__(self) -> str:
        """What it is in one line, and the picture of each head, at most 4 of them."""
        (queries, keys), (m, n), heads = self.shape, self.block, self.heads
        title = f"BlockMask: {queries} x {keys}, blocks {m}x{n}, {heads} head{'s'[: heads != 1]}, "
        title += f"{self.density:.1%} of the blocks"
        return "\n\n".join([title, *(self.draw(head) for head in range(min(heads, 4)))])

    def validate(self) -> BlockMask:
        """Return self, or raise TypeError (dtypes) or ValueError (shapes, indices) naming the first fault."""
        _validate(self)
        return self


def to_dense(
    crow_indices: Tensor, col_indices: Tensor, pattern_indices: Tensor, patterns: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The tensors of a BlockMask as (heads, queries, keys) bool, True where a query attends to a key."""
    (queries, keys), (_, m, n) = shape, patterns.shape
    R, C = -(-queries // m), -(-keys // n)
    heads = (crow_indices.numel() - 1) // R if R else 1
    rows = block_rows(crow_indices, col_indices.numel())
    with_whole = torch.cat([patterns, patterns.new_ones(1, m, n)])  # the last, which -1 refers to
    blocks = patterns.new_zeros(heads * R, C, m, n)
    blocks = blocks.index_put((rows, col_indices.long()), with_whole[pattern_indices.long()])
    return blocks.unflatten(0, (heads, R)).transpose(2, 3).reshape(heads, R * m, C * n)[:, :queries, :keys]


def _check_block(block: Block) -> None:
    if any(side < SIDE or side % SIDE for side in block):
        raise ValueError(f"BlockMask: expected block sides in multiples of {SIDE}, got {block[0]}x{block[1]}")


def _csr(kept: Tensor) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of kept (rows, columns) bool."""
    columns = kept.nonzero()[:, 1]
    check_count("BlockMask", columns.numel())
    crow = torch.zeros(kept.shape[0] + 1, dtype=INDEX_DTYPE, device=kept.device)
    crow[1:] = kept.sum(dim=1).cumsum(0)
    return crow, columns.to(INDEX_DTYPE)


def _share(blocks: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(patterns, the index of each of `blocks` (N, m, n) among them)."""
    if not blocks.shape[0]:
        return blocks.new_zeros(0, *block), torch.zeros(0, dtype=torch.int64, device=blocks.device)
    eights = blocks.flatten(1).contiguous().view(torch.int64)
    patterns, index = torch.unique(eights, dim=0, return_inverse=True)
    return patterns.view(torch.bool).unflatten(1, block), index


def _from_rows(rows: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int], heads: int, block: Block) -> BlockMask:
    """From each block row in turn, heads one after the other: the block columns that it may keep, increasing, and
    their bools (m, columns * n) on the CPU, anything beyond `shape`."""
    (queries, keys), (m, n) = shape, block
    R = -(-queries // m)
    counts = torch.zeros(heads * R + 1, dtype=INDEX_DTYPE)
    columns = [torch.zeros(0, dtype=torch.int64)]
    partial = [torch.zeros(0, dtype=torch.bool)]
    found = [torch.zeros(0, m, n, dtype=torch.bool)]
    for index, (asked, row) in enumerate(rows):
        blocks = row.unflatten(1, (asked.numel(), n)).transpose(0, 1)  # (columns, m, n)
        inside = (asked[:, None] * n + torch.arange(n) < keys)[:, None] & (torch.arange(m) < queries - index % R * m)[
            :, None
        ]
        some, all_ = (blocks & inside).flatten(1).any(dim=1), (blocks | ~inside).flatten(1).all(dim=1)
        counts[index + 1] = some.sum()
        columns.append(asked[some])
        partial.append((some & ~all_)[some])
        found.append(blocks[some & ~all_])
    patterns, index_of = _share(torch.cat(found), block)
    col = torch.cat(columns).to(INDEX_DTYPE)
    check_count("BlockMask", col.numel())
    indices = torch.full_like(col, WHOLE)
    indices[torch.cat(partial)] = index_of.to(INDEX_DTYPE)
    return BlockMask(counts.cumsum(0, dtype=INDEX_DTYPE), col, indices, patterns, shape, heads)


def _combine(a: BlockMask, b: BlockMask, operation: Callable[[Tensor, Tensor], Tensor]) -> BlockMask:
    """Block by block; each pair of patterns that meets is combined once."""
    if a.shape != b.shape or a.block != b.block or (a.heads != b.heads and 1 not in (a.heads, b.heads)):
        raise ValueError(
            f"BlockMask: expected masks of the same shape, block and heads (or 1), "
            f"got {a.shape}, {a.block}, {a.heads} and {b.shape}, {b.block}, {b.heads}"
        )
    heads = max(a.heads, b.heads)
    size = (heads, a.block_rows, a.block_columns)
    codes = torch.stack([_codes(mask).expand(size).flatten() for mask in (a, b)], dim=1)
    pairs, inverse = torch.unique(codes, dim=0, return_inverse=True)
    blocks = operation(_blocks(a, pairs[:, 0]), _blocks(b, pairs[:, 1]))
    some, all_ = blocks.flatten(1).any(dim=1), blocks.flatten(1).all(dim=1)
    partial = some & ~all_
    patterns, index_of = _share(blocks[partial], a.block)
    index = torch.full(some.shape, WHOLE, dtype=INDEX_DTYPE, device=some.device)
    index[partial] = index_of.to(INDEX_DTYPE)
    kept = some[inverse]
    crow, col = _csr(kept.view(heads * a.block_rows, a.block_columns))
    return BlockMask(crow, col, index[inverse[kept]], patterns, a.shape, heads)


def _codes(mask: BlockMask) -> Tensor:
    """(heads, R, C) the pattern index of each block, or -2 where there is none."""
    codes = mask.col_indices.new_full((mask.heads * mask.block_rows, mask.block_columns), -2)
    codes[block_rows(mask.crow_indices, mask.nnz_blocks), mask.col_indices.long()] = mask.pattern_indices
    return codes.unflatten(0, (mask.heads, mask.block_rows))


def _blocks(mask: BlockMask, codes: Tensor) -> Tensor:
    """The (N, m, n) contents of blocks with these codes."""
    ends = [torch.full((1, *mask.block), value, dtype=torch.bool, device=codes.device) for value in (False, True)]
    return torch.cat([*ends, mask.patterns])[codes.long() + 2]


def _validate(mask: BlockMask) -> None:
    patterns, queries, keys = mask.patterns, *mask.shape
    if patterns.dtype != torch.bool:
        raise TypeError(f"BlockMask: expected patterns of dtype torch.bool, got {patterns.dtype}")
    if patterns.dim() != 3 or not patterns.is_contiguous():
        raise ValueError(f"BlockMask: expected contiguous patterns (P, m, n), got shape {tuple(patterns.shape)}")
    _check_block(mask.block)
    check_sizes("BlockMask", (queries, keys))
    if mask.heads < 1:
        raise ValueError(f"BlockMask: expected at least 1 head, got {mask.heads}")
    rows, blocks = mask.heads * mask.block_rows, mask.col_indices.numel()
    sizes = {"crow_indices": rows + 1, "col_indices": blocks, "pattern_indices": blocks}
    for name, size in sizes.items():
        index = getattr(mask, name)
        if index.dtype != INDEX_DTYPE:
            raise TypeError(f"BlockMask: expected {name} of dtype {INDEX_DTYPE}, got {index.dtype}")
        if index.shape != (size,) or not index.is_contiguous():
            raise ValueError(f"BlockMask: expected {size} contiguous {name}, got shape {tuple(index.shape)}")
        if index.device != patterns.device:
            raise ValueError(f"BlockMask: expected {name} on {patterns.device}, got {index.device}")
    check_crow_indices("BlockMask", mask.crow_indices, blocks)
    check_col_indices("BlockMask", mask.crow_indices, mask.col_indices, mask.block_columns)
    check_range("BlockMask", "pattern_indices", mask.pattern_indices, WHOLE, patterns.shape[0])
