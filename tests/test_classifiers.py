import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_bert import LENGTH, make_tokenizer, save_tiny_bert

from sparsenlp import classifiers as c
from sparsenlp.heads import label_names_of


def test_judge():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    alone = c.judge(logits, labels)
    assert (alone.examples, alone.accuracy, alone.majority, alone.agreement) == (4, 0.75, 0.5, None)
    other = logits.clone()
    other[3] = torch.tensor([1.0, 2.0])
    compared = c.judge(logits, labels, other)
    assert compared.agreement == 0.75
    assert compared.kl > 0
    assert compared.cosine == pytest.approx(19 / 20)


def test_judge_refuses_other_classes():
    with pytest.raises(ValueError, match=r"expected reference logits of shape \[4, 2\], got \[4, 3\]"):
        c.judge(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3))


def test_a_new_head_is_the_same_every_time_and_named(tmp_path):
    directory = str(save_tiny_bert(tmp_path, head=False))
    models = [c.load_model(directory, ["a", "b", "c"]) for _ in range(2)]
    assert label_names_of(models[0].config) == ["a", "b", "c"]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    assert not models[0].training


def test_loading_leaves_the_random_state_alone(tmp_path):
    directory = str(save_tiny_bert(tmp_path, head=False))
    before = torch.get_rng_state()
    c.load_model(directory, ["a", "b"])
    assert torch.equal(torch.get_rng_state(), before)


def test_models_are_loaded_in_float32(tmp_path):
    directory = save_tiny_bert(tmp_path)
    model = c.load_model(str(directory)).to(torch.bfloat16)
    c.save_model(model, directory)
    assert c.load_model(str(directory)).dtype == torch.float32


@pytest.mark.parametrize("text", ["", "[]", "{", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_other_directories_are_no_sparse_checkpoints(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not c.is_sparse_checkpoint(str(tmp_path))
    assert not c.is_sparse_checkpoint(str(tmp_path / "none"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(pytest.importorskip("transformers", reason="the tokenizer comes from transformers"))


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
NAMED = {
    "BertModel": SIZES,
    "BertForTokenClassification": SIZES,
    "BertForQuestionAnswering": SIZES,
    "BertForMaskedLM": SIZES,
    "RobertaForSequenceClassification": SIZES,
    "T5ForConditionalGeneration": T5_SIZES,
    "T5EncoderModel": T5_SIZES,
    "LlamaForCausalLM": SIZES | {"num_key_value_heads": 2},
}


def save(directory, name, tokenizer, **settings):
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | NAMED.get(name, SIZES)
    model = cls(cls.config_class(**sizes | settings)).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", NAMED)
def test_a_model_is_what_its_config_names(tmp_path, tokenizer, name):
    model = save(tmp_path, name, tokenizer)
    loaded = c.load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def forget(directory, part):
    """Take the tensors with this in their names out of a checkpoint."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})


def rename(directory, architectures):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": architectures}))


def test_a_head_that_the_files_lack_is_not_judged(tmp_path):
    directory = save_tiny_bert(tmp_path)
    forget(directory, "classifier.")
    names = ["bad", "good"]
    for options in ({}, {"label_names": names, "trained": True}):
        with pytest.raises(ValueError, match=r"expected all weights .* for classifier.bias, classifier.weight, w"):
            c.load_model(str(directory), **options)
    assert c.load_model(str(directory), names).config.num_labels == 2


def test_a_head_of_another_size_is_not_judged(tmp_path):
    directory = save_tiny_bert(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    three = {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
    (directory / "config.json").write_text(json.dumps(config | three))
    with pytest.raises(ValueError, match=r"got none of the right shape for classifier.bias, classifier.weight"):
        c.load_model(str(directory))


def test_an_encoder_that_the_files_lack_is_no_start(tmp_path):
    directory = save_tiny_bert(tmp_path, head=False)
    forget(directory, "layer.1.")
    with pytest.raises(ValueError, match=r" for bert.encoder.layer.1.* and 13 more, which would be random"):
        c.load_model(str(directory), ["bad", "good"])


def test_weights_without_a_place_are_told(tmp_path):
    rename(save_tiny_bert(tmp_path), ["BertModel"])
    with pytest.warns(UserWarning, match="BertModel has no place for classifier.bias, classifier.weight, left out"):
        assert type(c.load_model(str(tmp_path))).__name__ == "BertModel"


def test_a_model_without_architectures_is_not_guessed(tmp_path):
    rename(save_tiny_bert(tmp_path), None)
    with pytest.raises(ValueError, match=r"architectures: expected one model class .*, got none"):
        c.load_model(str(tmp_path))


@pytest.mark.parametrize("family", ["Roberta", "MPNet", "XLMRoberta", "Camembert", "Bert", "Electra"])
def test_positions_that_are_counted_from_the_padding(family):
    """As many tokens as `max_tokens` says run, one more does not."""
    transformers = pytest.importorskip("transformers", reason="the models come from transformers")
    sizes = {"vocab_size": 30, "max_position_embeddings": 18, "pad_token_id": 3}
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    limit = c.max_tokens(config)
    assert limit == c.max_positions(model) == {"Bert": 18, "Electra": 18, "MPNet": 16}.get(family, 14)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("known", [None, 7])
def test_decoders_learn_what_pads(tmp_path, tokenizer, known):
    name = "LlamaForSequenceClassification"
    model = save(tmp_path, name, tokenizer, num_key_value_heads=2, num_labels=2, pad_token_id=known)
    ids = torch.tensor([[10, 11, 12], [10, 11, 0]])
    expected = torch.cat([model(input_ids=row[None, :count]).logits for row, count in zip(ids, (3, 2), strict=True)])
    with pytest.warns(UserWarning, match=f"the model's config has {known}, the tokenizer pads with 0, which is used"):
        c.match_padding_(model, tokenizer)
    assert model.config.pad_token_id == 0
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.match_padding_(model, tokenizer)


def test_encoders_keep_their_padding(tmp_path, tokenizer):
    model = save(tmp_path, "RobertaForSequenceClassification", tokenizer, pad_token_id=1)
    c.match_padding_(model, tokenizer)
    assert model.config.pad_token_id == 1


def test_max_tokens(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the tokenizer comes from transformers")
    directory = str(save_tiny_bert(tmp_path))
    tokenizer = make_tokenizer(transformers)
    assert c.max_tokens(c.load_config(directory), tokenizer) == LENGTH
    tokenizer.model_max_length = 8
    assert c.max_tokens(c.load_config(directory), tokenizer) == 8
    assert c.max_tokens(SimpleNamespace()) is None
