from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_encoders import IDS, MASK, TEXT, build
from torch import nn

from sparsenlp import SparsifyConfig, choose_encoders, sparsify_
from sparsenlp.layers import FusedEmbeddings, SparseEncoder
from sparsenlp.measure import Timing
from sparsenlp.plan import SEPARATE

TIMES = {SEPARATE: 1.0, "fused": 0.5, "fused in bfloat16": 0.4, "fused in int8": 0.3}


def pruned():
    """A tiny BERT with 80 % zeros in blocks of 8x4."""
    torch.manual_seed(0)
    model = build(TEXT["bert"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer." in name:
            keep = torch.rand(module.out_features // 8, module.in_features // 4) < 0.2
            with torch.no_grad():
                module.weight.mul_(keep.repeat_interleave(8, 0).repeat_interleave(4, 1))
    return model


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each option takes; separate linears always win against dense ones."""
    times = dict(TIMES)

    def interleave(runs, *_, **__):
        for run in runs.values():
            run()
        return {name: Timing.of([times[name]] * 3) for name in runs}

    monkeypatch.setattr(choose_encoders, "interleave", interleave)
    return times


def convert(model, **options):
    config = SparsifyConfig(token_counts=(16,), blocks=((8, 4),), measure="time", seconds=0.0, **options)
    return sparsify_(model, config)


def encoder(model):
    return next((module for module in model.modules() if isinstance(module, SparseEncoder)), None)


@pytest.mark.parametrize(
    ("precisions", "changes", "chosen"),
    [
        ((), {}, "fused"),
        (("bfloat16", "int8"), {}, "fused in int8"),
        (("bfloat16", "int8"), {"fused in int8": 0.45}, "fused in bfloat16"),
        (("bfloat16",), {"fused in bfloat16": 0.51}, "fused"),
        ((), {"fused": 1.1}, SEPARATE),
    ],
)
def test_the_fastest_allowed_one_runs(clock, precisions, changes, chosen):
    clock.update(changes)
    model = pruned()
    plan = convert(model, precisions=precisions)
    (row,) = plan.encoders
    assert row.chosen == chosen
    assert set(row.times) == {SEPARATE, "fused", *(f"fused in {precision}" for precision in precisions)}
    assert row.speedup == pytest.approx(clock[SEPARATE] / clock[chosen])
    assert all(0.99 < cosine <= 1 + 1e-9 for cosine in row.cosines.values())
    fused = encoder(model)
    assert (fused is None) == (chosen == SEPARATE)
    if fused is not None:
        assert fused.precision == (None if chosen == "fused" else chosen.removeprefix("fused in "))
        assert any(isinstance(module, FusedEmbeddings) for module in model.modules())
    assert row.chosen in str(plan)
    assert json.loads(json.dumps(plan.as_dict()))["encoders"][0]["chosen"] == chosen


def test_a_lower_precision_must_be_clearly_faster(clock):
    model = pruned()
    config = SparsifyConfig(token_counts=(16,), blocks=((8, 4),), measure="off", precisions=("bfloat16", "int8"))
    clock["fused in bfloat16"] = 0.49
    clock["fused in int8"] = 0.48
    sparsify_(model, SparsifyConfig(measure="off", fuse=False, blocks=((8, 4),)))
    (row,) = choose_encoders.choose_encoders_(model, SparsifyConfig(**{**vars(config), "measure": "time"}))
    assert row.chosen == "fused"


def test_without_measuring_encoders_are_fused():
    model = pruned()
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    (row,) = sparsify_(model, SparsifyConfig(measure="off")).encoders
    assert (row.chosen, row.reason) == ("fused", "not measured")
    with torch.no_grad():
        got = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(got[MASK.bool()], expected[MASK.bool()], rtol=2e-5, atol=2e-5)


def test_modes_of_modules_stay(clock):
    model = pruned().train()
    model.encoder.layer[1].output.dropout.eval()
    before = {name: module.training for name, module in model.named_modules()}
    convert(model)
    assert encoder(model) is not None
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_wrong_result_leaves_the_model_as_it_was(clock, monkeypatch):
    model = pruned()
    before = copy.deepcopy(model)
    monkeypatch.setattr(SparseEncoder, "run", lambda self, x, mask: -x)
    with pytest.raises(RuntimeError, match=r"expected encoder fused to match its layers, got a cosine of -?0"):
        convert(model)
    assert list(map(type, model.modules())) == list(map(type, before.modules()))
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_change_of_the_output_is_reported(clock):
    model = pruned()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}
    plan = convert(model, precisions=("int8",), inputs=inputs, evaluate=lambda m: float(encoder(m) is not None))
    assert 0.99 < plan.change.cosine < 1
    assert 0 < plan.change.max_error < 0.2
    assert (plan.change.before, plan.change.after) == (0.0, 1.0)
    assert "output on the given inputs: cosine 0.99" in str(plan)
    assert convert(pruned()).change is None


def test_unknown_precision():
    with pytest.raises(ValueError, match="SparsifyConfig: expected precisions among float32, bfloat16, int8"):
        SparsifyConfig(precisions=("int4",))
