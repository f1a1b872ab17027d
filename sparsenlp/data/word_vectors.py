"""Word vectors from a text file, as GloVe and word2vec write them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import open_regular

LONGEST = 2**16
"""Numbers that a vector may have: a table of longer ones would fill the memory."""


@dataclass(frozen=True)
class WordVectors:
    """table  (vocabulary, size) float32, a row for every id of the tokenizer
    found  words whose row comes from the file
    words  of the vocabulary, special tokens left out
    """

    table: Tensor
    found: int
    words: int

    @property
    def coverage(self) -> float:
        return self.found / self.words


def load_word_vectors(path: str | Path, tokenizer: Any, size: int | None = None, seed: int = 0) -> WordVectors:
    """Read the vectors of a tokenizer's words from a text file: a word and its numbers on each line (UTF-8).

    A first line of two integers, as word2vec writes it, is skipped. Of a word that comes twice the first
    vector is taken. A word that the file does not have gets a random one of the same spread (Kim 2014,
    arXiv:1408.5882), and padding gets zeros.

    size  numbers that each vector must have; None for as many as the first one has

    Raises OSError for a file that cannot be read, and ValueError for a pipe or device, vectors of another size or of
    more than LONGEST numbers, a malformed line (with its number), or no word of the vocabulary.
    """
    path = Path(path)
    special = set(tokenizer.all_special_ids)
    ids = {word: i for word, i in tokenizer.get_vocab().items() if i not in special}
    vectors: dict[int, Tensor] = {}
    for number, line in _lines(path):
        if size is None:
            size = line.count(" ")
            if not 1 <= size <= LONGEST:
                expected = "a word and numbers" if size < 1 else f"at most {LONGEST:,} numbers"
                raise ValueError(f"{path}, line {number}: expected {expected}, got {line[:40]!r}")
        word, values = _split(line, size, f"{path}, line {number}")
        index = ids.get(word)
        if index is not None and index not in vectors:
            vectors[index] = _parse(values, f"{path}, line {number}")
    if size is None or not vectors:
        raise ValueError(f"word vectors: expected some of the {len(ids)} words of the vocabulary in {path}, got none")
    found = torch.stack([*vectors.values()])
    table = torch.randn(len(tokenizer), size, generator=torch.Generator().manual_seed(seed)) * found.std()
    table[list(vectors)] = found
    table[tokenizer.pad_token_id] = 0
    return WordVectors(table, len(vectors), len(ids))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is neither blank nor a header."""
    try:
        file = open_regular(path, None, encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise type(error)(f"word vectors: cannot read {path}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip()
            header = number == 1 and line.count(" ") == 1 and all(part.isdecimal() for part in line.split(" "))
            if line and not header:
                yield number, line


def _split(line: str, size: int, where: str) -> tuple[str, str]:
    """(word, its numbers); a word may contain spaces, as some of GloVe do, but no numbers."""
    surplus = line.count(" ") - size
    if surplus == 0:
        word, _, values = line.partition(" ")
        return word, values
    first, *rest = line.split(" ")
    if surplus < 0 or any(map(_is_number, rest[:surplus])):
        raise ValueError(f"{where}: expected a word and {size} numbers, got {len(rest)} after {first[:40]!r}")
    return " ".join([first, *rest[:surplus]]), " ".join(rest[surplus:])


def _parse(values: str, where: str) -> Tensor:
    for value in values.split(" "):
        if not _is_number(value):
            raise ValueError(f"{where}: expected finite numbers, got {value[:40]!r}")
    return torch.tensor([float(value) for value in values.split(" ")])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
