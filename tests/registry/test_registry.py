"""Model classes of transformers, made tiny: pruned, converted, saved and loaded; `make test-registry` takes all."""

from __future__ import annotations

import pytest
import torch
from registry.registry_checks import check, every_class, randomize
from registry.tiny_configs import tiny_model

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.models.decoders import conv1d_to_linear_
from sparsenlp.prune import Block, finalize_, prune_

SAMPLE = (
    "BertModel",
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "DistilBertForMaskedLM",
    "MPNetModel",
    "ElectraForMaskedLM",
    "AlbertForQuestionAnswering",
    "DebertaV2ForTokenClassification",
    "ModernBertForMaskedLM",
    "EuroBertForSequenceClassification",
    "FunnelModel",
    "XLNetLMHeadModel",
    "ConvBertModel",
    "T5ForConditionalGeneration",
    "BartForSequenceClassification",
    "MarianMTModel",
    "PegasusForConditionalGeneration",
    "FSMTForConditionalGeneration",
    "WhisperForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoForCausalLM",
    "GPTJForCausalLM",
    "OPTForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForSequenceClassification",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "MambaForCausalLM",
    "ViTModel",
    "ConvNextModel",
    "CLIPTextModel",
    "LlavaModel",
    "WavLMModel",
    "HubertModel",
)
GENERATING = (
    "GPT2LMHeadModel",
    "GPTNeoForCausalLM",
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
)


def pytest_generate_tests(metafunc):
    if "model_class" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-models", default=False)
        metafunc.parametrize("model_class", every_class() if every else SAMPLE)


@pytest.mark.filterwarnings("ignore")
def test_a_model_computes_the_same_pruned_converted_and_loaded(model_class, record):
    outcome = check(model_class)
    record(outcome)
    assert not outcome.faults, "\n".join(outcome.faults)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GENERATING)
def test_the_same_tokens_are_generated(name):
    model = randomize(tiny_model(name))
    prune_(conv1d_to_linear_(model), Block(8, 1), 0.8)
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = 0
    expected = finalize_(model).generate(ids, **settings)
    sparsify_(model, SparsifyConfig(measure="off"))
    assert torch.equal(model.generate(ids, **settings), expected)


def test_most_classes_can_be_built():
    assert len(every_class()) > 1000
