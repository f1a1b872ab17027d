"""Block masks for any number of queries and keys, from a few numbers that can be saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_mask import SIDE, BlockMask


@dataclass(frozen=True)
class MaskRule:
    """rule(queries, keys) is the BlockMask of these lengths, for all heads.

    window         a query attends to the keys at most this far from it; None: to all
    global_tokens  the first so many tokens attend to all, and all attend to them
    random_blocks  so many blocks of keys more, drawn for each block of queries
    causal         to no key after the query
    block          side of the blocks, a multiple of 16
    seed           of the random blocks

    Whether a pair attends depends on the two positions alone (and on the number of keys, where blocks are random and
    not causal): decoding with a cache gives what the whole sequence gives.

    Raises ValueError for negative numbers, and blocks that are no multiple of 16.
    Source: Beltagy et al. 2020, arXiv:2004.05150; Zaheer et al. 2020, arXiv:2007.14062.
    """

    window: int | None = None
    global_tokens: int = 0
    random_blocks: int = 0
    causal: bool = False
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "global_tokens", "random_blocks"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"MaskRule: expected {name} of at least 0, got {getattr(self, name)}")
        if self.block < SIDE or self.block % SIDE:
            raise ValueError(f"MaskRule: expected a block in multiples of {SIDE}, got {self.block}")

    def __call__(self, queries: int, keys: int | None = None) -> BlockMask:
        """Few queries, as in decoding, get blocks of as few rows as possible."""
        keys = queries if keys is None else keys
        rows = SIDE if queries <= SIDE else self.block
        top = max(keys - queries, 0) // self.block  # the block of positions of the first query
        drawn = self._drawn(top, -(-keys // self.block)) if self.random_blocks else torch.zeros(0, 0)

        def allowed(query: Tensor, key: Tensor) -> Tensor:
            pairs = (query < self.global_tokens) | (key < self.global_tokens)
            pairs = pairs | (True if self.window is None else (key - query).abs() <= self.window)
            if self.random_blocks:
                row, column = query // self.block - top, key // self.block
                pairs = pairs | drawn[row.clamp(0, drawn.shape[0] - 1), column]
            return pairs & (key <= query) if self.causal else pairs

        def columns(first: int, last: int) -> Tensor:
            near = torch.zeros(-(-keys // self.block), dtype=torch.bool)
            window = keys if self.window is None or first < self.global_tokens else self.window
            near[max(first - window, 0) // self.block : max(last + window, 0) // self.block + 1] = True
            near[: -(-self.global_tokens // self.block)] = True
            if self.random_blocks:
                near |= drawn[max(first, 0) // self.block - top : last // self.block - top + 1].any(dim=0)
            return near[: max(last, 0) // self.block + 1 if self.causal else None].nonzero().flatten()

        return BlockMask.from_function(allowed, queries, keys, (rows, self.block), columns)

    def _drawn(self, top: int, columns: int) -> Tensor:
        """(columns - top, columns) bool: the random blocks of each block of positions, before it or, if not causal,
        anywhere."""
        row, column = torch.arange(top, columns)[:, None], torch.arange(columns)[None, :]
        chance = _hash(_hash(row + (self.seed << 24)) + column)
        if self.causal:
            chance = chance.masked_fill(column > row, -1)
        best = chance.topk(min(self.random_blocks, columns), dim=1).indices
        return torch.zeros(chance.shape, dtype=torch.bool).scatter_(1, best, True) & (chance >= 0)


def _hash(x: Tensor) -> Tensor:
    """Well mixed bits of each int64, not negative (Steele et al. 2014, SplitMix, on 62 bits)."""
    mask = (1 << 62) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B), (27, 0x94D049BB133111EB & mask)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return x ^ (x >> 31)
