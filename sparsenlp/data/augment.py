"""Texts without labels, for a student to imitate its teacher on: joined to labelled ones, or made from them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from .batches import UNLABELLED, TokenizedDataset


def join(parts: Sequence[TokenizedDataset]) -> TokenizedDataset:
    """The texts of all parts, one after another.

    Raises ValueError for no parts, and for parts of different columns or padding, which come from different tokenizers.
    """
    if not parts:
        raise ValueError("join: expected at least one data set, got none")
    first = parts[0]
    for part in parts:
        if part.pad_values != first.pad_values:
            raise ValueError(f"join: expected columns and padding {first.pad_values}, got {part.pad_values}")
    columns = {name: [ids for part in parts for ids in part.columns[name]] for name in first.columns}
    return TokenizedDataset(columns, torch.cat([part.labels for part in parts]), first.pad_values)


def without_labels(data: TokenizedDataset) -> TokenizedDataset:
    """The same texts, UNLABELLED."""
    return TokenizedDataset(data.columns, torch.full_like(data.labels, UNLABELLED), data.pad_values)


def splice(data: TokenizedDataset, count: int, seed: int = 0) -> TokenizedDataset:
    """`count` texts without labels, each the beginning of one text and the end of another, drawn and cut at random.

    The first token of the one and the last of the other stay, where tokenizers put special tokens; no
    text is longer than the longest there was. A teacher's answers to such texts show more of what it
    computes than those to texts that it was trained on; as MixKD does by mixing embeddings (Liang et
    al. 2021, arXiv:2011.00593).

    Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"splice: expected a count of at least 0, got {count}")
    rng = random.Random(seed)
    lengths = data.lengths
    longest = max(lengths)
    columns: dict[str, list[list[int]]] = {name: [] for name in data.columns}
    for _ in range(count):
        a, b = rng.randrange(len(data)), rng.randrange(len(data))
        begin = rng.randint(min(1, lengths[b] - 1), lengths[b] - 1)
        end = min(rng.randint(1, max(lengths[a] - 1, 1)), max(longest - (lengths[b] - begin), 1))
        for name, rows in data.columns.items():
            columns[name].append(rows[a][:end] + rows[b][begin:])
    return TokenizedDataset(columns, torch.full((count,), UNLABELLED), data.pad_values)
