import pytest
import torch

from sparsenlp.data import TextDataset
from sparsenlp.scratch import CLASSIFIERS, new_classifier

pytest.importorskip("transformers", reason="the models are models of transformers")
TEXTS = TextDataset(["a good film", "a bad film"] * 2, [1, 0] * 2, ["bad", "good"])
PAIRS = TextDataset(["film", "fox"] * 2, [1, 0] * 2, ["no", "yes"], ["a moving picture", "a planet"] * 2)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_model_for_the_words_and_classes_of_the_texts(name):
    texts = PAIRS if CLASSIFIERS[name].pairs else TEXTS
    new = new_classifier(name, texts, options={"embedding_size": 8})
    config = new.model.config
    assert (config.vocab_size, config.pad_token_id) == (len(new.tokenizer), 0)
    assert [config.id2label[i] for i in range(2)] == texts.label_names
    logits = new.model(**new.tokenizer(texts.texts, texts.text_pairs, padding=True, return_tensors="pt")).logits
    assert logits.shape == (4, 2)
    assert not new.model.training
    assert new.vectors is None


def test_the_seed_decides_the_weights_alone():
    before = torch.get_rng_state()
    weights = [new_classifier("textcnn", TEXTS, seed=seed).model.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_word_vectors_come_from_a_file(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("film 1 2 3\ngood 4 5 6\n")
    new = new_classifier("birnn", TEXTS, path, options={"cell": "gru"})
    assert (new.vectors.found, new.vectors.words) == (2, 4)
    assert new.model.encoder.rnn.input_size == 3
    film = new.tokenizer.convert_tokens_to_ids("film")
    assert new.model.embeddings.weight[film].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="line 1: expected a word and 4 numbers, got 3 after 'film'"):
        new_classifier("birnn", TEXTS, path, options={"embedding_size": 4})


@pytest.mark.parametrize(
    ("name", "texts", "options", "message"),
    [
        ("bert", TEXTS, {}, "model: expected one of textcnn, birnn, .*, got bert"),
        ("matcher", TEXTS, {}, "matcher: expected pairs of texts, got single ones"),
        ("birnn", PAIRS, {}, "birnn: expected single texts, got pairs; for these there is matcher"),
        ("birnn", TEXTS, {"depth": 2}, "birnn: expected options among embedding_size, dropout, .*, got depth"),
        ("birnn", TEXTS, {"vocab_size": 2}, "got vocab_size"),
        ("birnn", TEXTS, {"cell": "rnn"}, r"birnn: Field 'cell' expected one of \('lstm', 'gru'\), got rnn"),
        ("textcnn", TEXTS, {"filters": "many"}, "textcnn: Field 'filters' expected int, got str"),
        ("selfattention", TEXTS, {"embedding_size": 6}, "expected heads that divide features"),
    ],
)
def test_what_is_refused(name, texts, options, message):
    with pytest.raises(ValueError, match=message):
        new_classifier(name, texts, options=options)
