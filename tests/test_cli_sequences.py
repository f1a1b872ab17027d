"""The commands for models that predict tokens: train, prune, eval, bench."""

import json

import pytest
import torch
from test_cli import failure, invoke, settings, succeed  # noqa: F401  # the fixture is used by all tests here

pytest.importorskip("transformers", reason="the models are transformers models")

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from sparsenlp import SparseGRU
from sparsenlp.sequences import new_encoder_decoder, new_language_model, text_windows
from sparsenlp.train import perplexity

TINY = ("--option", "embedding_size=16", "--option", "hidden_size=32", "--option", "num_hidden_layers=1")


def train(*arguments):
    result = invoke("train", *arguments, "--threads", "1", "--lr", "0.02")
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A word, and the same said twice."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    words = ["red", "green", "blue", "black", "white"]
    path.write_text("word,twice\n" + "".join(f"{word},{word} {word}\n" for word in words * 20), encoding="utf-8")
    return path


def test_an_encoder_decoder_learns_to_answer_and_is_pruned(pairs, tmp_path):
    out, sparse = tmp_path / "out", tmp_path / "sparse"
    columns = ("--text-column", "word", "--text-pair-column", "twice")
    code, said = train(out, "--model", "seq2seq", "--data", pairs, *columns, *TINY, "--epochs", "20")
    assert code == 0, said
    assert "10 test examples" in said
    assert "exact answers" in said
    assert "100.0%" in said
    assert f"next: sparsenlp prune {out} {out}-sparse --data {pairs} {' '.join(columns)}" in said
    assert not (out / "work").exists()
    succeed("prune", out, sparse, "--data", pairs, *columns, "--epochs", "6", "--learning-rate", "0.01")
    record = json.loads((sparse / "sparsenlp.json").read_text())
    assert record["quality"]["dense"] == {"examples": 10, "exact": 1, "majority": 0.4, "agreement": None}
    assert record["quality"]["sparse"]["exact"] == 1
    zeros = [row["sparsity"] for row in record["plan"]["rows"] + record["plan"]["composites"] if row["sparsity"] > 0]
    assert sum(zeros) / len(zeros) == pytest.approx(0.8, abs=0.1), "the model's own default"
    options = ("--against", out, "--max-length", "5", "--json", "--allow-training-texts")
    quality = succeed("eval", sparse, "--data", pairs, *columns, *options).stdout
    assert {"examples": 100, "exact": 1, "majority": 0.2, "agreement": 1, "against_exact": 1}.items() <= json.loads(
        quality
    ).items()
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(sparse), AutoTokenizer.from_pretrained(sparse)
    assert isinstance(model.encoder.rnn.layers[0], SparseGRU)
    generated = model.generate(**tokenizer("Blue", return_tensors="pt"), max_new_tokens=5, num_beams=2)
    assert tokenizer.batch_decode(generated, skip_special_tokens=True) == ["blue blue"]
    timed = ("--batch", "2", "--tokens", "4", "--baseline", "eager fp32", "--seconds", "0")
    assert "sparse, eager fp32" in succeed("bench", sparse, *timed).stdout


def test_a_language_model_learns_its_texts_and_is_pruned(pairs, tmp_path, monkeypatch):
    """It is judged by the texts that it learns, which nobody else is let."""
    monkeypatch.setattr("sparsenlp.trained_texts.REPEATED", 1)
    out, sparse = tmp_path / "out", tmp_path / "sparse"
    data = ("--data", pairs, "--test", pairs, "--text-column", "twice")
    code, said = train(out, "--model", "lstm-lm", *data, *TINY, "--epochs", "30")
    assert code == 0, said
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    twice = [f"{word} {word}" for word in ("red", "green", "blue", "black", "white")] * 20
    windows = text_windows(twice, tokenizer, 64)
    reached = perplexity(model, windows)
    assert "252 test tokens" in said
    assert f"lstm-lm {reached:.1f} 5.5" in said
    assert reached < 4
    succeed("prune", out, sparse, *data, "--epochs", "10", "--learning-rate", "0.01", "--sparsity", "0.5")
    quality = json.loads((sparse / "sparsenlp.json").read_text())["quality"]
    assert quality["dense"]["perplexity"] == pytest.approx(reached)
    assert quality["sparse"]["perplexity"] < 4
    sizes = set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: sizes.add(len(inputs[0])) if isinstance(module, torch.nn.Embedding) else None
    )
    with hook:
        shown = succeed("eval", sparse, *data[:2], *data[4:], "--against", out, "--batch-size", "3").stdout
    assert sizes == {1, 3}, "four windows"
    assert f"{quality['sparse']['perplexity']:.1f}" in shown
    assert f"{reached:.1f}" in shown
    assert AutoModelForCausalLM.from_pretrained(sparse)(windows).logits.shape == (4, 64, len(tokenizer))
    timed = ("--batch", "1", "--tokens", "8", "--baseline", "eager fp32", "--seconds", "0")
    assert "sparse, eager fp32" in succeed("bench", sparse, *timed).stdout
    gradients = ("--criterion", "movement", "--epochs", "1", "--finetune-epochs", "1")
    message = failure("prune", out, tmp_path / "no", *data, *gradients)
    assert "finetune.when: expected needed or never for a model that predicts tokens, got always" in message
    assert "expected a sparsity for a model that predicts" in failure(
        "prune", out, tmp_path / "no", *data, "--target", "2x faster"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "seq2seq"), "text_pair_column: expected that of the targets for an encoder-decoder, got none"),
        (("--model", "lstm-lm", "--option", "layers=2"), "lstm-lm: expected options among embedding_size"),
        (("--model", "lstm-lm", "--text-column", "none"), 'expected a column "none"'),
        (("--model", "seq2seq", "--data", "rotten_tomatoes"), "data: expected texts and targets, got rotten_tomatoes"),
        (("--model", "lstm-lm", "--data", "pronunciations"), "data: expected texts, got pronunciations"),
        (("--model", "textcnn", "--data", "pronunciations"), "data.task: expected labelled texts, got pronunciations"),
    ],
)
def test_bad_input(pairs, tmp_path, arguments, message):
    code, said = train(tmp_path / "out", "--data", pairs, "--text-column", "word", *arguments)
    assert code == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_torchs_random_state_is_left_alone(pairs):
    before = torch.get_rng_state()
    new = new_language_model(["ab cd"] * 20, characters=True, window=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert new.tokenizer.decode(new.data.columns["input_ids"][0][:5]) == "ab cd"


def test_word_vectors_are_begun_with(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("red 1 2\nblue 3 4\n", encoding="utf-8")
    new = new_encoder_decoder(["red", "red"], ["blue", "blue"], embeddings=path, options={"hidden_size": 4})
    for part in (new.model.encoder, new.model.decoder):
        assert part.embeddings.weight[new.tokenizer.convert_tokens_to_ids("blue")].tolist() == [3, 4]
