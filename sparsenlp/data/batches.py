"""Tokenized texts, and batches of similar length that depend only on (seed, epoch)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .text import TextDataset

UNLABELLED = -100
"""Label of a text that has none, as torch's cross-entropy ignores it."""

BUCKET_BATCHES = 32
"""Batches are cut from buckets of this many batches, sorted by length."""


@dataclass(frozen=True)
class TokenizedDataset:
    """Token ids without padding.

    columns    tokenizer output by name ("input_ids", "token_type_ids", ...): one list of ints per text
    labels     (examples,) int64, UNLABELLED for a text without one
    pad_values what each column is padded with
    cut        texts that were too long, of which the end is missing
    """

    columns: dict[str, list[list[int]]]
    labels: Tensor
    pad_values: dict[str, int]
    cut: int = 0

    def __len__(self) -> int:
        return self.labels.numel()

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.columns["input_ids"]]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The columns, each (len(indices), its longest) int64, padded on the right, and the "attention_mask" of
        "input_ids"."""
        inputs = {
            name: _padded([rows[i] for i in indices], self.pad_values[name]) for name, rows in self.columns.items()
        }
        lengths = torch.tensor([len(self.columns["input_ids"][i]) for i in indices])
        inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
        return inputs

    def fingerprint(self) -> str:
        """A digest of every token and label; equal data gives an equal one."""
        digest = hashlib.sha256(repr(self.labels.tolist()).encode())
        for name in sorted(self.columns):
            digest.update(f"{name}{self.columns[name]}".encode())
        return digest.hexdigest()


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def tokenize(data: TextDataset, tokenizer: Any, max_length: int = 512) -> TokenizedDataset:
    """Encode texts (or pairs) with a transformers tokenizer, truncated to `max_length` tokens.

    Raises ValueError for no texts, or a tokenizer without a padding token.
    """
    if not len(data):
        raise ValueError("tokenize: expected at least one text, got none")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "tokenize: expected a tokenizer with a padding token, got none; give it one, as in "
            "tokenizer.pad_token = tokenizer.eos_token, and save it again"
        )
    columns, cut = encode(tokenizer, data.texts, data.text_pairs, max_length)
    pad_values = dict.fromkeys(columns, 0) | {"input_ids": tokenizer.pad_token_id}
    return TokenizedDataset(columns, torch.tensor(data.labels), pad_values, len(cut))


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """(columns of a transformers tokenizer without the attention mask, rows that were cut to `max_length` tokens)."""
    encoded = tokenizer([*texts], pairs and [*pairs], truncation=False, verbose=False)
    columns = {name: encoded[name] for name in encoded if name != "attention_mask"}
    long = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
    if long:
        seconds = pairs and [pairs[row] for row in long]
        shorter = tokenizer([texts[row] for row in long], seconds, truncation=True, max_length=max_length)
        for name, rows in columns.items():
            for row, values in zip(long, shorter[name], strict=True):
                rows[row] = values
    return columns, long


def shuffled_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every index once, in batches of similar length; which ones depends only on (seed, epoch).

    The order is shuffled, cut into buckets, each bucket sorted by length and cut into batches, and
    the batches shuffled.
    """
    rng = random.Random(f"{seed},{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    bucket = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), bucket):
        by_length = sorted(order[start : start + bucket], key=lambda i: lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    rng.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every index once, shortest texts first: the least padding, for evaluation."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
