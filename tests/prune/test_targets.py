from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsenlp.prune import NM, Block, LayerTarget, Unstructured, layer_sparsity, prune_, prune_layers_


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8))


def test_each_layer_gets_its_own(model):
    targets = {"0": LayerTarget(Block(8, 1), 0.75), "2": LayerTarget(NM(2, 4), 0.5)}
    assert prune_layers_(model, targets) == {"0": 0.75, "2": 0.5}
    assert layer_sparsity(model, lambda module, name: True) == {"0": 0.75, "2": 0.5, "3": 0.0}
    alone = copy.deepcopy(model)
    tightened = {"0": LayerTarget(Block(8, 1), 0.875), "2": LayerTarget(NM(2, 4), 0.5)}
    assert prune_layers_(model, tightened)["0"] == 0.875
    kept = model[0].weight != 0
    assert torch.equal(kept & (alone[0].weight == 0), torch.zeros_like(kept))


def test_the_same_as_prune_where_all_are_alike(model):
    other = copy.deepcopy(model)
    prune_(other, Unstructured(), 0.6, filter_fn=lambda module, name: True)
    prune_layers_(model, dict.fromkeys(("0", "2", "3"), LayerTarget(Unstructured(), 0.6)))
    for mine, its in zip(model, other, strict=True):
        if isinstance(mine, nn.Linear):
            assert torch.equal(mine.weight, its.weight)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "expected a target for some layer"),
        ({"1": LayerTarget(Block(8, 1), 0.5)}, "expected 1 to be an nn.Linear, got ReLU"),
        ({"7": LayerTarget(Block(8, 1), 0.5)}, "expected 7 to be an nn.Linear, got no such module"),
        (
            {"0": LayerTarget(Block(8, 1), 0.5), "3": LayerTarget(Block(16, 1), 0.5)},
            "3: 16x1: expected a shape divisible",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(model, targets, message):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        prune_layers_(model, targets)
    assert list(map(type, model.modules())) == list(map(type, before.modules()))


def test_layers_that_share_a_weight_need_one_target():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    same = LayerTarget(Block(8, 1), 0.5)
    with pytest.raises(ValueError, match=r"expected one target for 0 and 1, which share a weight, got 8x1 50.0% and"):
        prune_layers_(model, {"0": same, "1": LayerTarget(Block(8, 1), 0.25)})
    prune_layers_(model, {"0": same, "1": same})
    assert torch.equal(model[0].weight, model[1].weight)


def test_a_sparsity_that_the_pattern_cannot_have():
    with pytest.raises(ValueError, match=r"expected at most 0.5 for 2:4, got 0.6"):
        LayerTarget(NM(2, 4), 0.6)
