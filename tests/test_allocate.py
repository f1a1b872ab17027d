from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from sparsenlp.allocate import (
    Allocation,
    LayerCosts,
    Option,
    Target,
    allocate,
    layer_targets,
    measured_losses,
    meet,
    options_for,
    removed_scores,
)
from sparsenlp.cost import CostModel, Fitted, Kind
from sparsenlp.prune import NM, Block, LayerTarget, Unstructured


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2x faster", "speedup", 2.0),
        ("1.5x", "speedup", 1.5),
        ("latency <= 8 ms", "latency", 0.008),
        ("latency<=250us", "latency", 0.00025),
        ("sparsity 0.85", "sparsity", 0.85),
        ("sparsity 85 %", "sparsity", 0.85),
        ("accuracy drop <= 1 point", "drop", 0.01),
        ("drop <= 0.5 points", "drop", 0.005),
    ],
)
def test_targets_are_read(text, kind, value):
    target = Target.parse(text)
    assert target.kind == kind
    assert target.value == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "2 faster", "latency 8 ms", "latency <= 8", "sparsity", "drop <= 1"])
def test_other_targets_are_refused(text):
    with pytest.raises(ValueError, match='target: expected "2x faster", "latency <= 8 ms"'):
        Target.parse(text)


@pytest.mark.parametrize("text", ["1x faster", "0.5x", "latency <= 0 ms", "sparsity 1", "sparsity 0", "sparsity 100 %"])
def test_targets_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="expected a speed-up above 1"):
        Target.parse(text)


def random_options(rng, layers, count):
    target = LayerTarget(Block(8, 1), 0.5)
    return {
        f"layer{i}": [Option(None, 0.0, 1.0), *(Option(target, rng.random(), rng.random()) for _ in range(count))]
        for i in range(layers)
    }


@pytest.mark.parametrize("seed", range(8))
def test_as_good_as_trying_every_combination(seed):
    rng = random.Random(seed)
    options = random_options(rng, layers=4, count=4)
    budget = 4 * rng.uniform(0.3, 0.9)
    combinations = [c for c in itertools.product(*options.values()) if sum(o.cost for o in c) <= budget]
    if not combinations:
        with pytest.raises(ValueError, match="expected a budget of at least"):
            allocate(options, budget)
        return
    found = allocate(options, budget)
    assert list(found.options) == list(options)
    assert found.cost <= budget
    assert found.loss <= min(sum(o.loss for o in c) for c in combinations) + 1e-3
    assert all(found.options[name] in choices for name, choices in options.items())


def test_everything_stays_dense_with_budget_for_it():
    options = random_options(random.Random(0), layers=3, count=3)
    found = allocate(options, 3.0)
    assert found.targets == {}
    assert "dense" in str(found)


def test_a_budget_at_the_least_cost_is_met_in_spite_of_rounding():
    target = LayerTarget(Block(1, 1), 0.5)
    options = {f"layer{i}": [Option(target, 1.0, 1 / 3), Option(None, 0.0, 1.0)] for i in range(3)}
    assert allocate(options, 1.0).cost == pytest.approx(1.0)


def test_a_budget_below_the_least_says_what_that_is():
    options = {"layer": [Option(None, 0.0, 1.0), Option(LayerTarget(Block(8, 1), 0.9), 1.0, 0.25)]}
    with pytest.raises(ValueError, match=r"expected a budget of at least 0.25, the least that can be, got 0.2"):
        allocate(options, 0.2)
    with pytest.raises(ValueError, match="expected an option for every layer"):
        allocate({"layer": []}, 1.0)


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


def fixed(loss):
    return Allocation({"layer": Option(LayerTarget(Block(8, 1), 0.5), loss, 1.0)})


def test_meeting_a_target_that_the_prediction_misses():
    trials = []

    def build(budget):
        trials.append(budget)
        return fixed(loss=1 / budget)

    best, cost = meet(build, lambda allocation: 0.3 + 1.5 / allocation.loss, wanted=1.0, first=0.8)
    assert cost <= 1.0
    assert best.loss < 2.5
    assert trials[0] == 0.8


def test_a_target_that_cannot_be_met_says_the_best():
    with pytest.raises(ValueError, match=r"target: expected at most 1, the best in 3 trials was 1.5"):
        meet(lambda budget: fixed(1.0), lambda allocation: 1.5, wanted=1.0, first=1.0, trials=3)
    with pytest.raises(ValueError, match="expected one that can be met; allocate: expected a budget of at least"):
        meet(lambda budget: allocate({"layer": [Option(None, 0.0, 1.0)]}, 0.5), lambda a: 1.0, 1.0, 1.0)
