import json

import pytest
from test_cli import failure, settings, succeed  # noqa: F401  # the fixture is used by all tests here
from tiny_bert import write_table

pytest.importorskip("transformers", reason="the models are models of transformers")
TINY = {
    "textcnn": ("--model", "textcnn", "--option", "embedding_size=16", "--option", "filters=16"),
    "selfattention": ("--model", "selfattention", "--option", "embedding_size=16", "--option", "intermediate_size=32"),
    "birnn": ("--model", "birnn", "--option", "embedding_size=16", "--option", "hidden_size=16"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    write_table(directory / "train.csv", 80)
    write_table(directory / "test.csv", 32, seed=1)
    return directory


@pytest.mark.parametrize("name", TINY)
def test_train_evaluate_prune_and_load(files, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, sparse, data = files / name, files / f"{name}-sparse", ("--data", files / "train.csv", "--batch-size", "16")
    result = succeed("train", model, *TINY[name], *data, "--test", files / "test.csv", "--epochs", "6", "--lr", "0.01")
    assert "100.0%" in result.stdout, result.stdout
    assert "50.0%" in result.stdout, "the majority class"
    assert "vocabulary: 22 words" in result.stderr
    assert not (model / "work").exists()
    quality = json.loads(succeed("eval", model, "--data", files / "test.csv", "--json").stdout)
    assert quality["accuracy"] == 1
    succeed("prune", model, sparse, *data, "--epochs", "2")
    plan = json.loads((sparse / "sparsenlp.json").read_text())["plan"]
    zeros = [row["sparsity"] for row in plan["rows"] + plan["composites"] if row["sparsity"] > 0]
    assert sum(zeros) / len(zeros) == pytest.approx(0.8, abs=0.1), "the model's own default"
    loaded = AutoModelForSequenceClassification.from_pretrained(sparse)
    inputs = AutoTokenizer.from_pretrained(sparse)(["good1 good2", "bad1"], padding=True, return_tensors="pt")
    assert loaded(**inputs).logits.argmax(dim=1).tolist() == [1, 0]


def test_a_matcher_of_definitions(files):
    """24 families of 5 definitions, in a file like WordNet's."""
    nouns, model, sparse = files / "data.noun", files / "matcher", files / "matcher-sparse"
    line = "{0:08} 05 n 01 w{0} 0 001 @ {1:08} n 0000 | kind {1} number {0}\n"
    nouns.write_text("".join(line.format(i, i // 5) for i in range(120)))
    small = ("--option", "embedding_size=16", "--option", "hidden_size=16", "--option", "comparison=words")
    data = ("--data", "sibling_definitions", "--wordnet", nouns, "--count", "100")
    result = succeed("train", model, "--model", "matcher", *small, *data, "--epochs", "2", "--lr", "0.01")
    assert "test examples" in result.stdout
    assert f"next: sparsenlp prune {model} {model}-sparse {' '.join(map(str, data))}" in result.stdout
    succeed("prune", model, sparse, *data, "--epochs", "1")
    record = json.loads((sparse / "sparsenlp.json").read_text())
    assert record["recipe"]["data"] == {"task": "sibling_definitions", "path": str(nouns), "count": 100}
    assert "compare" in {row["name"] for row in record["plan"]["rows"] if row["sparsity"] > 0}


def test_the_seed_decides_everything(files):
    weights = []
    for name in ("first", "second"):
        succeed("train", files / name, *TINY["birnn"], "--data", files / "train.csv", "--epochs", "1", "--seed", "3")
        weights.append((files / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_coverage_of_word_vectors_is_told(files):
    vectors = files / "vectors.txt"
    vectors.write_text("".join(f"good{i} {i} 0 0 1\n" for i in range(5)))
    arguments = ("--data", files / "train.csv", "--epochs", "1", "--embeddings", vectors)
    result = succeed("train", files / "vectors", "--model", "textcnn", *arguments)
    assert f"word vectors: {vectors} has 5 of 20 words (25.0%)" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "bert", "--data", "train.csv"],
            "model: expected one of textcnn, birnn, selfattention, matcher, got",
        ),
        (["--model", "matcher", "--data", "train.csv"], "matcher: expected pairs of texts, got single ones"),
        (["--model", "birnn", "--data", "none.csv"], "cannot read none.csv"),
        (["--model", "birnn", "--data", "train.csv", "--option", "cell"], "option: expected name=value, got cell"),
        (["--model", "birnn", "--data", "train.csv", "--embeddings", "none.txt"], "word vectors: cannot read none.txt"),
        (["--model", "birnn", "--data", "train.csv", "--count", "5"], "count: expected none beside train, got one"),
        (["--model", "birnn", "--data", "rotten_tomatoes", "--test", "a.csv"], "test: expected none beside task"),
        (["--data", "train.csv"], "Missing option '--model'"),
    ],
)
def test_bad_input(files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    assert message in failure("train", files / "refused", *arguments)
    assert not (files / "refused").exists()
