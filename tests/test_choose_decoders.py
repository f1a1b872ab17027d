from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

from sparsenlp import SparsifyConfig, choose_decoders, from_pretrained, native, save_pretrained, sparsify_  # noqa: E402
from sparsenlp.layers import SparseLinear  # noqa: E402
from sparsenlp.measure import Timing  # noqa: E402
from sparsenlp.models.decoders import (  # noqa: E402
    DecoderForward,
    conv1d_to_linear_,
    has_fused_decoder,
    unfuse_decoder_,
)
from sparsenlp.plan import SEPARATE  # noqa: E402
from sparsenlp.prune import Block, finalize_, prune_  # noqa: E402

pytestmark = pytest.mark.skipif(not native.available, reason="decoders are fused where the extension is built")
SIZES = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def llama():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(**SIZES, **sizes, tie_word_embeddings=True, max_position_embeddings=80)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(**SIZES, n_positions=40, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    return conv1d_to_linear_(transformers.GPT2LMHeadModel(config))


def pruned(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    prune_(model, Block(8, 1), 0.6)
    return finalize_(model)


@pytest.fixture
def clock(monkeypatch):
    times = {SEPARATE: 1.0, "fused": 0.5}

    def interleave(runs, *_, **__):
        for run in runs.values():
            for _ in range(50):  # more than there are positions: a cache must not grow
                run()
        return {name: Timing.of([times[name]] * 3) for name in runs}

    monkeypatch.setattr(choose_decoders, "interleave", interleave)
    return times


@pytest.mark.parametrize("make", [llama, gpt2])
def test_fused_where_that_is_faster(make, clock):
    model = pruned(make)
    with torch.no_grad():
        expected = model(IDS).logits
    config = SparsifyConfig(blocks=((8, 1),), measure="off", min_sparsity=0.1, fuse=False)
    sparsify_(model, config)
    rows = choose_decoders.choose_decoder_(model, SparsifyConfig(token_counts=(8, 4096), measure="time", seconds=0.0))
    (row,) = rows
    assert (row.chosen, row.layers, row.reason) == ("fused", 2, "2.00x faster")
    assert set(row.times["fused"]) == {1, 8}
    assert row.cosines["fused"] > 0.9999
    assert has_fused_decoder(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert choose_decoders.choose_decoder_(model, SparsifyConfig()) == ()


def test_not_fused_where_that_is_slower(clock):
    clock["fused"] = 1.01
    model = pruned(llama).train()
    plan = sparsify_(model, SparsifyConfig(token_counts=(8,), blocks=((8, 1),), measure="time", seconds=0.0))
    (row,) = plan.encoders
    assert (row.chosen, row.reason) == (SEPARATE, "fused layers are not faster")
    assert not has_fused_decoder(model)
    assert all(module.training for module in model.modules())


def test_a_wrong_result_leaves_the_model_as_it_was(clock, monkeypatch):
    model = pruned(llama)
    before = copy.deepcopy(model)
    call = DecoderForward.__call__

    def wrong(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        output.last_hidden_state = -output.last_hidden_state
        return output

    monkeypatch.setattr(DecoderForward, "__call__", wrong)
    with pytest.raises(RuntimeError, match="expected model fused to match its layers, got a cosine of -1"):
        sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="time", seconds=0.0))
    assert list(map(type, model.modules())) == list(map(type, before.modules()))
    assert not has_fused_decoder(model)


def test_what_cannot_be_fused_says_why():
    model = pruned(llama)
    model.config.hidden_act = model.model.config.hidden_act = "mish"
    (row,) = sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="off")).encoders
    assert row.chosen == SEPARATE
    assert "expected an activation among silu" in row.reason
    assert any(isinstance(module, SparseLinear) for module in model.modules())


def test_other_models_have_no_row():
    assert choose_decoders.choose_decoder_(nn.Sequential(nn.Linear(4, 4)), SparsifyConfig()) == ()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("fuse", [True, False])
def test_checkpoints_remember(make, fuse, tmp_path):
    model = pruned(make)
    sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="off", min_sparsity=0.1, fuse=fuse))
    with torch.no_grad():
        expected = model(IDS).logits
    save_pretrained(model, tmp_path)
    for loaded in (from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert has_fused_decoder(loaded) == fuse
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
            generated = loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
            wanted = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, wanted)
    unfuse_decoder_(loaded)
    save_pretrained(loaded, tmp_path / "again")
    assert not has_fused_decoder(from_pretrained(tmp_path / "again"))


def test_a_checkpoint_in_a_dtype_without_kernel_loads_with_a_warning(tmp_path):
    model = pruned(llama)
    sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="off", min_sparsity=0.1))
    save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="LlamaForCausalLM runs with separate layers: .*float16"):
        loaded = from_pretrained(tmp_path, dtype=torch.float16)
    assert not has_fused_decoder(loaded)
