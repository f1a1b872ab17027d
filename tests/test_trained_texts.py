import json
import os

import numpy as np
import pytest

from sparsenlp import trained_texts
from sparsenlp.layer_entries import CheckpointError
from sparsenlp.trained_texts import TEXTS_FILE, Split, TrainedTexts, hashes_of, read_trained_texts, with_texts

TEXTS = [f"text number {i}" for i in range(200)]


def split(train, test, given=False):
    return Split(hashes_of(train), hashes_of(test), given, {"seed": 0})


def trained(texts):
    return TrainedTexts.of(hashes_of(texts), runs=[{"train": "a.csv", "seed": 1}])


def saved(directory, texts):
    with_texts(None, texts).save_pretrained(directory)
    return directory / TEXTS_FILE


def test_what_models_of_words_do_not_see_makes_no_other_text():
    first, *others = hashes_of(["Straße  is\nwet", " strasse is wet ", "\uff33trasse is WET"])
    assert all(other == first for other in others)
    assert hashes_of(["a b"])[0] != hashes_of(["ab"])[0]
    assert len(hashes_of([])) == 0


def test_pairs_are_texts_of_their_own():
    a, b, c = (hashes_of([one], [two])[0] for one, two in (("a b", "c"), ("a", "b c"), ("c", "a b")))
    assert len({a, b, c, hashes_of(["a b c"])[0]}) == 4
    assert hashes_of(["A  b"], ["C"])[0] == a


def test_the_round_trip(tmp_path):
    texts = trained(TEXTS)
    saved(tmp_path, texts)
    again = read_trained_texts(tmp_path)
    assert np.array_equal(again.hashes, texts.hashes)
    assert (again.bound, again.runs) == (texts.bound, texts.runs)
    assert read_trained_texts(tmp_path / "none") is None
    assert (tmp_path / TEXTS_FILE).stat().st_size < 12 * len(TEXTS) + 500


def test_joined_texts_are_those_of_both(tmp_path):
    both = trained(TEXTS[:100]).joined(trained(TEXTS[50:150])).joined(None)
    assert both.known(hashes_of(TEXTS)).tolist() == [True] * 150 + [False] * 50
    assert len(both.runs) == 1, "the same run is told once"


def test_of_very_many_texts_a_sample_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(trained_texts, "MOST", 20)
    part = trained(TEXTS[:100])
    saved(tmp_path, part)
    part = read_trained_texts(tmp_path)
    assert len(part.hashes) == 20
    assert part.share(hashes_of(TEXTS[:100])) == 1.0
    assert part.share(hashes_of(TEXTS[100:])) == 0.0
    assert part.share(hashes_of(TEXTS)) == pytest.approx(0.5, abs=0.2)
    both = part.joined(trained(TEXTS[100:]))
    assert len(both.hashes) == 20
    assert both.share(hashes_of(TEXTS)) == 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data | {"format_version": 2},
        lambda data: data | {"bound": -1},
        lambda data: data | {"bound": "9"},
        lambda data: data | {"hashes": data["hashes"][4:]},
        lambda data: data | {"runs": [1]},
        lambda data: data | {"more": 1},
        lambda data: [],
        lambda data: {"format_version": 1},
    ],
)
@pytest.mark.parametrize("honest", [True, False], ids=["checksum kept", "checksum made again"])
def test_a_broken_file_is_named(tmp_path, change, honest):
    path = saved(tmp_path, trained(TEXTS))
    data = change(json.loads(path.read_text()))
    if not honest and isinstance(data, dict):
        data.pop("crc32", None)
        data["crc32"] = trained_texts._checksum(data)
    path.write_text(json.dumps(data))
    if not honest and isinstance(data, dict) and data.keys() >= {"hashes"} and data["bound"] == 2**64 - 1:
        data["hashes"] = "AAAA"
        path.write_text(json.dumps({"crc32": 0} | {k: v for k, v in data.items() if k != "crc32"}))
    with pytest.raises(CheckpointError, match=rf"{TEXTS_FILE}: expected what the model was trained on, got "):
        read_trained_texts(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format_version": 1e999}'])
def test_a_file_of_anything_else_is_named(tmp_path, content):
    (tmp_path / TEXTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=TEXTS_FILE):
        read_trained_texts(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / TEXTS_FILE)
    with pytest.raises(CheckpointError, match="a pipe"):
        read_trained_texts(tmp_path)


def test_the_same_split_again_is_no_leak_though_it_has_duplicates():
    first = split(TEXTS[:150] + TEXTS[180:185], TEXTS[150:])
    assert first.remarks(None) == [
        "warning: 5 of the 50 test texts are among the training texts, too; as such duplicates are known by heart, "
        "they make the figures better than they are"
    ]
    again = split(TEXTS[:150] + TEXTS[180:185], TEXTS[150:])
    assert again.withheld(first.trained) == ""
    assert len(again.remarks(first.trained)) == 1
    assert first.trained.share(first.test) == 0


def test_another_split_is_a_leak():
    first = split(TEXTS[20:], TEXTS[:20])
    other = split(TEXTS[:180], TEXTS[180:])
    assert other.withheld(first.trained) == "20 of 20 test texts were trained on"
    assert other.remarks(trained(TEXTS[20:]))[0].endswith("trained on before: the model comes from train a.csv, seed 1")
    both = first.trained.joined(other.trained)
    assert both.known(hashes_of(TEXTS)).all(), "the test texts of the first run are training texts of the second"


def test_a_few_texts_are_taken_for_duplicates():
    other = split(TEXTS[:99], TEXTS[99:199])
    assert other.withheld(trained(TEXTS[99:100])) == ""
    assert "1 of the 100 test texts were trained on before" in other.remarks(trained(TEXTS[99:100]))[0]
    assert other.withheld(trained(TEXTS[98:101])) == "2 of 100 test texts were trained on"


def test_given_test_texts_that_are_the_training_texts():
    whole = split(TEXTS, TEXTS, given=True)
    assert whole.withheld(None) == "200 of 200 test texts are training texts"
    assert whole.trained.known(hashes_of(TEXTS)).all()
    assert split(TEXTS, TEXTS).withheld(None) == "", "rows that were held out are only told of"
