from __future__ import annotations

import pytest
import torch

from sparsenlp.allocation import LayerCosts, allocate, layer_targets, options_for
from sparsenlp.cost import CostModel, Fitted, Kind
from sparsenlp.prune import NM, Block, LayerTarget, Unstructured


class PerValue:
    """A law of so many seconds for each stored value and token."""

    def __init__(self, seconds):
        self.seconds = seconds

    def predict(self, work):
        return self.seconds * work.stored * work.tokens


def costs():
    fitted = {
        Kind("float32"): Fitted(PerValue(1e-6), (0.0,)),
        Kind("float32", (8, 1)): Fitted(PerValue(2e-6), (0.0,)),
        Kind("float32", (1, 1)): Fitted(PerValue(8e-6), (0.0,)),
    }
    shapes = {"small": (8, 8), "large": (8, 24)}
    return LayerCosts(CostModel(1, fitted), shapes, torch.float32, (1, 128), ((8, 1), (1, 1)))


def test_costs_are_shares_of_the_dense_layers():
    model = costs()
    assert model.dense("small") == pytest.approx(0.25)
    assert model.dense("large") == pytest.approx(0.75)
    assert model.pruned("large", LayerTarget(Block(8, 1), 0.75)) == pytest.approx(0.375)
    assert model.pruned("large", LayerTarget(Block(8, 1), 0.25)) == pytest.approx(0.75), "as fast as dense"
    assert model.pruned("large", LayerTarget(Unstructured(), 0.96)) == pytest.approx(0.25, rel=0.05)
    assert model.pruned("large", LayerTarget(NM(2, 4), 0.5)) == pytest.approx(0.75)


def test_a_sensitive_layer_stays_denser():
    model = costs()
    targets = {name: layer_targets(shape, [Block(8, 1)], (0.6, 0.75, 0.875)) for name, shape in model.shapes.items()}
    losses = {"small": [1.0, 2.0, 30.0], "large": [10.0, 20.0, 30.0]}
    options = options_for(targets, losses, model.dense, model.pruned)
    assert len(options["small"]) == 4
    found = allocate(options, 0.7)
    assert found.options["small"].target is None
    assert found.options["large"].target.sparsity == 0.75
