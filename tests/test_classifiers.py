from types import SimpleNamespace

import pytest
import torch
from tiny_bert import LENGTH, make_tokenizer, save_tiny_bert

from sparsenlp import classifiers as c


def config(*names, architecture="BertForSequenceClassification"):
    return SimpleNamespace(id2label=dict(enumerate(names)), architectures=[architecture])


@pytest.mark.parametrize(
    ("model", "labels", "retrain", "names", "trained"),
    [
        (config("bad", "good"), ["bad", "good"], False, ["bad", "good"], True),
        (config("good", "bad"), ["bad", "good"], False, ["good", "bad"], True),
        (config("bad", "good", "ugly"), ["bad", "good"], False, ["bad", "good", "ugly"], True),
        (config("bad", "good"), ["bad", "good"], True, ["bad", "good"], False),
        (config("LABEL_0", "LABEL_1"), ["bad", "good"], False, ["bad", "good"], True),
        (config("bad", "good"), ["no", "yes"], True, ["no", "yes"], False),
        (config("bad", "good"), ["a", "b", "c"], False, ["a", "b", "c"], False),
        (config("LABEL_0", "LABEL_1", architecture="BertModel"), ["bad", "good"], False, ["bad", "good"], False),
        (SimpleNamespace(id2label={0: "a"}, architectures=None), ["bad", "good"], False, ["bad", "good"], False),
    ],
)
def test_choose_head(model, labels, retrain, names, trained):
    head = c.choose_head(model, labels, retrain)
    assert (head.names, head.trained) == (names, trained)


def test_choose_head_does_not_guess_which_class_is_which():
    with pytest.raises(ValueError, match=r"labels: expected the model's classes bad, good, got no, yes; rename"):
        c.choose_head(config("bad", "good"), ["no", "yes"])


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
    assert c.label_names_of(models[0].config) == ["a", "b", "c"]
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


def test_max_tokens(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the tokenizer comes from transformers")
    directory = str(save_tiny_bert(tmp_path))
    tokenizer = make_tokenizer(transformers)
    assert c.max_tokens(c.load_config(directory), tokenizer) == LENGTH
    tokenizer.model_max_length = 8
    assert c.max_tokens(c.load_config(directory), tokenizer) == 8
    assert c.max_tokens(SimpleNamespace()) is None
