import pytest

from sparsenlp.data import word_tokenizer

pytest.importorskip("transformers", reason="the tokenizer is one of transformers")
TEXTS = ["A film, a FILM and a fox", "the film ends", "the fox"]


def test_the_vocabulary():
    tokenizer = word_tokenizer(TEXTS)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["[PAD]", "[UNK]", "a", "film", "fox", "the"]
    assert word_tokenizer(reversed(TEXTS)).get_vocab() == tokenizer.get_vocab()
    assert [*word_tokenizer(TEXTS, most_words=2).get_vocab()] != [*tokenizer.get_vocab()]
    assert len(word_tokenizer(TEXTS, most_words=2)) == 4
    assert "ends" in word_tokenizer(TEXTS, least_count=1).get_vocab()


def test_texts_become_ids():
    tokenizer = word_tokenizer(TEXTS)
    assert tokenizer("The Film, unseen") == {"input_ids": [5, 3, 1, 1], "attention_mask": [1] * 4}
    assert tokenizer("the", padding="max_length", max_length=3)["input_ids"] == [5, 0, 0]


def test_pairs_are_told_apart():
    encoded = word_tokenizer(TEXTS, pairs=True)("the fox", "a film")
    assert encoded == {"input_ids": [5, 4, 2, 3], "token_type_ids": [0, 0, 1, 1], "attention_mask": [1] * 4}


def test_it_is_saved_with_further_tokens(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = word_tokenizer(TEXTS, special={"eos_token": "[EOS]"})
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded("The Film, unseen") == tokenizer("The Film, unseen")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "expected a word that occurs 2 times in the texts, got none"),
        (["each word once"], {}, "expected a word that occurs 2 times in the texts, got none"),
        (TEXTS, {"least_count": 0}, "expected least_count of at least 1, got 0"),
        (TEXTS, {"most_words": 0}, "expected most_words of at least 1, got 0"),
    ],
)
def test_what_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        word_tokenizer(texts, **options)
