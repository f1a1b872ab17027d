"""What `prune_` leaves alone when nobody tells it which layers to take."""

import pytest
import torch
from registry.tiny_configs import tiny_model
from torch import nn

from sparsenlp.prune import Block, prunable, prune_

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class TiedLanguageModel(nn.Module):
    """A decoder under a name that says nothing, whose weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.inner = nn.Linear(32, 32)
        self.unembed = nn.Linear(32, 64, bias=False)
        self.unembed.weight = self.words.weight


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.shared_expert_gate = nn.Linear(32, 1)
        self.router = nn.ModuleDict({"layer": nn.Linear(32, 8)})
        self.up = nn.Linear(32, 64)


def test_a_weight_shared_with_an_embedding_is_left_alone():
    model = TiedLanguageModel()
    assert [*prunable(model)] == ["inner"]
    assert [*prune_(model, Block(8, 1), 0.5)] == ["inner"]


def test_a_tied_layer_can_still_be_asked_for():
    with pytest.raises(ValueError, match="expected unembed to have a weight of its own, got one that words uses too"):
        prune_(TiedLanguageModel(), Block(8, 1), 0.5, filter_fn=lambda module, name: True)


def test_linear_layers_that_share_a_weight_with_a_head_are_left_alone():
    model = nn.ModuleDict({"classifier": nn.Linear(32, 32), "other": nn.Linear(32, 32), "body": nn.Linear(32, 32)})
    model["other"].weight = model["classifier"].weight
    assert [*prunable(model)] == ["body"]


def test_routers_are_left_alone_and_gates_of_a_feed_forward_are_not():
    assert [*prunable(Mixture())] == ["up"]
    wide = nn.ModuleDict({"gate": nn.Linear(32, 64), "gate_proj": nn.Linear(32, 4)})
    assert [*prunable(wide)] == ["gate", "gate_proj"]


@pytest.mark.parametrize(
    ("model_class", "head"),
    [
        ("DistilBertForMaskedLM", "vocab_projector"),
        ("ElectraForMaskedLM", "generator_lm_head"),
        ("BioGptForCausalLM", "output_projection"),
        ("WhisperForCausalLM", "proj_out"),
        ("EuroBertForSequenceClassification", "dense"),
        ("AlbertModel", "encoder.embedding_hidden_mapping_in"),
    ],
)
def test_heads_of_transformers_models_are_left_alone_by_what_they_are(model_class, head):
    model = tiny_model(model_class)
    assert head in dict(model.named_modules())
    names = [*prunable(model)]
    assert names
    assert head not in names


def test_a_head_inside_of_another_module_is_left_alone():
    model = nn.Sequential(tiny_model("EuroBertForSequenceClassification"))
    assert not any(name.endswith("0.dense") for name in prunable(model))


def test_parts_outside_the_base_that_are_models_of_their_own_are_selected():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**SMALL), transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    )
    model = transformers.EncoderDecoderModel(config)
    assert {name.split(".")[0] for name in prunable(model)} == {"encoder", "decoder"}
    with torch.no_grad():
        assert set(prune_(model, Block(8, 1), 0.5).values()) == {0.5}
