import pytest
import torch

from sparsenlp.data.batches import UNLABELLED
from sparsenlp.data.token_labels import predicted_windows, sequence_pairs
from sparsenlp.data.vocabulary import vocabulary_tokenizer

SPECIAL = {"pad_token": "_", "unk_token": "?", "eos_token": "/"}


@pytest.fixture
def letters():
    return vocabulary_tokenizer({"_": 0, "?": 1, "/": 2, "a": 3, " ": 4, "\n": 5}, SPECIAL, characters=True, end="/")


@pytest.fixture
def words():
    return vocabulary_tokenizer({"_": 0, "?": 1, "/": 2, "a": 3, "ab": 4}, SPECIAL, begin="?", end="/")


def test_a_vocabulary_of_characters(letters):
    assert letters("a \nb").input_ids == [3, 4, 5, 1, 2]
    assert letters.decode([3, 4, 3, 2], skip_special_tokens=True) == "a a"


def test_a_vocabulary_of_words(words, tmp_path):
    assert words("ab  a b").input_ids == [1, 4, 3, 1, 2]
    assert words.decode([4, 3]) == "ab a"
    words.save_pretrained(tmp_path)
    assert type(words).from_pretrained(tmp_path)("ab").input_ids == [1, 4, 2]


def test_pairs_are_padded_apart(letters, words):
    data = sequence_pairs(["aa", "a"], ["a", "a ab"], letters, words)
    batch = data.batch([0, 1])
    assert batch["input_ids"].tolist() == [[3, 3, 2], [3, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 3, 2, UNLABELLED], [1, 3, 4, 2]]


def test_pairs_of_which_either_is_cut_are_counted(letters, words):
    data = sequence_pairs(["aaa", "a", "a"], ["a", "a ab a", "a"], letters, words, max_length=3)
    assert data.cut == 2
    assert data.columns["input_ids"] == [[3, 3, 2], [3, 2], [3, 2]]
    assert [len(row) for row in data.columns["labels"]] == [3, 3, 3]


def test_windows_say_which_tokens_are_predicted():
    windows = torch.arange(6).view(2, 3)
    assert torch.equal(predicted_windows(windows).batch([0, 1])["labels"], windows)
    assert predicted_windows(windows, last=1).columns["labels"] == [[-100, -100, 2], [-100, -100, 5]]
    assert predicted_windows(windows, padding=2).columns["labels"] == [[0, 1, -100], [3, 4, 5]]


def test_errors(letters, words):
    with pytest.raises(ValueError, match="expected as many targets as sources, got 1 and 2"):
        sequence_pairs(["a", "a"], ["a"], letters, words)
    with pytest.raises(ValueError, match=r"expected windows \(W, L\) of 2 tokens, got shape \(3,\)"):
        predicted_windows(torch.arange(3))
    with pytest.raises(ValueError, match="expected last to be at least 1, got 0"):
        predicted_windows(torch.zeros(1, 2, dtype=torch.long), last=0)
    with pytest.raises(ValueError, match="expected / in the vocabulary, got 2 others"):
        vocabulary_tokenizer({"_": 0, "?": 1}, SPECIAL)
    with pytest.raises(ValueError, match="expected an unk_token among the special tokens"):
        vocabulary_tokenizer({"_": 0}, {"pad_token": "_"})
