from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsenlp.allocation import layer_targets, measured_losses, removed_scores
from sparsenlp.prune import NM, Block, LayerTarget, Unstructured


def test_only_patterns_that_fit_are_offered():
    offered = layer_targets((12, 16), [Block(8, 1), Block(4, 1), NM(2, 4), Unstructured()], (0.5, 0.9))
    assert [(str(t.pattern), t.sparsity) for t in offered] == [
        ("4x1", 0.5),
        ("4x1", 0.9),
        ("2:4", 0.5),
        ("unstructured", 0.5),
        ("unstructured", 0.9),
    ]


def test_removed_scores_by_hand():
    scores = {"layer": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    targets = {"layer": [LayerTarget(Unstructured(), 0.5), LayerTarget(Block(1, 2), 0.5)]}
    assert removed_scores(scores, targets) == {"layer": [3.0, 3.0]}


def test_measured_losses_prune_one_layer_at_a_time_and_put_it_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    before = [layer.weight.clone() for layer in model]
    x = torch.randn(16, 8)
    expected = model(x).detach()
    layers = {"0": model[0], "1": model[1]}
    scores = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    targets = {name: [LayerTarget(Unstructured(), s) for s in (0.25, 0.75)] for name in layers}

    def loss(m):
        changed = sum(not torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))
        assert changed <= 1
        return float((m(x) - expected).square().mean())

    losses = measured_losses(model, layers, scores, targets, loss)
    for name in layers:
        assert 0 < losses[name][0] < losses[name][1]
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))
    calls = iter([0.0, float("nan")])
    with pytest.raises(FloatingPointError, match=r"expected a finite loss of 0 at unstructured 25.0%, got nan"):
        measured_losses(model, layers, scores, targets, lambda m: next(calls))
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))
