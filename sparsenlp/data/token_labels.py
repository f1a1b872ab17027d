"""Data sets whose labels are tokens: pairs of a source and a target, and windows for language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import UNLABELLED, TokenizedDataset, encode


def sequence_pairs(
    sources: Sequence[str], targets: Sequence[str], tokenizer: Any, target_tokenizer: Any, max_length: int = 512
) -> TokenizedDataset:
    """Columns "input_ids" of the sources and "labels" of the targets, each encoded by its tokenizer.

    max_length  tokens of each; the tokenizers say whether an end token belongs to a text

    Raises ValueError for no pairs, or numbers of sources and targets that differ.
    """
    if len(sources) != len(targets) or not sources:
        raise ValueError(f"sequence_pairs: expected as many targets as sources, got {len(targets)} and {len(sources)}")
    ids, long = encode(tokenizer, sources, None, max_length)
    labels, also_long = encode(target_tokenizer, targets, None, max_length)
    return _dataset(ids["input_ids"], labels["input_ids"], tokenizer.pad_token_id, len({*long, *also_long}))


def predicted_windows(windows: Tensor, last: int | None = None, padding: int | None = None) -> TokenizedDataset:
    """Windows (W, L) int64 of tokens, each token of which, or of the last `last`, is to be predicted.

    padding  a token that is never predicted, though the model reads it

    Raises ValueError for windows of another shape or `last` below 1.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"predicted_windows: expected windows (W, L) of 2 tokens, got shape {tuple(windows.shape)}")
    if last is not None and last < 1:
        raise ValueError(f"predicted_windows: expected last to be at least 1, got {last}")
    labels = windows.clone()
    if last is not None:
        labels[:, :-last] = UNLABELLED
    if padding is not None:
        labels[windows == padding] = UNLABELLED
    return _dataset(windows.tolist(), labels.tolist(), 0)


def _dataset(ids: list[list[int]], labels: list[list[int]], padding: int, cut: int = 0) -> TokenizedDataset:
    columns, pad_values = {"input_ids": ids, "labels": labels}, {"input_ids": padding, "labels": UNLABELLED}
    return TokenizedDataset(columns, torch.full((len(ids),), UNLABELLED), pad_values, cut)
