from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsenlp import native
from sparsenlp.allocation import allocate_to_target
from sparsenlp.allocation import model as module
from sparsenlp.cost import CostModel, Fitted, Kind
from sparsenlp.measure import Timing
from sparsenlp.prune import Block, finalize_, prunable, prune_layers_, sparsity_of


class PerValue:
    def __init__(self, seconds):
        self.seconds = seconds

    def predict(self, work):
        return self.seconds * work.stored * work.tokens


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def model():
    return Takes().eval()


@pytest.fixture
def clock(monkeypatch):
    """Times that follow the zeros of the model which was pruned, and half of the dense time which nothing changes."""
    kinds = [Kind("float32"), *(Kind("float32", block) for block in module.DEFAULT_BLOCKS)]
    fitted = {kind: Fitted(PerValue(1e-6), (0.0,)) for kind in kinds}
    monkeypatch.setattr(module, "calibrated", lambda kinds, threads: CostModel(threads, fitted))
    pruned = []

    def keep(twin, config):
        pruned.append(twin)

    def interleave(runs, seconds):
        for run in runs.values():
            run()
        kept = 1 - sparsity_of(pruned[-1]) if pruned else 1.0
        times = {"dense": 0.010, "pruned": 0.010 * (0.2 + 0.8 * kept)}
        return {name: Timing.of([times[name]] * 3) for name in runs}

    monkeypatch.setattr(module, "sparsify_", keep)
    monkeypatch.setattr(module, "interleave", interleave)
    return pruned


INPUTS = {"x": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))}


def after(model, allocation):
    twin = copy.deepcopy(model)
    prune_layers_(twin, allocation.targets)
    return sparsity_of(finalize_(twin))


def test_a_sparsity(model):
    before = copy.deepcopy(model.state_dict())
    allocation = allocate_to_target(model, "sparsity 0.8", INPUTS)
    assert after(model, allocation) == pytest.approx(0.8, abs=0.02)
    assert after(model, allocation) >= 0.8 - 1e-9
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("target", "share"), [("2x faster", 0.5), ("latency <= 4 ms", 0.4)])
def test_a_time_is_what_the_pruned_copy_measures(model, clock, target, share):
    allocation = allocate_to_target(model, target, INPUTS)
    assert 0.9 * share <= 0.2 + 0.8 * (1 - after(model, allocation)) <= share
    assert len(clock) > 1, "the first prediction leaves out what is not a linear layer"


def test_a_time_that_cannot_be_met_says_what_can(model, clock):
    with pytest.raises(ValueError, match=r"target: expected at most 0.1667, the best in 5 trials was 0.2"):
        allocate_to_target(model, "6x faster", INPUTS)


def test_sensitivity_by_trial_decides(model):
    x = INPUTS["x"]
    expected = model(x).detach()

    def loss(twin):
        """As if the second layer did not matter."""
        return float((twin.first(x) - model_first).square().mean())

    model_first = model.first(x).detach()
    allocation = allocate_to_target(model, "sparsity 0.4", INPUTS, loss=loss)
    assert set(allocation.targets) == {"second"}
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "drop <= 1 point"}, "got a drop; prune_incrementally takes one"),
        ({"target": "faster"}, 'target: expected "2x faster"'),
        ({"patterns": (Block(7, 1),)}, "expected a layer that 7x1 divides, got none"),
        ({"criterion": "taylor"}, "statistics: expected taylor for taylor, got None"),
        ({"target": "2x faster", "inputs": {"n": 3}}, r"inputs: expected a tensor \(batch, tokens, ...\)"),
    ],
)
def test_errors(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_to_target(model, **({"target": "sparsity 0.8", "inputs": INPUTS} | arguments))


@pytest.mark.skipif(not native.available, reason="sparse layers are faster with the extension alone")
def test_for_real():
    """A speed-up that any machine reaches, with everything measured."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    inputs = {"input": torch.randn(1, 64, 512)}
    allocation = allocate_to_target(layers, "1.2x faster", inputs, filter_fn=lambda module, name: True, threads=1)
    assert allocation.targets
    assert set(allocation.options) == set(prunable(layers))
