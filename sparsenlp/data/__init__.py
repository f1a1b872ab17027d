"""Texts: reading, splitting, tokenizing, batching, word vectors, and corpora that come as packages."""

from .augment import join, splice, without_labels
from .batches import UNLABELLED, TokenizedDataset, shuffled_batches, sorted_batches, tokenize
from .demo import minilm_directory, rotten_tomatoes
from .labels import encode_labels
from .news import news_articles, news_titles, token_windows
from .text import TextDataset, check_split, load_table
from .word_vectors import WordVectors, load_word_vectors
from .wordnet import sibling_definitions, supersense, word_definitions
from .words import word_tokenizer

__all__ = [
    "UNLABELLED",
    "TextDataset",
    "TokenizedDataset",
    "WordVectors",
    "check_split",
    "encode_labels",
    "join",
    "load_table",
    "load_word_vectors",
    "minilm_directory",
    "news_articles",
    "news_titles",
    "rotten_tomatoes",
    "shuffled_batches",
    "sibling_definitions",
    "sorted_batches",
    "splice",
    "supersense",
    "token_windows",
    "tokenize",
    "without_labels",
    "word_definitions",
    "word_tokenizer",
]
