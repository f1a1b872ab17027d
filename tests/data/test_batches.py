import random

import pytest
import torch

from sparsenlp.data import TextDataset, TokenizedDataset, shuffled_batches, sorted_batches, tokenize


class LetterTokenizer:
    """One token per letter, in the shape of a transformers tokenizer."""

    pad_token_id = 99

    def __call__(self, texts, pairs, truncation, max_length=None, verbose=True):
        pairs = pairs or [""] * len(texts)
        joined = [(a + b)[: max_length if truncation else None] for a, b in zip(texts, pairs, strict=True)]
        return {
            "input_ids": [[ord(c) - 96 for c in text] for text in joined],
            "token_type_ids": [[int(i >= len(a)) for i in range(len(t))] for a, t in zip(texts, joined, strict=True)],
            "attention_mask": [[1] * len(text) for text in joined],
        }


def test_batches_are_padded_to_their_longest():
    data = tokenize(TextDataset(["abc", "a", "abcdefgh"], [0, 1, 0], ["x", "y"]), LetterTokenizer())
    batch = data.batch([1, 0])
    assert batch["input_ids"].tolist() == [[1, 99, 99], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert data.labels.tolist() == [0, 1, 0]
    assert data.lengths == [3, 1, 8]


def test_pairs_and_truncation():
    data = tokenize(TextDataset(["ab"], [0], ["x"], text_pairs=["cdef"]), LetterTokenizer(), max_length=4)
    batch = data.batch([0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1]]


def test_texts_that_are_cut_are_counted():
    texts = TextDataset(["abcd", "ab", "abcdef"], [0, 0, 0], ["x"])
    data = tokenize(texts, LetterTokenizer(), max_length=3)
    assert (data.cut, data.lengths) == (2, [3, 2, 3])
    assert (tokenize(texts, LetterTokenizer(), 6).cut, tokenize(texts, LetterTokenizer(), 4).cut) == (0, 1)


def test_tokenize_refuses_what_cannot_be_batched():
    with pytest.raises(ValueError, match="expected at least one text"):
        tokenize(TextDataset([], [], ["x"]), LetterTokenizer())
    tokenizer = LetterTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(ValueError, match="expected a tokenizer with a padding token"):
        tokenize(TextDataset(["a"], [0], ["x"]), tokenizer)


LENGTHS = [random.Random(0).randint(1, 60) for _ in range(1000)]


@pytest.mark.parametrize("batches", [shuffled_batches(LENGTHS, 16, seed=0, epoch=0), sorted_batches(LENGTHS, 16)])
def test_every_example_once_and_little_padding(batches):
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert [len(batch) for batch in batches].count(16) >= 61
    padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)


def test_order_depends_on_seed_and_epoch_only():
    first = shuffled_batches(LENGTHS, 16, seed=0, epoch=0)
    random.seed(7)
    assert shuffled_batches(LENGTHS, 16, seed=0, epoch=0) == first
    assert shuffled_batches(LENGTHS, 16, seed=0, epoch=1) != first
    assert shuffled_batches(LENGTHS, 16, seed=1, epoch=0) != first


def test_sorted_batches_go_from_short_to_long():
    ordered = [LENGTHS[i] for batch in sorted_batches(LENGTHS, 16) for i in batch]
    assert ordered == sorted(ordered)


def test_fingerprint_sees_tokens_and_labels():
    def make(ids, label):
        return TokenizedDataset({"input_ids": [ids]}, torch.tensor([label]), {"input_ids": 0}).fingerprint()

    assert make([1, 2], 0) == make([1, 2], 0)
    assert len({make([1, 2], 0), make([1, 3], 0), make([1, 2], 1)}) == 3
