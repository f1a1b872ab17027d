from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny_encoders import SIZES, randomize, transformers
from torch import nn

import sparsenlp
from sparsenlp import CheckpointError, MaskRule, use_block_sparse_attention_, use_dense_attention_
from sparsenlp.models.decoders import fuse_decoder_
from sparsenlp.models.encoders import fuse_encoders_
from sparsenlp.prune import Block, finalize_, prune_

LENGTH = 50
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = SIZES | DROPLESS | {"max_position_embeddings": 100}
LLAMA = SIZES | {"max_position_embeddings": 100, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 100, "attn_pdrop": 0.0}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MODELS = {
    "bert": ("BertConfig", ENCODER, "AutoModelForSequenceClassification"),
    "roberta": ("RobertaConfig", ENCODER, "AutoModelForSequenceClassification"),
    "llama": ("LlamaConfig", LLAMA | SPECIAL, "AutoModelForCausalLM"),
    "gpt2": ("GPT2Config", GPT2 | SPECIAL, "AutoModelForCausalLM"),
}
DECODERS = ("llama", "gpt2")
RULES = {
    "bert": MaskRule(window=9, global_tokens=1, block=16),
    "roberta": MaskRule(window=3, global_tokens=2, random_blocks=1, block=16),
    "llama": MaskRule(window=9, global_tokens=1, random_blocks=1, block=16),
    "gpt2": MaskRule(window=12, block=32),
}


def build(name: str, attention: str = "eager", **sizes: object) -> nn.Module:
    """A random model in eval mode whose attention is far from uniform."""
    config, defaults, task = MODELS[name]
    config = getattr(transformers, config)(**defaults | sizes | {"attn_implementation": attention})
    model = randomize(getattr(transformers, task).from_config(config)).eval()
    for parameter_name, parameter in model.named_parameters():
        if "c_attn.weight" in parameter_name:  # GPT-2's Conv1D
            nn.init.normal_(parameter, std=0.2)
    return model


def dense_keep(rule: MaskRule, causal: bool, length: int) -> torch.Tensor:
    """(length, length), True where a query attends."""
    return replace(rule, causal=causal)(length).to_dense()[0]


def inputs(left: bool = False) -> dict[str, torch.Tensor]:
    """Two sequences, the second 13 tokens shorter."""
    ids = torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    real = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 13])[:, None]
    real = real.flip(1) if left else real
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}


def additive(keep: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(B, 1, queries, keys) for eager attention, 0 where a query attends."""
    return torch.zeros(()).where(keep & real.bool()[:, None, None, :], torch.finfo(torch.float32).min)


def run(model: nn.Module, batch: dict[str, torch.Tensor], real: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits of the tokens that are real, and the gradients of all parameters."""
    logits = model(**batch).logits
    logits = logits[real.bool()] if logits.dim() == 3 else logits
    logits.square().sum().backward()
    return logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_are_those_of_the_dense_mask(name):
    dense, rule = build(name), RULES[name]
    sparse = use_block_sparse_attention_(copy.deepcopy(dense), rule)
    batch = inputs(left=name == "gpt2")
    real = batch["attention_mask"]
    batch["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    masked = batch | {"attention_mask": additive(dense_keep(rule, name in DECODERS, LENGTH), real)}
    assert not torch.allclose(dense(**batch).logits, sparse(**batch).logits, atol=1e-3)
    for got, expected in zip(run(sparse.train(), batch, real), run(dense.train(), masked, real), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(float(expected.abs().max()), 1))


@pytest.mark.parametrize("name", DECODERS)
def test_generation_repeats_the_whole_sequence(name):
    """Greedy, with a cache and padding on the left, against a dense model that sees the sequence anew at each step."""
    dense, rule = build(name), RULES[name]
    sparse = use_block_sparse_attention_(copy.deepcopy(dense), rule)
    batch = {key: value[:, :40] for key, value in inputs(left=True).items()}
    got = sparse.generate(**batch, max_new_tokens=6, do_sample=False)
    ids, real = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        mask = additive(dense_keep(rule, True, ids.shape[1]), real)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = dense(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=2)], dim=1)
        real = torch.nn.functional.pad(real, (0, 1), value=1)
    assert torch.equal(got, ids)


def test_one_mask_a_function_and_back():
    """A function and a BlockMask give what the rule gives; turned off, the model is what it was."""
    model, batch = build("llama", "sdpa"), inputs()
    shared = model.config
    before = model(**batch).logits
    expected = use_block_sparse_attention_(model, RULES["gpt2"])(**batch).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    assert shared._attn_implementation == "sdpa"
    window = MaskRule(window=12, block=32)
    for mask_of in (lambda queries, keys: window(queries, keys), window(LENGTH)):
        torch.testing.assert_close(use_block_sparse_attention_(model, mask_of)(**batch).logits, expected)
    with pytest.raises(ValueError, match="expected a mask of 20 queries x 20 keys, got"):
        model(input_ids=batch["input_ids"][:, :20])
    assert not hasattr(model.config, "block_sparse_attention")
    assert torch.equal(use_dense_attention_(model)(**batch).logits, before)
    with pytest.raises(ValueError, match="expected block-sparse attention in LlamaForCausalLM, got none"):
        use_dense_attention_(model)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_rule_is_saved(sparse, tmp_path):
    model, batch = use_block_sparse_attention_(build("bert"), RULES["bert"]), inputs()
    if sparse:
        prune_(model, Block(8, 1), sparsity=0.9)
        sparsenlp.sparsify_(finalize_(model), sparsenlp.SparsifyConfig(measure="off"))
    expected = model(**batch).logits
    sparsenlp.save_pretrained(model, tmp_path)
    torch.testing.assert_close(sparsenlp.from_pretrained(tmp_path)(**batch).logits, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_sparse_attention": {"width": 3}}))
    with pytest.raises(CheckpointError, match="block_sparse_attention: expected the fields of a MaskRule"):
        sparsenlp.from_pretrained(tmp_path)


def refused() -> dict[str, tuple[nn.Module, str]]:
    """Models whose attention cannot be replaced, and why."""
    t5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    with_decoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**t5))
    fused, mistral = build("bert"), {k: v for k, v in LLAMA.items() if k != "pad_token_id"}
    fuse_encoders_(fused)
    return {
        "t5": (transformers.T5EncoderModel(transformers.T5Config(**t5)), "scores without a position bias"),
        "t5 with decoder": (with_decoder, "self-attention alone"),
        "mpnet": (transformers.MPNetModel(transformers.MPNetConfig(**ENCODER)), "attention that can be replaced"),
        "mistral": (transformers.MistralModel(transformers.MistralConfig(**mistral)), "full attention"),
        "fused encoder": (fused, "layers that are not fused"),
        "fused decoder": (fuse_decoder_(build("llama")), "layers that are not fused"),
        "crossed": (build("gpt2", add_cross_attention=True), "self-attention alone, got cross-attention"),
    }


def test_models_that_are_refused_are_left_alone():
    for name, (model, reason) in refused().items():
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=f"use_block_sparse_attention_: expected {reason}"):
            use_block_sparse_attention_(model, MaskRule(window=4))
        assert model.config._attn_implementation == before, name
        assert not any(hasattr(module, "mask_of") for module in model.modules()), name
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        use_block_sparse_attention_(nn.Linear(2, 2), MaskRule(window=4))


def test_it_is_never_fused_away():
    bert, llama = (use_block_sparse_attention_(build(name), RULES[name]) for name in ("bert", "llama"))
    assert [row.reason for row in fuse_encoders_(bert).rows] == ["its attention is block-sparse"]
    with pytest.raises(ValueError, match="expected dense attention, got block-sparse attention"):
        fuse_decoder_(llama)


def test_what_a_forward_pass_refuses():
    bert, llama = (use_block_sparse_attention_(build(name), RULES[name]) for name in ("bert", "llama"))
    ids = inputs()["input_ids"]
    with pytest.raises(ValueError, match=r"expected an attention_mask \(batch, keys\), got shape \(2, 1, 50, 50\)"):
        bert(ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match="expected a dynamic cache"):
        llama.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="expected one sequence in a row"):
        llama(ids, position_ids=torch.arange(25).repeat(2, 2), use_cache=False)
    with pytest.warns(UserWarning, match="drops no probabilities"):
        use_block_sparse_attention_(build("bert", attention_probs_dropout_prob=0.1), RULES["bert"]).train()(ids)
