"""Embeddings of transformers as one op: same numbers, same state, and the original where the op cannot serve."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sparsenlp.layers.embeddings import FusedEmbeddings
from sparsenlp.models.embeddings import RULES, fuse_embeddings_

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

SIZES = {"vocab_size": 50, "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SIZES["max_position_embeddings"] = 16
FAMILIES = {
    "bert": (transformers.BertConfig, SIZES),
    "camembert": (transformers.CamembertConfig, SIZES),
    "distilbert": (transformers.DistilBertConfig, {"dim": 20, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}),
    "electra": (transformers.ElectraConfig, SIZES | {"embedding_size": 12}),
    "mpnet": (transformers.MPNetConfig, SIZES),
    "roberta": (transformers.RobertaConfig, SIZES),
    "xlm_roberta": (transformers.XLMRobertaConfig, SIZES),
}
TYPED = ("bert", "camembert", "electra", "roberta", "xlm_roberta")
CALLED = "sparsenlp.layers.embeddings.call"


def tiny(family="bert", dtype=torch.float32):
    config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "max_position_embeddings": 16} | sizes
    sizes |= {"type_vocab_size": 2} if family in TYPED else {}
    model = transformers.AutoModel.from_config(config(**sizes)).to(dtype).eval()
    for parameter in model.embeddings.parameters():  # biases are zeros, and so is the row of padding
        nn.init.normal_(parameter)
    return model


def random_ids(batch=3, length=9, seed=0, padded=False):
    ids = torch.randint(2, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
    if padded:
        ids[0, 5:] = ids[1, :2] = ids[2, 3] = 1  # after, before and between: 1 is what RoBERTa and MPNet skip
    return ids


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the op."""
    counted = []
    op = FusedEmbeddings.forward.__globals__["call"]
    monkeypatch.setattr(CALLED, lambda *arguments: counted.append(1) or op(*arguments))
    return counted


def test_every_rule_is_tested():
    assert {name.partition(".")[0] for name in RULES} == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_output(family, calls, needs_native):
    model = tiny(family)
    original, names = model.embeddings, list(model.state_dict())
    inputs = [{"input_ids": random_ids()}, {"input_ids": random_ids(padded=True)}, {"input_ids": random_ids(1, 1)}]
    inputs += [{"input_ids": random_ids(), "position_ids": random_ids(3, 9, seed=1) % 16}]
    inputs += [{"input_ids": random_ids(), "position_ids": torch.arange(9)[None]}]
    if family in TYPED:
        inputs += [{"input_ids": random_ids(padded=True), "token_type_ids": random_ids(seed=2) % 2}]
        inputs += [{"input_ids": random_ids(), "token_type_ids": random_ids(1, seed=2) % 2}]
    with torch.no_grad():
        expected = [original(**given) for given in inputs]
        hidden = model(random_ids(padded=True)).last_hidden_state
        assert fuse_embeddings_(model) == {"embeddings": original}
        for given, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model.embeddings(**given), y, rtol=1e-6, atol=1e-6)
        assert len(calls) == len(inputs)
        got = model(random_ids(padded=True)).last_hidden_state
    assert len(calls) == len(inputs) + 1
    torch.testing.assert_close(got, hidden, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_closer_to_the_exact_result(family, calls, needs_native):
    """The op rounds once, where the original rounds every sum."""
    model = tiny(family, torch.bfloat16)
    ids = random_ids(padded=True)
    with torch.no_grad():
        exact, y = copy.deepcopy(model.embeddings).double()(ids), model.embeddings(ids)
        fuse_embeddings_(model)
        fused = model.embeddings(ids)
    assert len(calls) == 1
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused.double(), exact, rtol=4e-3, atol=1e-5)
    torch.testing.assert_close(fused, y, rtol=5e-2, atol=5e-2)


def test_positional_arguments_of_distilbert(calls, needs_native):
    """Its second parameter is inputs_embeds, not token_type_ids."""
    model = tiny("distilbert")
    embeds = torch.randn(3, 9, 20)
    with torch.no_grad():
        expected = model.embeddings(None, embeds)
        fuse_embeddings_(model)
        assert torch.equal(model.embeddings(None, embeds), expected)
        model.embeddings(random_ids(), None, torch.arange(9)[None])
    assert len(calls) == 1


def hooked(model):
    model.embeddings.word_embeddings.register_forward_hook(lambda module, inputs, output: output * 2)


def hooked_before(model):
    model.embeddings.LayerNorm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def forward_replaced(model):
    model.embeddings.dropout.forward = torch.neg


def another_table(model):
    model.embeddings.word_embeddings = nn.Sequential(model.embeddings.word_embeddings, nn.Tanh())


def mixed_dtypes(model):
    model.embeddings.LayerNorm.double()
    model.embeddings.word_embeddings.double()


def renormalized(model):
    model.embeddings.word_embeddings.max_norm = 0.5


def doubled(model):
    model.double()


CHANGES = [hooked, hooked_before, forward_replaced, another_table, mixed_dtypes, renormalized, doubled]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_op_does_not_compute_runs_the_original(change, calls):
    model = tiny()
    fuse_embeddings_(model)
    change(model)
    reference = tiny()
    change(reference)
    with torch.no_grad():
        torch.testing.assert_close(model.embeddings(random_ids()), reference.embeddings(random_ids()))
    assert not calls


@pytest.mark.parametrize(
    "given",
    [
        {"inputs_embeds": torch.ones(3, 9, 20)},
        {"input_ids": random_ids(), "past_key_values_length": 2},
        {"input_ids": random_ids().int()},
    ],
)
def test_other_inputs_run_the_original(given, calls):
    model = tiny()
    with torch.no_grad():
        expected = model.embeddings(**given)
        fuse_embeddings_(model)
        assert torch.equal(model.embeddings(**given), expected)
    assert not calls


def test_gradients_dropout_and_autocast_run_the_original(calls, needs_native):
    model = tiny()
    fuse_embeddings_(model)
    model.embeddings(random_ids()).sum().backward()
    assert model.embeddings.word_embeddings.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu"):
            model.embeddings(random_ids())
        assert bool((model.train().embeddings(random_ids()) == 0).any())  # dropped
        assert not calls
        model.embeddings.dropout.p = 0.0
        model.embeddings(random_ids())
    assert len(calls) == 1


def test_without_the_extension(monkeypatch, calls):
    monkeypatch.setattr("sparsenlp.native.available", False)
    model = tiny()
    with torch.no_grad():
        expected = model.embeddings(random_ids())
        fuse_embeddings_(model)
        assert torch.equal(model.embeddings(random_ids()), expected)
    assert not calls


def test_global_hooks_see_the_tables(calls):
    model, seen = tiny(), []
    fuse_embeddings_(model)
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            model.embeddings(random_ids())
        finally:
            handle.remove()
    assert nn.Embedding in seen
    assert not calls


def test_hooks_of_the_module_carry_over(needs_native):
    model, seen = tiny(), []
    model.embeddings.register_forward_hook(lambda *_: seen.append("before"))
    fuse_embeddings_(model)
    model.embeddings.register_forward_hook(lambda *_: seen.append("after"))
    with torch.no_grad():
        model(random_ids())
    assert seen == ["before", "after"]


def test_state_is_shared_with_the_original(needs_native, calls):
    model = tiny()
    original = model.embeddings
    fuse_embeddings_(model)
    model.resize_token_embeddings(60)
    assert original.word_embeddings is model.get_input_embeddings()
    assert original.word_embeddings.num_embeddings == 60
    model.load_state_dict(model.state_dict() | {"embeddings.LayerNorm.bias": torch.ones(20)})
    assert bool((original.LayerNorm.bias == 1).all())
    with torch.no_grad():
        torch.testing.assert_close(model.embeddings(random_ids() + 10), original(random_ids() + 10))
    assert len(calls) == 1
    model.to(torch.bfloat16)
    assert original.word_embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_stand_alone(clone, needs_native):
    model = tiny("roberta")
    fuse_embeddings_(model)
    with torch.no_grad():
        expected = model.embeddings(random_ids(padded=True))
        other = clone(model)
        model.embeddings.word_embeddings.weight.zero_()
        assert torch.equal(other.embeddings(random_ids(padded=True)), expected)
    assert other.embeddings.original.word_embeddings is other.embeddings.word_embeddings


def test_saved_and_loaded(tmp_path, needs_native):
    model = tiny("roberta")
    fuse_embeddings_(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.embeddings(random_ids()), model.embeddings(random_ids()), rtol=1e-6, atol=1e-6
        )


def test_compile_fullgraph(needs_native):
    model = tiny("roberta")
    fuse_embeddings_(model)
    with torch.no_grad():
        expected = model.embeddings(random_ids(padded=True))
        compiled = torch.compile(model.embeddings, fullgraph=True)
        torch.testing.assert_close(compiled(random_ids(padded=True)), expected)


@pytest.mark.parametrize(("family", "most"), [("bert", 16), ("distilbert", 16), ("roberta", 14), ("mpnet", 14)])
def test_too_long_sequences(family, most, needs_native):
    model = tiny(family)
    fuse_embeddings_(model)
    with torch.no_grad():
        model.embeddings(random_ids(2, most))
        with pytest.raises(ValueError, match=f"expected at most P = {most} positions, got S = {most + 1}"):
            model.embeddings(random_ids(2, most + 1))
        with pytest.raises(IndexError, match="expected ids from 0 to 49, got 50"):
            model.embeddings(torch.full((1, 3), 50))


def test_models_with_a_head_and_heads_with_two_encoders(calls, needs_native):
    config = tiny().config
    model = transformers.BertForSequenceClassification(config).eval()
    both = nn.ModuleDict({"a": model, "b": model.bert, "c": tiny("roberta")})
    assert [*fuse_embeddings_(both)] == ["a.bert.embeddings", "c.embeddings"]
    with torch.no_grad():
        model(random_ids())
    assert len(calls) == 1


def test_nothing_to_fuse():
    model = tiny()
    assert [*fuse_embeddings_(model)] == ["embeddings"]
    fused = model.embeddings
    assert fuse_embeddings_(model) == {}
    assert model.embeddings is fused
    assert fuse_embeddings_(nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3))) == {}


def test_what_the_rules_do_not_know_stays():
    from transformers.models.bert.modeling_bert import BertEmbeddings

    class Mine(BertEmbeddings):
        pass

    model = tiny()
    model.embeddings = Mine(model.config)
    assert fuse_embeddings_(model) == {}
    replaced = tiny()
    replaced.embeddings.forward = lambda **_: None
    assert fuse_embeddings_(replaced) == {}


def test_errors():
    with pytest.raises(ValueError, match=r"fuse_embeddings_: expected a model .* got BertEmbeddings itself; wrap it"):
        fuse_embeddings_(tiny().embeddings)
    with pytest.raises(ValueError, match="FusedEmbeddings: expected word_embeddings in Linear, got none"):
        FusedEmbeddings(nn.Linear(2, 2))
