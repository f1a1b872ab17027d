import re

import pytest
import torch

from sparsenlp.data import load_word_vectors, word_tokenizer

pytest.importorskip("transformers", reason="the tokenizer is one of transformers")
LINES = ["film 1 2", "the 3 -4e-1", "Film 5 6", "at film 7 8", "film 9 9", "unheard 0 0"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["the film film the fox fox"])


def write(directory, lines):
    path = directory / "vectors.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("header", [[], ["6 2"]], ids=["glove", "word2vec"])
def test_words_get_their_vectors(tmp_path, tokenizer, header):
    vectors = load_word_vectors(write(tmp_path, header + LINES), tokenizer)
    ids = tokenizer.get_vocab()
    assert vectors.table.shape == (len(ids), 2)
    assert vectors.table[ids["film"]].tolist() == [1, 2], "the first of several"
    assert vectors.table[ids["the"]].tolist() == pytest.approx([3, -0.4])
    assert vectors.table[tokenizer.pad_token_id].tolist() == [0, 0]
    assert (vectors.found, vectors.words, vectors.coverage) == (2, 3, 2 / 3)


def test_missing_words_are_drawn_by_seed(tmp_path, tokenizer):
    path, fox = write(tmp_path, LINES), tokenizer.get_vocab()["fox"]
    first, again, other = (load_word_vectors(path, tokenizer, seed=seed).table[fox] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (LINES, 3, "line 1: expected a word and 3 numbers, got 2 after 'film'"),
        (["film 1 2", "the 3"], None, "line 2: expected a word and 2 numbers, got 1 after 'the'"),
        (["3 2", "", "film 1 2", "the 3 4 5"], None, "line 4: expected a word and 2 numbers, got 3 after 'the'"),
        (["film 1 2", "the 3 x"], None, "line 2: expected finite numbers, got 'x'"),
        (["film 1 nan"], None, "line 1: expected finite numbers, got 'nan'"),
        (["film" + " 1" * 70_000], None, "line 1: expected at most 65,536 numbers, got 'film 1 1"),
        (["film"], None, "line 1: expected a word and numbers, got 'film'"),
        (["dog 1 2"], None, "expected some of the 3 words of the vocabulary in .*, got none"),
        ([""], None, "got none"),
    ],
)
def test_what_is_refused(tmp_path, tokenizer, lines, size, message):
    with pytest.raises(ValueError, match=message):
        load_word_vectors(write(tmp_path, lines), tokenizer, size)


def test_a_missing_file(tmp_path, tokenizer):
    path = tmp_path / "none.txt"
    with pytest.raises(FileNotFoundError, match=re.escape(f"cannot read {path}: No such file or directory")):
        load_word_vectors(path, tokenizer)
