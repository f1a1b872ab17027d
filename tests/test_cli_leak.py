"""From training to pruning to evaluation: no text that was trained on is taken for a test text."""

import csv
import json
import shlex

import pytest
from test_cli import failure, settings, succeed  # noqa: F401  # the fixture is used by all tests here

from sparsenlp.trained_texts import TEXTS_FILE, hashes_of, read_trained_texts

pytest.importorskip("transformers", reason="the models are models of transformers")
TINY = ("--model", "textcnn", "--option", "embedding_size=16", "--option", "filters=16", "--epochs", "1")
ROWS = [(f"{'good fine' if i % 2 else 'bad poor'} word{i // 2 % 50} film {i}", "ab"[i % 2]) for i in range(200)]


def write(path, rows, header=("my text", "kind")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A table, and a model trained on nine tenths of it; names with spaces need quotes in a shell."""
    directory = tmp_path_factory.mktemp("a leak")
    data = write(directory / "all rows.csv", ROWS)
    columns = ("--text-column", "my text", "--label-column", "kind")
    arguments = ("--data", data, *columns, "--seed", "1", "--max-length", "64")
    result = succeed("train", directory / "model", *TINY, *arguments)
    (directory / "said").write_text(result.stdout)
    return directory


def quality(directory):
    record = json.loads((directory / "sparsenlp.json").read_text())
    return record["quality"], record.get("quality_withheld")


def test_the_command_that_train_proposes_tests_on_the_same_rows(files):
    (line,) = (line for line in (files / "said").read_text().splitlines() if line.startswith("next: "))
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "sparsenlp"
    result = succeed(*arguments, "--epochs", "1")
    sparse = files / "model-sparse"
    assert "trained on" not in result.stdout + result.stderr
    assert {name: q["examples"] for name, q in quality(sparse)[0].items()} == {"dense": 20, "sparse": 20}
    first, second = (read_trained_texts(files / name) for name in ("model", "model-sparse"))
    assert first.hashes.tolist() == second.hashes.tolist()
    assert len(first.runs) == 1


def test_another_split_tests_on_training_rows_and_reports_nothing(files):
    data = ("--data", files / "all rows.csv", "--text-column", "my text", "--label-column", "kind")
    result = succeed("prune", files / "model", files / "leak", *data, "--epochs", "1")
    assert quality(files / "leak") == (None, "18 of 20 test texts were trained on")
    assert "accuracy: not reported: 18 of 20 test texts were trained on" in result.stdout
    assert "%  " not in result.stdout
    assert "train all rows.csv" in result.stderr
    assert "seed 1" in result.stderr
    known = read_trained_texts(files / "leak")
    assert known.known(hashes_of([text for text, _ in ROWS])).sum() == 198, "of both runs"
    assert [run["seed"] for run in known.runs] == [1, 0]


def test_what_is_pruned_at_once_remembers_too(files):
    succeed("prune", files / "model", files / "at once", "--sparsity", "0.5")
    assert (files / "at once" / TEXTS_FILE).read_bytes() == (files / "model" / TEXTS_FILE).read_bytes()


def test_eval_refuses_training_texts(files):
    known = read_trained_texts(files / "model")
    new = [row for row in ROWS if not known.known(hashes_of([row[0]]))[0]]
    assert len(new) == 20
    old = [row for row in ROWS if row not in new]
    test, most, few = (
        write(files / name, rows)
        for name, rows in (("t.csv", new), ("m.csv", new[:5] + old), ("f.csv", new * 6 + old[:1]))
    )
    columns = ("--text-column", "my text", "--label-column", "kind", "--json")
    result = succeed("eval", files / "model", "--data", test, *columns)
    assert json.loads(result.stdout)["training_texts"] == 0
    message = failure("eval", files / "model", "--data", most, *columns)
    assert message.startswith(
        f"data: expected texts that {files / 'model'} was not trained on, got 180 of 185 that it was"
    )
    assert message.endswith("--allow-training-texts judges by them all the same")
    result = succeed("eval", files / "model", "--data", most, *columns, "--allow-training-texts")
    assert json.loads(result.stdout)["training_texts"] == 180
    assert "was trained on 180 of the 185 texts" in " ".join(result.stderr.split())
    result = succeed("eval", files / "model", "--data", few, *columns)
    assert json.loads(result.stdout)["training_texts"] == 1


def test_training_texts_given_as_test_texts(files):
    data = ("--data", files / "all rows.csv", "--test", files / "all rows.csv")
    columns = ("--text-column", "my text", "--label-column", "kind")
    result = succeed("train", files / "itself", *TINY, *data, *columns)
    assert "test figures: not reported: 200 of 200 test texts are training texts" in result.stderr
    assert "accuracy" not in result.stdout


def test_a_broken_record_is_named(files):
    succeed("prune", files / "model", files / "broken", "--sparsity", "0.5")
    (files / "broken" / TEXTS_FILE).write_text("{")
    message = failure("eval", files / "broken", "--data", files / "all rows.csv", "--text-column", "my text",
                      "--label-column", "kind")  # fmt: skip
    assert TEXTS_FILE in message
