"""sparsify_ on models with recurrent layers: what is chosen, by a clock that the tests set, and what stays."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_rnn import tiny_rnn
from torch import nn

from sparsenlp import SparseGRU, SparseLinear, SparseLSTM, SparsifyConfig, choose_composites, sparsify_
from sparsenlp.measure import Timing
from sparsenlp.prune import Block, finalize_, prune_
from sparsenlp.report import report

IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
BY_PATTERN = SparsifyConfig(measure="off")
TIMED = SparsifyConfig(blocks=((8, 1), (4, 1)), measure="time", precisions=("int8",), token_counts=(8,))


def run(model):
    with torch.no_grad():
        return model(IDS, MASK).logits


@pytest.fixture
def clock(monkeypatch):
    """{name of a run: seconds}, others 1.0."""
    times = {}

    def fake(runs, seconds, warm=False):
        for function in runs.values():
            function()
        return {name: Timing.of([times.get(name, 1.0)] * 5) for name in runs}

    monkeypatch.setattr(choose_composites, "interleave", fake)
    return times


@pytest.mark.parametrize(("cell", "kind"), [("LSTM", SparseLSTM), ("GRU", SparseGRU)])
@pytest.mark.parametrize("masked", [True, False])
def test_a_pruned_layer_becomes_sparse_as_a_whole(cell, kind, masked):
    model = tiny_rnn(cell=cell)
    prune_(model, Block(8, 1), 0.75)
    if not masked:
        finalize_(model)
        assert type(model.rnn) is getattr(nn, cell)
    expected = run(model)
    plan = sparsify_(model, BY_PATTERN)
    (row,) = plan.composites
    assert plan.converted == ("rnn",)
    assert (row.kind, row.block, row.stored_density) == (cell, (8, 1), pytest.approx(0.25))
    assert type(model.rnn) is kind
    assert all(isinstance(matrix, SparseLinear) for matrix in model.rnn.matrices.values())
    torch.testing.assert_close(run(model), expected)
    assert {layer.kind for layer in report(model).layers if layer.name.startswith("rnn")} == {"8x1"}
    assert not hasattr(next(iter(model.rnn.matrices.values())), "parametrizations")


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"8x1": 0.5, "4x1": 0.6, "8x1 int8": 0.49, "4x1 int8": 0.55}, "8x1"),
        ({"8x1": 0.7, "4x1": 0.6, "8x1 int8": 0.3}, "8x1 int8"),
        ({"8x1": 0.97}, "dense"),
    ],
)
def test_the_fastest_is_chosen_and_int8_must_be_worth_it(clock, times, chosen):
    model = tiny_rnn(hidden_size=8)
    prune_(model, Block(4, 1), 0.8)
    before = run(finalize_(model))
    clock.update(times)
    plan = sparsify_(model, TIMED)
    (row,) = plan.composites
    assert row.chosen == chosen
    assert set(row.times) == {"dense", "8x1", "4x1", "8x1 int8", "4x1 int8"}
    assert min(row.cosines[name] for name in ("8x1", "4x1")) > 0.99999
    assert min(row.cosines.values()) > 0.98
    if chosen == "dense":
        assert type(model.rnn) is nn.LSTM
        assert torch.equal(run(model), before)
        assert row.reason == "best sparse (8x1) only 1.03x"
    else:
        assert {m.scales is not None for m in model.rnn.matrices.values()} == {"int8" in chosen}
        torch.testing.assert_close(run(model), before, rtol=0.1, atol=0.05)
    assert chosen in str(plan)
    assert json.loads(json.dumps(plan.as_dict()))["composites"][0]["chosen"] == chosen


def test_one_slower_length_is_enough_to_stay_dense(clock, monkeypatch):
    model = finalize_(_pruned())
    lengths = iter((0.1, 1.01))

    def fake(runs, seconds, warm=False):
        seconds = next(lengths)
        return {name: Timing.of([1.0 if name == "dense" else seconds] * 5) for name in runs}

    monkeypatch.setattr(choose_composites, "interleave", fake)
    (row,) = sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="time", token_counts=(4, 130))).composites
    assert row.block is None
    assert row.reason.endswith("but not beyond the noise")


def _pruned(**options):
    model = tiny_rnn(**options)
    prune_(model, Block(8, 1), 0.75)
    return model


def test_a_wrong_result_stops_the_conversion_with_nothing_changed(clock, monkeypatch):
    model = finalize_(_pruned())
    before = list(model.modules())
    monkeypatch.setattr(choose_composites, "LEAST_COSINE", 1.1)
    with pytest.raises(RuntimeError, match="expected rnn as 8x1 to match dense, got a cosine of"):
        sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="time", token_counts=(4,)))
    assert list(model.modules()) == before


def test_what_cannot_be_sparse_says_why():
    model = nn.ModuleDict({"a": nn.LSTM(16, 16), "b": nn.LSTM(16, 16), "c": nn.GRU(16, 16), "d": nn.GRU(16, 16)})
    prune_(model, Block(8, 1), 0.75, filter_fn=lambda module, name: not name.startswith("d"))
    finalize_(model)
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    plan = sparsify_(model, BY_PATTERN)
    assert {row.name: row.reason for row in plan.composites} == {
        "a": "weight is shared with another module",
        "b": "weight is shared with another module",
        "c": "by pattern, not measured",
        "d": "fewer than 30% zeros",
    }
    assert plan.converted == ("c",)
    with pytest.raises(ValueError, match=r"expected a layer with at least 30% zeros, got at most 0\.0%"):
        sparsify_(nn.ModuleList([nn.LSTM(8, 8)]), BY_PATTERN)
    with pytest.raises(ValueError, match="expected filter_fn to accept a layer, got none of 1"):
        sparsify_(finalize_(_pruned()), BY_PATTERN, lambda module, name: False)
