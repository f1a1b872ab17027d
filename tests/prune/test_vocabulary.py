from __future__ import annotations

import pytest
import torch
from structured_cases import assert_unchanged, model_of, snapshot
from tiny_bert import BAD, GOOD, make_tokenizer
from tiny_encoders import IDS, MASK, SIZES, TEXT, build, transformers
from torch import nn

from sparsenlp.models.encoders import fuse_encoders_
from sparsenlp.prune import Unstructured, prune_, reduce_vocabulary_

KEPT = sorted({0, 1, 2, 3, 4, *IDS.flatten().tolist()})
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CORPUS = [
    "the cat sat on the mat",
    "a cat ate the rat",
    "rats and cats and mats",
    "the other theme: thermal mathematics",
]
HEADS = {
    "bert": ("AutoModelForMaskedLM", TEXT["bert"]),
    "bert-untied": ("AutoModelForMaskedLM", ("BertConfig", SIZES | {"tie_word_embeddings": False})),
    "roberta": ("AutoModelForMaskedLM", ("RobertaConfig", SIZES)),
    "distilbert": ("AutoModelForMaskedLM", TEXT["distilbert"]),
    "electra": ("AutoModelForMaskedLM", TEXT["electra"]),
    "mpnet": ("AutoModelForMaskedLM", TEXT["mpnet"]),
}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, attention_mask=MASK).logits[MASK.bool()]


def language_model(name):
    if name not in HEADS:
        return model_of(name)
    task, config = HEADS[name]
    return build(config, task)


@pytest.mark.parametrize("name", [*HEADS, "llama", "mistral", "gpt2", "gpt2-linear"])
def test_scores_of_kept_tokens_stay(name, tmp_path):
    model = language_model(name)
    expected = logits(model, IDS)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    vocabulary = reduce_vocabulary_(model, KEPT)
    assert len(vocabulary.kept) == model.config.vocab_size < 50
    ids = vocabulary.renumber(IDS)
    torch.testing.assert_close(logits(model, ids), expected[:, vocabulary.kept], **TOLERANCE)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval(), ids), expected[:, vocabulary.kept], **TOLERANCE)
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_special_tokens_stay_with_new_ids():
    model = model_of("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = [49, 7]
    model.config.pad_token_id = 48
    vocabulary = reduce_vocabulary_(model, [10, 20])
    assert vocabulary.kept.tolist() == [1, 7, 10, 20, 48, 49]
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [5, 1]
    assert model.config.pad_token_id == 4
    assert model.config.bos_token_id == 0
    assert vocabulary.new_ids[[7, 10]].tolist() == [1, 2]
    assert vocabulary.renumber(torch.tensor([[10, 11]]), gone=0).tolist() == [[2, 0]]
    with pytest.raises(ValueError, match="renumber: expected ids of tokens that were kept, got 11"):
        vocabulary.renumber(torch.tensor([10, 11]))
    assert model.generate(torch.tensor([[2]]), max_new_tokens=3, do_sample=False).max() < 6


def test_a_plain_module_with_a_tied_output():
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(20, 6, padding_idx=3), "out": nn.Linear(6, 20)})
    model["out"].weight = model["words"].weight
    x = torch.randn(2, 6)
    expected, row = model["out"](x), model["words"].weight[7].clone()
    vocabulary = reduce_vocabulary_(model, [7, 5], embedding="words")
    assert vocabulary.kept.tolist() == [3, 5, 7]
    assert model["out"].weight is model["words"].weight
    assert str(model["words"]) == "Embedding(3, 6, padding_idx=0)"
    assert model["out"].out_features == 3
    torch.testing.assert_close(model["out"](x), expected[:, [3, 5, 7]])
    torch.testing.assert_close(model["words"](vocabulary.renumber(torch.tensor(7))), row)


def wordpiece(tokenizers):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "##me", "cat", "##s", "r", "##at", "mat", "a", "c", "and"]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pieces = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pieces)
    return tokenizer


def trained(tokenizers, model, trainer, byte_level=False, **options):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if byte_level:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainer(special_tokens=special, show_progress=False, **options))
    ends = [("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))]
    tokenizer.post_processor = tokenizers.processors.BertProcessing(*ends)
    return tokenizer


def tokenizer_of(kind):
    tokenizers = pytest.importorskip("tokenizers")
    models, trainers = tokenizers.models, tokenizers.trainers
    if kind == "WordLevel":
        return make_tokenizer(transformers)
    backend = {
        "WordPiece": lambda: wordpiece(tokenizers),
        "BPE": lambda: trained(tokenizers, models.BPE(unk_token="[UNK]"), trainers.BpeTrainer, vocab_size=60),
        "byte-level BPE": lambda: trained(tokenizers, models.BPE(), trainers.BpeTrainer, True, vocab_size=300),
        "Unigram": lambda: trained(
            tokenizers, models.Unigram(), trainers.UnigramTrainer, vocab_size=50, unk_token="[UNK]"
        ),
    }[kind]()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "byte-level BPE", "Unigram"])
def test_tokenizers_split_what_stays_as_before(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    text = f"{GOOD[3]} {BAD[7]} {GOOD[0]}" if kind == "WordLevel" else "the cats and the theme"
    before = tokenizer(text)["input_ids"]
    config = transformers.BertConfig(**SIZES | {"vocab_size": len(tokenizer) + 5})
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        expected = model(torch.tensor([before])).last_hidden_state
    vocabulary = reduce_vocabulary_(model, set(before), tokenizer)
    smaller = vocabulary.tokenizer
    assert set(before) <= set(vocabulary.kept.tolist())
    assert len(smaller) == model.config.vocab_size < len(tokenizer)
    smaller.save_pretrained(tmp_path)
    for after in (smaller, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        ids = after(text, return_tensors="pt")["input_ids"]
        assert ids.tolist() == [vocabulary.renumber(torch.tensor(before)).tolist()]
        assert after.convert_ids_to_tokens(ids[0]) == tokenizer.convert_ids_to_tokens(before)
        assert after.pad_token_id == int(vocabulary.new_ids[tokenizer.pad_token_id])
        others = after("zebra mathematics bad9")["input_ids"]  # of tokens that went: in smaller ones, or unknown
        assert max(others) < model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, expected, **TOLERANCE)
    assert tokenizer(text)["input_ids"] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept": []}, "reduce_vocabulary_: expected at least one token to keep, got none"),
        ({"kept": [50]}, "expected ids to keep from 0 to 49, got 50"),
        ({"kept": [-1]}, "expected ids to keep from 0 to 49, got -1"),
        ({"kept": ["good"]}, "expected ids of tokens, got str; a tokenizer tells those of texts"),
        ({"kept": [6, 6]}, "expected each of the ids to keep once, got 6 twice"),
        (
            {"tokenizer": "words"},
            "tokenizer: expected a fast one, of the tokenizers library, which can be edited, got str",
        ),
        ({"embedding": "encoder"}, "expected an nn.Embedding of tokens, got BertEncoder"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = build(TEXT["bert"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        reduce_vocabulary_(model, **({"kept": [6, 7]} | arguments))
    assert_unchanged(model, before)


def test_other_refusals(needs_native):
    roberta = build(("RobertaConfig", SIZES))  # whose padding token is 1
    roberta.config.bos_token_id = None
    before = snapshot(roberta)
    with pytest.raises(ValueError, match=r"all ids below the padding token's, 1, to be kept, .*position_embeddings"):
        reduce_vocabulary_(roberta, [5, 6])
    assert_unchanged(roberta, before)
    with pytest.raises(ValueError, match="expected a tokenizer of at most 10 tokens, got 24"):
        reduce_vocabulary_(build(("BertConfig", SIZES | {"vocab_size": 10})), [5], make_tokenizer(transformers))
    with pytest.raises(ValueError, match="expected embedding=<name> for a Sequential, got None"):
        reduce_vocabulary_(nn.Sequential(nn.Embedding(5, 4)), [1])
    model = build(TEXT["bert"])
    prune_(model, Unstructured(), 0.5)
    reduce_vocabulary_(model, KEPT)  # masks of linear layers do not matter
    nn.utils.parametrize.register_parametrization(model.embeddings.word_embeddings, "weight", nn.Identity())
    with pytest.raises(ValueError, match="expected masks burned in, got a mask on the embedding"):
        reduce_vocabulary_(model, [5])
    model = build(TEXT["bert"])
    fuse_encoders_(model)
    with pytest.raises(ValueError, match="reduce_vocabulary_: expected a model that is not fused"):
        reduce_vocabulary_(model, KEPT)
