"""sparsenlp train for models that predict tokens."""

import pytest
import torch
from typer.testing import CliRunner

from sparsenlp.cli import app

pytest.importorskip("transformers", reason="the models are transformers models")

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from sparsenlp.sequences import new_encoder_decoder, new_language_model, text_windows
from sparsenlp.train import perplexity

TINY = ("--option", "embedding_size=16", "--option", "hidden_size=32", "--option", "num_hidden_layers=1")


def train(*arguments):
    result = CliRunner().invoke(app, ["train", *map(str, arguments), "--threads", "1", "--lr", "0.02"])
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


@pytest.fixture
def pairs(tmp_path):
    """A word, and the same said twice."""
    path = tmp_path / "pairs.csv"
    words = ["red", "green", "blue", "black", "white"]
    path.write_text("word,twice\n" + "".join(f"{word},{word} {word}\n" for word in words * 20), encoding="utf-8")
    return path


def test_an_encoder_decoder_learns_to_answer(pairs, tmp_path):
    out = tmp_path / "out"
    columns = ("--text-column", "word", "--text-pair-column", "twice")
    code, said = train(out, "--model", "seq2seq", "--data", pairs, *columns, *TINY, "--epochs", "20")
    assert code == 0, said
    assert "answers exact: 100.0% of 10 test texts" in said
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    generated = model.generate(**tokenizer("Blue", return_tensors="pt"), max_new_tokens=5, num_beams=2)
    assert tokenizer.batch_decode(generated, skip_special_tokens=True) == ["blue blue"]
    assert not (out / "work").exists()


def test_a_language_model_learns_its_texts(pairs, tmp_path):
    out = tmp_path / "out"
    data = ("--data", pairs, "--test", pairs, "--text-column", "twice")
    code, said = train(out, "--model", "lstm-lm", *data, *TINY, "--epochs", "30")
    assert code == 0, said
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    twice = [f"{word} {word}" for word in ("red", "green", "blue", "black", "white")] * 20
    reached = perplexity(model, text_windows(twice, tokenizer, 64))
    assert f"perplexity: {reached:.1f} of 256 test tokens" in said
    assert reached < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "seq2seq"), "seq2seq: expected --text-pair-column, the column of the targets, got none"),
        (("--model", "lstm-lm", "--option", "layers=2"), "lstm-lm: expected options among embedding_size"),
        (("--model", "lstm-lm", "--text-column", "none"), 'expected a column "none"'),
        (("--model", "seq2seq", "--data", "rotten_tomatoes", "--text-pair-column", "x"), "expected a file of sources"),
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
