"""Texts: reading, splitting, tokenizing, batching, and a demonstration corpus."""

from .batches import TokenizedDataset, shuffled_batches, sorted_batches, tokenize
from .demo import minilm_directory, rotten_tomatoes
from .news import news_articles, token_windows
from .text import TextDataset, check_split, encode_labels, load_table
from .wordnet import supersense, word_definitions

__all__ = [
    "TextDataset",
    "TokenizedDataset",
    "check_split",
    "encode_labels",
    "load_table",
    "minilm_directory",
    "news_articles",
    "rotten_tomatoes",
    "shuffled_batches",
    "sorted_batches",
    "supersense",
    "token_windows",
    "tokenize",
    "word_definitions",
]
