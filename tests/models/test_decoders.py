from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import smollm2
import torch
from torch import nn

pytest.importorskip("transformers", reason="the models come from transformers")

from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from sparsenlp import SparseLinear, SparsifyConfig, sparsify_
from sparsenlp.models import decoders
from sparsenlp.models.decoders import conv1d_to_linear_, fuse_decoder_, unfuse_decoder_
from sparsenlp.models.kv_cache import StoredLayer
from sparsenlp.prune import Block, finalize_, prune_

pytestmark = pytest.mark.usefixtures("needs_native")

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None}
LLAMA_SIZES = SIZES | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=True)),
    "llama-scaled-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA_SIZES,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu_pytorch_tanh",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA_SIZES, head_dim=16, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_SIZES)),
    "gpt2": lambda: conv1d_to_linear_(
        GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=48, n_layer=3, n_head=4, n_inner=64, bos_token_id=1))
    ),
}


def pruned(family="llama", seed=0):
    """A random model, its layers 60 % zeros."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2  # so that attention is far from uniform
    prune_(model, Block(8, 1), 0.6)
    return finalize_(model)


def fused(dense, blocks=((8, 1),)):
    model = copy.deepcopy(dense)
    sparsify_(model, SparsifyConfig(measure="off", blocks=blocks, min_sparsity=0.1))
    return fuse_decoder_(model)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(masked dense model, the same converted and fused)."""
    dense = pruned(request.param)
    return dense, fused(dense)


@pytest.fixture(scope="module")
def llama():
    dense = pruned()
    return dense, fused(dense)


@pytest.fixture
def runs(monkeypatch):
    """How many forwards were fused, and how many fell back."""
    counts = Counter(fused=0, original=0)
    fast = decoders.DecoderForward._fused

    def counted(self, **kwargs):
        output = fast(self, **kwargs)
        counts["original" if output is None else "fused"] += 1
        return output

    monkeypatch.setattr(decoders.DecoderForward, "_fused", counted)
    return counts


def tokens(batch, length, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch, length):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, :row] = 0
        ids[row, :row] = 0
    return ids, mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 20)])
def test_logits(pair, batch, length, runs):
    dense, model = pair
    ids = tokens(batch, length)
    got, expected = model(ids), dense(ids)
    close(got.logits, expected.logits)
    assert type(got) is type(expected)
    assert runs == {"fused": 1, "original": 0}


@torch.no_grad()
def test_decoding_step_by_step_with_left_padding(pair, runs):
    dense, model = pair
    ids, mask = left_padded(3, 9)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = dense(ids, attention_mask=mask, position_ids=positions).logits
    out = model(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])
    close(out.logits[mask[:, :5] == 1], whole[:, :5][mask[:, :5] == 1])
    for t in range(5, 9):
        step = slice(t, t + 1)
        cache, seen = out.past_key_values, mask[:, : t + 1]
        out = model(ids[:, step], past_key_values=cache, attention_mask=seen, position_ids=positions[:, step])
        close(out.logits, whole[:, step])
    assert runs == {"fused": 5, "original": 0}
    assert out.past_key_values.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({}, 70),
        ({"num_beams": 3}, 10),
        ({"do_sample": True, "top_k": 20}, 10),
        ({"num_beams": 2, "num_return_sequences": 2}, 10),
        ({"use_cache": False}, 10),
    ],
    ids=str,
)
def test_generate(pair, options, new, runs):
    dense, model = pair
    ids, mask = left_padded(2, 6)
    results = []
    for m in (dense, model):
        torch.manual_seed(1)
        results.append(m.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options))
    assert torch.equal(*results)
    assert runs == {"fused": new, "original": 0}


@torch.no_grad()
def test_cache_grows_and_serves_both_paths(llama, runs):
    dense, model = llama
    ids = tokens(2, 120)
    whole = dense(ids).logits
    cache = DynamicCache()
    position, logits = 0, []
    for size, disturb in ((3, False), (60, True), (1, False), (2, True), (30, False), (24, False)):
        remove = model.model.layers[1].mlp.register_forward_hook(lambda *_: None).remove if disturb else lambda: None
        logits.append(model(ids[:, position : position + size], past_key_values=cache).logits)
        remove()
        position += size
    close(torch.cat(logits, dim=1), whole)
    assert runs == {"fused": 4, "original": 2}
    keys = cache.layers[2].keys
    assert keys.shape == (2, 2, 120, 12)
    reference = dense(ids, past_key_values=DynamicCache()).past_key_values
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        assert isinstance(ours, StoredLayer)
        close(ours.keys, theirs.keys)
        close(ours.values, theirs.values)


@torch.no_grad()
def test_cropped_reordered_selected_and_copied_caches(llama, runs):
    dense, model = llama
    ids = tokens(3, 12)
    caches = [m(ids[:, :10]).past_key_values for m in (dense, model)]
    fork = copy.deepcopy(caches[1])
    for change in (
        lambda c: c.crop(-2),
        lambda c: c.reorder_cache(torch.tensor([2, 0, 0])),
        lambda c: c.batch_select_indices(torch.tensor([0, 2])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.reset(),
    ):
        for cache in caches:
            change(cache)
        rows = caches[0].layers[0].keys.shape[0] if caches[0].get_seq_length() else 3
        step = tokens(rows, 2, seed=rows)
        expected, got = (m(step, past_key_values=c).logits for m, c in zip((dense, model), caches, strict=True))
        close(got, expected)
    close(model(ids[:, 10:], past_key_values=fork).logits, dense(ids).logits[:, 10:])
    assert runs["original"] == 0


@torch.no_grad()
def test_embeddings_instead_of_tokens(pair):
    dense, model = pair
    embeddings = dense.get_input_embeddings()(tokens(2, 5))
    close(model(inputs_embeds=embeddings).logits, dense(inputs_embeds=embeddings).logits)


def test_gradients_and_training_fall_back(llama, runs):
    dense, model = (copy.deepcopy(m) for m in llama)
    ids = tokens(2, 5)
    losses = [m(ids, labels=ids).loss for m in (dense, model)]
    close(*losses)
    for loss in losses:
        loss.backward()
    close(model.model.norm.weight.grad, dense.model.norm.weight.grad)
    close(model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad)
    with torch.no_grad():
        model.train()(ids)
    assert runs == {"fused": 0, "original": 2}


@torch.no_grad()
def test_what_is_not_understood_falls_back(llama, runs):
    dense, model = (copy.deepcopy(m) for m in llama)
    ids = tokens(1, 5)
    got, expected = (m(ids, output_hidden_states=True, output_attentions=False) for m in (model, dense))
    assert len(got.hidden_states) == len(expected.hidden_states) == 4
    close(got.hidden_states[-1], expected.hidden_states[-1])
    four = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    close(model(ids, attention_mask=four).logits, dense(ids).logits)
    long = tokens(3, 100)
    close(model(long).logits, dense(long).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).logits.dtype == torch.bfloat16
    assert runs == {"fused": 0, "original": 4}
    close(model(ids).logits, dense(ids).logits)
    assert runs.pop("fused") == 1, "the hooks that transformers leaves behind are idle"
    seen = []
    with model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1)):
        close(model(ids).logits, dense(ids).logits)
    assert seen == [1]
    assert "fused" not in runs
    static = model.generate(ids, max_new_tokens=4, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dense.generate(ids, max_new_tokens=4))
    assert "fused" not in runs


@torch.no_grad()
def test_changes_to_the_model_are_seen(llama, runs):
    dense, model = (copy.deepcopy(m) for m in llama)
    ids = tokens(1, 5)
    for m in (dense, model):
        m(ids)
        m.model.layers[0].input_layernorm.weight.mul_(2)
        m.model.layers[1].mlp.down_proj.register_parameter("bias", nn.Parameter(torch.ones(48)))
    close(model(ids).logits, dense(ids).logits)
    model.model.layers[2].self_attn.o_proj = copy.deepcopy(dense.model.layers[2].self_attn.o_proj)
    dense.model.layers[2].self_attn.o_proj.weight.mul_(3)
    assert not torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    model.model.layers[2].self_attn.o_proj.weight.mul_(3)
    close(model(ids).logits, dense(ids).logits)
    assert runs == {"fused": 4, "original": 0}
    prune_(model, Block(8, 1), 0.5, filter_fn=lambda _, name: name.endswith("layers.2.self_attn.o_proj"))
    model(ids)
    assert runs["original"] == 1, "a masked layer runs as before"


@torch.no_grad()
def test_edits_through_data_are_seen(pair):
    dense, model = (copy.deepcopy(m) for m in pair)
    ids = tokens(1, 5)
    model(ids)
    for m in (dense, model):
        for parameter in m.parameters():
            parameter.data.mul_(1.5)
        rope = getattr(m.base_model, "rotary_emb", None)
        if rope is not None:
            rope.inv_freq.data.mul_(0.5)
    close(model(ids).logits, dense(ids).logits)


WINDOWED = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA_SIZES, head_dim=16, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**LLAMA_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "qwen2-layer-types": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **LLAMA_SIZES,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        )
    ),
}


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request):
    torch.manual_seed(0)
    dense = WINDOWED[request.param]().eval()
    for parameter in dense.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    return dense, fuse_decoder_(copy.deepcopy(dense))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("length", "fused"), [(3, 1), (8, 1), (9, 0), (20, 0)])
def test_sliding_windows(windowed, length, fused, use_cache, runs):
    dense, model = windowed
    ids = tokens(2, length)
    close(model(ids, use_cache=use_cache).logits, dense(ids, use_cache=use_cache).logits)
    assert runs == {"fused": fused, "original": 1 - fused}


@torch.no_grad()
@pytest.mark.parametrize("cache", ["own", "sliding", "plain"])
@pytest.mark.parametrize("steps", [(3, 1, 1, 1, 1, 1, 1, 1, 3), (7, 1, 1, 1), (8, 2, 1), (5, 4, 1), (9, 1)])
def test_steps_through_a_sliding_window(windowed, steps, cache, runs):
    """Fused as long as all tokens are within it, then the original on what the cache holds."""
    dense, model = windowed
    ids, mask = left_padded(2, sum(steps))
    caches = [
        {"own": None, "sliding": DynamicCache(config=m.config), "plain": DynamicCache()}[cache] for m in (dense, model)
    ]
    position = 0
    for size in steps:
        step, seen = ids[:, position : position + size], mask[:, : position + size]
        out = [m(step, past_key_values=c, attention_mask=seen) for m, c in zip((dense, model), caches, strict=True)]
        real = mask[:, position : position + size] == 1
        close(out[1].logits[real], out[0].logits[real])
        caches = [o.past_key_values for o in out]
        position += size
        assert caches[1].get_seq_length() == position
        for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
            assert ours.keys.shape == theirs.keys.shape
            assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    sizes = [sum(steps[: i + 1]) <= 8 for i in range(len(steps))]
    assert runs == {"fused": sum(sizes), "original": len(steps) - sum(sizes)}


@torch.no_grad()
def test_windows_that_no_token_leaves_are_generated_fused(runs):
    torch.manual_seed(0)
    dense = MistralForCausalLM(MistralConfig(**LLAMA_SIZES, head_dim=16)).eval()  # with its window of 4096
    model = fuse_decoder_(copy.deepcopy(dense))
    ids, mask = left_padded(2, 6)
    for options in ({}, {"num_beams": 2}):
        both = [m.generate(ids, attention_mask=mask, max_new_tokens=8, **options) for m in (dense, model)]
        assert torch.equal(*both)
    assert runs == {"fused": 16, "original": 0}


@torch.no_grad()
def test_generating_past_a_sliding_window(windowed, runs):
    dense, model = windowed
    ids = tokens(2, 4)
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(*(m.generate(ids, max_new_tokens=8, **options) for m in (dense, model)))
    assert runs == {"fused": 10, "original": 6}


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_fused_and_independent(llama, copied, runs):
    _, model = llama
    ids = tokens(1, 5)
    expected = model(ids).logits
    other = copied(model)
    assert torch.equal(other(ids).logits, expected)
    other.model.norm.weight.zero_()
    assert not other(ids).logits.any()
    assert torch.equal(model(ids).logits, expected)
    assert runs == {"fused": 4, "original": 0}


@torch.no_grad()
def test_half_precision(pair):
    dense, model = (copy.deepcopy(m).bfloat16() for m in pair)
    ids = tokens(2, 9)
    got, half, exact = model(ids).logits.float(), dense(ids).logits.float(), pair[0](ids).logits
    assert nn.functional.cosine_similarity(got.flatten(), exact.flatten(), dim=0) > 0.999
    assert (got - exact).abs().mean() < 1.2 * (half - exact).abs().mean()


@torch.no_grad()
def test_int8_weights(llama):
    dense, model = llama
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseLinear):
                setattr(parent, name, child.quantize())
    ids = tokens(2, 9)
    got, expected = model(ids).logits, dense(ids).logits
    assert nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.995


def test_state_dict_does_not_change(pair):
    _, model = pair
    unfused = unfuse_decoder_(copy.deepcopy(model))
    assert model.state_dict().keys() == unfused.state_dict().keys()
    assert all(torch.equal(a, unfused.state_dict()[name]) for name, a in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in unfused.modules())


def test_pruning_names_the_way_to_conv1d():
    with pytest.raises(
        ValueError, match=r"none of 1 \(lm_head, ...\); not considered: .* models.decoders.conv1d_to_linear_"
    ):
        prune_(GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=48, n_layer=1, n_head=4, bos_token_id=1)), Block(8, 1), 0.5)


def test_conv1d_keeps_the_layout_of_the_state_dict():
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=48, n_layer=2, n_head=4)).eval()
    model = conv1d_to_linear_(copy.deepcopy(original))
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    ids = tokens(2, 5)
    with torch.no_grad():
        close(model(ids).logits, original(ids).logits)
        other = conv1d_to_linear_(GPT2LMHeadModel(original.config)).eval()
        other.load_state_dict(original.state_dict())
        close(other(ids).logits, original(ids).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "expected a model of llama, mistral, qwen2, gpt2, got Linear"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=48, n_layer=1, n_head=4)),
            "expected an nn.Linear or SparseLinear without an activation, got Conv1D",
        ),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES, hidden_act="tanh")),
            "expected an activation among .* got 'tanh'",
        ),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(**LLAMA_SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
            ),
            "expected rope_type among .* got 'dynamic'",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        fuse_decoder_(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_smollm2(runs):
    if reason := smollm2.why_missing():
        pytest.skip(reason)
    dense = smollm2.load()
    prune_(dense, Block(16, 1), 0.5)
    finalize_(dense)
    model = fused(dense, blocks=((16, 1),))
    ids = torch.randint(0, 49152, (2, 40), generator=torch.Generator().manual_seed(0))
    got, expected = model(ids).logits, dense(ids).logits
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    assert runs == {"fused": 21, "original": 0}
