import json
from collections import Counter

import pytest

from sparsenlp.data import TextDataset, encode_labels, load_table


def write(path, text, **options):
    path.write_text(text, encoding="utf-8", **options)
    return path


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_tables_with_a_header(tmp_path, suffix, separator):
    rows = [("text", "label"), ('"a, ""quoted""\nline"', "pos"), ("naïve", "neg"), ("third", "pos")]
    path = write(tmp_path / f"data{suffix}", "\ufeff" + "".join(separator.join(row) + "\n" for row in rows))
    data = load_table(path)
    assert data.texts == ['a, "quoted"\nline', "naïve", "third"]
    assert data.label_names == ["neg", "pos"]
    assert data.labels == [1, 0, 1]
    assert data.text_pairs is None


def test_json_lines_pairs_and_other_columns(tmp_path):
    rows = [{"a": "one", "b": "uno", "y": 10}, {"a": "two", "b": "tres", "y": 9}]
    path = write(tmp_path / "data.jsonl", "\n\n".join(map(json.dumps, rows)))
    data = load_table(path, text_column="a", label_column="y", text_pair_column="b")
    assert data.text_pairs == ["uno", "tres"]
    assert data.label_names == ["9", "10"], "numbers sort as numbers"
    assert data.labels == [1, 0]


def test_labels_of_a_trained_model(tmp_path):
    path = write(tmp_path / "data.csv", "text,label\nx,neg\n")
    assert load_table(path, label_names=["pos", "neu", "neg"]).labels == [2]
    with pytest.raises(ValueError, match='expected one of pos, neu, got "neg" in row 1'):
        load_table(path, label_names=["pos", "neu"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "text,label\na,1\n,0\n", 'expected a nonempty "text" in .*d.csv, line 3, got none'),
        ("d.csv", "text,label\na,1\nb\n", 'expected a nonempty "label" in .*, line 3'),
        ("d.csv", "text,label\na,b,c\n", "expected 2 columns in .*, line 2, got 3"),
        ("d.csv", 'text,label\n"a,1\n', "malformed row in"),
        ("d.csv", "text,label\n", "expected rows in .*, got none"),
        ("d.csv", "", "expected rows in .*, got none"),
        ("d.tsv", "sentence\tlabel\na\t1\n", 'expected a column "text" in .*, got sentence, label'),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "malformed JSON in .*, line 2"),
        ("d.jsonl", "[1]\n", "expected a JSON object in .*, line 1, got list"),
        ("d.xlsx", "x", "expected a .csv, .tsv or .jsonl file, got"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_table(write(tmp_path / name, text))


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes("text,label\nnaïve,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected UTF-8 text in .*, got byte 0xef"):
        load_table(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_table: cannot read .*none.csv: No such file"):
        load_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(IsADirectoryError, match="load_table: cannot read"):
        load_table(tmp_path / "folder.csv")


def test_encode_labels_names_the_row():
    assert encode_labels(["b", "a", "b"], ["a", "b"]) == [1, 0, 1]
    with pytest.raises(ValueError, match='labels: expected one of a, b, got "c" in row 2'):
        encode_labels(["a", "c"], ["a", "b"])


def numbered(count=100, classes=4):
    return TextDataset([f"t{i}" for i in range(count)], [i % classes for i in range(count)], list("abcd"))


def test_split_is_stratified_complete_and_seeded():
    data = numbered()
    train, test = data.split(0.2, seed=3)
    assert Counter(test.labels) == dict.fromkeys(range(4), 5)
    assert sorted(train.texts + test.texts) == sorted(data.texts)
    assert data.split(0.2, seed=3) == (train, test)
    assert data.split(0.2, seed=4)[1] != test
    assert all(int(text[1:]) % 4 == label for text, label in zip(train.texts, train.labels, strict=True))


def test_sample_is_a_seeded_subset():
    data = numbered()
    assert len(data.sample(10)) == 10
    assert set(data.sample(10).texts) < set(data.texts)
    assert data.sample(10, seed=1) == data.sample(10, seed=1) != data.sample(10, seed=2)
    assert data.sample(1000) is data


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_split_refuses_fractions_outside(fraction):
    with pytest.raises(ValueError, match=r"test_fraction in \(0, 1\)"):
        numbered().split(fraction)


def test_split_refuses_an_empty_side():
    with pytest.raises(ValueError, match="expected rows on both sides"):
        numbered(4).split(0.2)


def test_columns_must_have_one_length():
    with pytest.raises(ValueError, match="expected 2 labels, got 1"):
        TextDataset(["a", "b"], [0], ["x"])
    with pytest.raises(ValueError, match="expected 1 text_pairs, got 0"):
        TextDataset(["a"], [0], ["x"], [])


def test_a_split_that_leaves_a_class_untrained_is_refused():
    data = TextDataset(["a", "b", "c", "d"], [0, 0, 0, 1], ["many", "one"])
    with pytest.raises(ValueError, match="labels: expected training texts of every class, got none of one"):
        data.split(0.6)
