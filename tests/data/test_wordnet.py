from collections import Counter

import pytest

from sparsenlp.data import sibling_definitions, supersense, word_definitions
from sparsenlp.data import wordnet as wordnet_module
from sparsenlp.data.wordnet import DATA_NOUN, SUPERSENSES, Synset, read_synsets

LICENCE = "  1 This software and database is being provided to you, the LICENSEE  \n"


def line(offset, words, hypernym, gloss, file="05", kind="@"):
    listed = " ".join(f"{word} 0" for word in words)
    pointers = f"002 ~ 00000009 n 0000 {kind} {hypernym:08} n 0000"
    return f"{offset:08} {file} n {len(words):02x} {listed} {pointers} | {gloss}  \n"


def write(path, lines):
    path.write_text(LICENCE + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def nouns(tmp_path):
    """40 hypernyms of 3 animals each, and 40 plants with a hypernym of their own."""
    lines = [line(i, [f"animal_{i}"], 1000 + i // 3, f"the animal of number {i}") for i in range(120)]
    lines += [line(500 + i, [f"plant_{i}"], 2000 + i, f"the plant of number {i}", "20") for i in range(40)]
    return write(tmp_path / "data.noun", lines)


def test_a_line_is_read(tmp_path):
    words = ["barn_spider", "Araneus_cavaticus"]
    lines = [
        line(1, words, 7, 'a spider; spins daily; "the barn spider was made famous"; "another"'),
        line(2, ["entity"], 7, "what is", file="03"),
        line(3, ["Lassie"], 8, "a dog", kind="@i"),
    ]
    assert read_synsets(write(tmp_path / "data.noun", lines)) == [
        Synset(("barn spider", "Araneus cavaticus"), "a spider; spins daily", "animal", "00000007"),
        Synset(("Lassie",), "a dog", "animal", "00000008"),
    ]


def test_supersense_keeps_each_hypernym_on_one_side(nouns):
    train, test = supersense(path=nouns)
    assert (len(train), len(test)) == (128, 32)
    assert train.label_names == test.label_names == list(SUPERSENSES.values())
    for side in (train, test):
        for text, label in zip(side.texts, side.labels, strict=True):
            assert side.label_names[label] in text
    groups = [{int(text.split()[-1]) // 3 for text in side.texts if "animal" in text} for side in (train, test)]
    assert groups[0]
    assert groups[1]
    assert not groups[0] & groups[1]


@pytest.mark.parametrize("task", [supersense, word_definitions, sibling_definitions])
def test_the_seed_decides(nouns, task):
    assert task(path=nouns) == task(path=nouns) != task(path=nouns, seed=1)
    train, test = task(path=nouns, count=40)
    assert (len(train), len(test)) == (40, 10)
    assert set(train.texts) <= set(task(path=nouns)[0].texts)
    assert task(path=nouns, count=40) == (train, test)


def test_neither_word_nor_definition_gives_the_answer_away(nouns):
    train, test = word_definitions(path=nouns)
    assert (len(train), len(test)) == (256, 64)
    assert train.label_names == ["no match", "match"]
    for column in (train.texts, train.text_pairs):
        assert Counter(zip(column, train.labels, strict=True)).most_common(1)[0][1] == 1
    assert not set(train.texts) & set(test.texts)
    assert not set(train.text_pairs) & set(test.text_pairs)


def test_a_wrong_definition_is_that_of_a_sibling_or_of_the_same_supersense(nouns):
    for side in word_definitions(path=nouns):
        for word, definition, label in zip(side.texts, side.text_pairs, side.labels, strict=True):
            (kind, number), other = word.split(), int(definition.split()[-1])
            assert f"the {kind} of" in definition
            assert (int(number) == other) == bool(label)
            assert kind == "plant" or int(number) // 3 == other // 3


def test_siblings_share_a_hypernym_and_each_definition_has_either_label(nouns):
    for side in sibling_definitions(path=nouns):
        assert side.label_names == ["unrelated", "siblings"]
        assert sum(side.labels) * 2 == len(side)
        for column in (side.texts, side.text_pairs):
            assert Counter(zip(column, side.labels, strict=True)).most_common(1)[0][1] == 1
        for first, second, label in zip(side.texts, side.text_pairs, side.labels, strict=True):
            assert first != second
            families = [int(text.split()[-1]) // 3 for text in (first, second)]
            assert (families[0] == families[1]) == bool(label)


def test_a_definition_that_may_fit_too_is_no_negative(tmp_path):
    lines = [line(i, [f"w{i}", "shared"], 1, f"the sense of number {i}") for i in range(5)]
    lines += [line(10 + i, [f"x{i}"], 2, "one and the same") for i in range(5)]
    lines += [line(20 + i, [f"y{i}"], i // 2 + 3, f"the other of number {i}") for i in range(10)]
    sides = word_definitions(path=write(tmp_path / "data.noun", lines), test_fraction=0.4)
    words = {word for side in sides for word in side.texts}
    assert words == {f"y{i}" for i in range(10)}


def test_an_absent_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"expected data.noun, got none at {tmp_path}/x; apt-get install"):
        supersense(path=tmp_path / "x")
    monkeypatch.setattr(wordnet_module, "DATA_NOUN", tmp_path / "y")
    with pytest.raises(FileNotFoundError, match=f"got none at {tmp_path}/y"):
        word_definitions()


@pytest.mark.parametrize(
    "text", ["no gloss", "1 05 n 01 cat 0 009 @ 2 n 0000 | cut", "1 05 v 01 cat 0 000 | a verb", "1 | x"]
)
def test_another_file_is_refused(tmp_path, text):
    path = write(tmp_path / "data.noun", [line(1, ["cat"], 2, "an animal"), text + "\n"])
    with pytest.raises(ValueError, match=r"wordnet: expected a synset of data.noun in .*, line 3, got"):
        supersense(path=path)


def test_a_class_without_a_training_text_is_refused(nouns):
    with pytest.raises(ValueError, match=r"expected training texts of every class, got none of (animal|plant)$"):
        supersense(path=nouns, count=1)


def test_a_fraction_out_of_range_is_refused(nouns):
    with pytest.raises(ValueError, match=r"wordnet: expected a test_fraction in \(0, 1\), got 1"):
        supersense(1.0, path=nouns)


@pytest.mark.skipif(not DATA_NOUN.is_file(), reason="the Debian package wordnet-base is not installed")
def test_wordnet_itself():
    train, test = supersense()
    assert (len(train), len(test)) == (65618, 16404)
    assert set(train.labels) == set(test.labels) == set(range(24))
    train, test = word_definitions(count=5000)
    assert (len(train), len(test)) == (5000, 1250)
