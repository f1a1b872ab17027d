import random
import warnings

import pytest

from sparsenlp.data import TextDataset, encode_labels, load_table
from sparsenlp.data.labels import check_classes, class_names, is_generic, match_labels

UNNAMED = [f"LABEL_{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10.0", "2.0", "0.0"], ["0.0", "2.0", "10.0"]),
        (["10e0", "2e0", "1e1", "1E+02"], None),
        (["+1", "-1", "0"], ["-1", "0", "+1"]),
        (["10", "9", "-10"], ["-10", "9", "10"]),
        (["True", "False"], ["False", "True"]),
        (["--1", "2", "10"], ["--1", "10", "2"]),
        (["１", "２", "10"], ["10", "１", "２"]),
        (["1", "10", "2", "unknown"], ["1", "10", "2", "unknown"]),
        (["1" + "0" * 40, "1" + "0" * 39 + "1"], ["1" + "0" * 40, "1" + "0" * 39 + "1"]),
        (["1e999", "3"], ["3", "1e999"]),
        (["[news]", "sport"], ["[news]", "sport"]),
    ],
)
def test_numbers_sort_as_numbers(labels, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if names is None else "error")
        assert class_names(labels) == (names or ["2e0", "1e1", "1E+02"])


def test_spellings_of_one_number_are_one_class():
    with pytest.warns(UserWarning, match='"01" and "1" are one number, so they are one class'):
        assert class_names(["01", "1", "2.0"]) == ["1", "2.0"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1", "NaN"], 'expected a class in every row, got "NaN"'),
        (["['a', 'b']", "['a']"], r"expected one class per row, got \['a', 'b'\]; several labels"),
        (["[1, 2]", "[1]"], "several labels are not served"),
        (
            [f"{i / 10}" for i in range(51)],
            "expected classes, got 51 different numbers such as 0.1, as of a regression",
        ),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        check_classes(class_names(labels))


def test_a_few_fractions_may_be_classes():
    check_classes(["0.5", "1.0", "1.5"])
    check_classes([str(i) for i in range(1000)])


@pytest.mark.parametrize(
    ("labels", "names", "places"),
    [
        (["1.0", "0", "1e1"], [str(i) for i in range(12)], [1, 0, 10]),
        (["3.0", "7", "+11"], UNNAMED, [3, 7, 11]),
        (["12", "-1", "0.5"], UNNAMED, [None] * 3),
        (["true", "False"], ["0", "1"], [1, 0]),
        (["1", "0"], ["False", "True"], [1, 0]),
        (["LABEL_3", "label_4"], UNNAMED, [3, 4]),
        (["positive", "Negative"], ["NEGATIVE", "POSITIVE"], [1, 0]),
        (["pos"], ["POS", "Pos"], [None]),
        (["POS"], ["Pos", "POS"], [1]),
        (["1"], ["01", "1.0"], [None]),
        (["1"], ["01", "1"], [1]),
        (["a", "b"], ["a", "b", "a"], [None, 1]),
        (["0", "1"], ["NEGATIVE", "POSITIVE"], [None, None]),
    ],
)
def test_labels_are_found_among_names(labels, names, places):
    assert match_labels(labels, names).places == places


def test_what_is_assumed_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode_labels(["2", "0.0", "b"], ["0", "b", "2"]) == [2, 0, 1]
    with pytest.warns(UserWarning, match="without regard to case: positive is POSITIVE"):
        assert encode_labels(["positive", "NEGATIVE"], ["NEGATIVE", "POSITIVE"]) == [1, 0]
    with pytest.warns(UserWarning, match="taken for those of its outputs; the data has 2 of the 12 classes"):
        assert encode_labels(["3", "11"], UNNAMED) == [3, 11]


def test_generic_names():
    assert is_generic(UNNAMED)
    assert not is_generic(["LABEL_1", "LABEL_0"])
    assert not is_generic(["a"])


def test_every_spelling_of_a_table_gives_the_same_labels(tmp_path):
    """Integers, as pandas writes them beside a missing value, in JSON, and signed: all mean the same classes."""
    numbers = [*random.Random(0).choices(range(12), k=60), *range(12)]
    found = []
    for name, rows in {
        "int.csv": [f"a,{n}" for n in numbers],
        "float.csv": [f"a,{n}.0" for n in numbers],
        "sign.csv": [f"a,+{n:02}" for n in numbers],
        "int.jsonl": [f'{{"text": "a", "label": {n}}}' for n in numbers],
        "float.jsonl": [f'{{"text": "a", "label": {n}.0}}' for n in numbers],
        "power.jsonl": [f'{{"text": "a", "label": {n * 10}e-1}}' for n in numbers],
    }.items():
        path = tmp_path / name
        path.write_text("\n".join((["text,label"] if name.endswith("csv") else []) + rows))
        found.append(load_table(path).with_classes(UNNAMED).labels)
    assert found == [numbers] * 6


def test_with_classes_refuses_another_class():
    data = TextDataset(["a", "b"], [0, 1], ["x", "y"])
    assert data.with_classes(["y", "z", "X"]).labels == [2, 0]
    with pytest.raises(ValueError, match="labels: expected one of x, z, got y"):
        data.with_classes(["x", "z"])
