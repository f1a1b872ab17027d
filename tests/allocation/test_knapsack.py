from __future__ import annotations

import itertools
import random

import pytest

from sparsenlp.allocation import Allocation, Option, allocate, meet
from sparsenlp.prune import Block, LayerTarget


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
