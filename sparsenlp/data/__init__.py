"""Texts: reading, splitting, tokenizing, batching, and a demonstration corpus."""

from .batches import TokenizedDataset, shuffled_batches, sorted_batches, tokenize
from .demo import minilm_directory, rotten_tomatoes
from .text import TextDataset, encode_labels, load_table

__all__ = [
    "TextDataset",
    "TokenizedDataset",
    "encode_labels",
    "load_table",
    "minilm_directory",
    "rotten_tomatoes",
    "shuffled_batches",
    "sorted_batches",
    "tokenize",
]
