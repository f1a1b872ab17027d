"""Texts: reading, splitting, tokenizing, batching, and a demonstration corpus."""

from .batches import TokenizedDataset, shuffled_batches, sorted_batches, tokenize
from .demo import minilm_directory, rotten_tomatoes
from .text import TextDataset, check_split, encode_labels, load_table
from .wordnet import supersense, word_definitions

__all__ = [
    "TextDataset",
    "TokenizedDataset",
    "check_split",
    "encode_labels",
    "load_table",
    "minilm_directory",
    "rotten_tomatoes",
    "shuffled_batches",
    "sorted_batches",
    "supersense",
    "tokenize",
    "word_definitions",
]
