import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsenlp.data import UNLABELLED, TokenizedDataset, join, splice, without_labels

FIRST, LAST = 101, 102


def dataset(*texts, pad=0):
    columns = {"input_ids": [list(t) for t in texts], "token_type_ids": [[i % 2] * len(t) for i, t in enumerate(texts)]}
    return TokenizedDataset(columns, torch.arange(len(texts)), {"input_ids": pad, "token_type_ids": 0})


def test_joined_texts_follow_each_other_with_their_labels():
    one, two = dataset([1, 2], [3]), without_labels(dataset([4, 5, 6]))
    both = join([one, two])
    assert both.columns["input_ids"] == [[1, 2], [3], [4, 5, 6]]
    assert both.columns["token_type_ids"] == [[0, 0], [1], [0, 0, 0]]
    assert both.labels.tolist() == [0, 1, UNLABELLED]
    assert two.labels.tolist() == [UNLABELLED]
    assert both.batch([0, 2])["input_ids"].tolist() == [[1, 2, 0], [4, 5, 6]]


def test_join_refuses_nothing_and_other_tokenizers():
    with pytest.raises(ValueError, match="join: expected at least one data set"):
        join([])
    with pytest.raises(ValueError, match="join: expected columns and padding"):
        join([dataset([1]), dataset([1], pad=7)])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), count=st.integers(0, 20), seed=st.integers(0, 2**32)
)
def test_spliced_texts_are_a_beginning_and_an_end(lengths, count, seed):
    texts = [[FIRST, *range(10 * i, 10 * i + length), LAST] for i, length in enumerate(lengths)]
    made = splice(dataset(*texts), count, seed)
    assert made.labels.tolist() == [UNLABELLED] * count
    for ids, types in zip(made.columns["input_ids"], made.columns["token_type_ids"], strict=True):
        assert (ids[0], ids[-1]) == (FIRST, LAST)
        assert len(ids) == len(types) <= max(map(len, texts))
        assert any(
            ids[:cut] == a[:cut] and ids[cut:] == b[len(b) - len(ids) + cut :]
            for a in texts
            for b in texts
            for cut in range(1, len(ids))
        )


def test_spliced_texts_are_drawn_by_the_seed_alone():
    data = dataset(*([FIRST, *range(10 * i, 10 * i + 8), LAST] for i in range(20)))
    first, again, other = (splice(data, 50, seed).columns["input_ids"] for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(ids) for ids in first}) > 40
    assert len({len(ids) for ids in first}) > 3


def test_texts_of_one_token_and_bad_counts():
    assert all(len(ids) <= 2 for ids in splice(dataset([5], [6]), 10).columns["input_ids"])
    with pytest.raises(ValueError, match="splice: expected a count of at least 0, got -1"):
        splice(dataset([1, 2]), -1)
