"""Layers that must stay dense, and weights that no sparse layer could hold: said, never broken."""

import functools

import pytest
import torch
from torch import nn

from sparsenlp import SparseLinear, SparsifyConfig, sparsify_
from sparsenlp.layers import SparseConv1d
from sparsenlp.obstacles import skipped_weights, weights_read_by
from sparsenlp.prune import Block, finalize_, prune_

BY_PATTERN = SparsifyConfig(measure="off")


def wrapped(method):
    @functools.wraps(method)
    def call(*args, **kwargs):
        return method(*args, **kwargs)

    return call


class Mixer(nn.Module):
    """Reads one weight for its values, one for its dtype."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(32, 32)
        self.called = nn.Linear(32, 32)

    def init_values(self):
        self.called.weight.data.zero_()

    def forward(self, x):
        x = self.called(x.to(self.called.weight.dtype).to(self.called.weight.device))
        return (self.read.weight @ x.transpose(-1, -2)).transpose(-1, -2)


class WrappedMixer(Mixer):
    @wrapped
    def forward(self, x):
        return self.called(x) @ self.read.weight.T


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3)
        self.up = nn.Linear(16, 32)

    def forward(self, x):
        return self.up(self.conv(x.to(self.conv.weight.dtype)).transpose(1, 2))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, x):
        return x @ self.gate_up_proj.mean(0)


class OwnLinear(nn.Linear):
    pass


def pruned(model):
    torch.manual_seed(0)
    prune_(model, Block(8, 1), 0.8, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return finalize_(model)


@pytest.mark.parametrize("kind", [Mixer, WrappedMixer])
def test_a_weight_that_its_owner_reads_stays_dense(kind):
    model, x = pruned(nn.Sequential(kind())), torch.randn(2, 5, 32)
    expected = model(x)
    plan = sparsify_(model, BY_PATTERN)
    torch.testing.assert_close(model(x), expected)
    assert {row.name: row.reason for row in plan.rows}["0.read"] == f"weight is read by {kind.__name__}"
    assert isinstance(model[0].called, SparseLinear)
    assert model[0].called.weight.dtype == torch.float32


def test_what_a_class_reads_is_found_in_its_source():
    assert weights_read_by(Mixer) == {"called": False, "read": True}
    assert weights_read_by(nn.Linear) == {}


@pytest.mark.parametrize("masked", [True, False])
def test_a_convolution_whose_weight_is_read(masked):
    model, x = nn.Sequential(Convolution()), torch.randn(2, 16, 7)
    prune_(model, Block(8, 1), 0.8)
    expected = model(x)
    if masked:
        weight = model[0].conv.weight
        assert isinstance(model[0].conv, SparseConv1d)
        assert weight.shape == (16, 16, 3)
        assert torch.equal(weight, finalize_(model)[0].conv.weight)
        return
    plan = sparsify_(finalize_(model), BY_PATTERN)
    torch.testing.assert_close(model(x), expected)
    assert [row.reason for row in plan.composites] == ["weight is read by Convolution"]


def test_a_sparse_convolution_has_a_weight():
    conv = nn.Conv1d(16, 16, 3)
    conv.weight.data *= torch.rand(16, 1, 1) < 0.5
    sparse = SparseConv1d.from_dense(conv, (8, 1))
    assert torch.equal(sparse.weight, conv.weight)


def test_the_plan_says_which_weights_it_never_considers():
    model = nn.ModuleDict({"own": OwnLinear(32, 32), "experts": Experts(), "plain": nn.Linear(32, 32)})
    model["conv"], model["words"] = nn.Conv2d(3, 32, 4), nn.Embedding(500, 32)
    rows = {row.kind: row for row in sparsify_(pruned(model), BY_PATTERN).skipped}
    assert {kind: (row.parameter, row.weights) for kind, row in rows.items()} == {
        "OwnLinear": ("weight", 1024),
        "Experts": ("gate_up_proj", 4096),
        "Conv2d": ("weight", 1536),
    }
    assert "3 dimensions, where sparse layers hold matrices" in rows["Experts"].reason
    assert "class of its own beside nn.Linear" in rows["OwnLinear"].reason


def test_errors_say_what_is_there_instead():
    with pytest.raises(ValueError, match=r"got none in ModuleList; not considered: gate_up_proj of 2 Experts \(8,192"):
        sparsify_(nn.ModuleList([Experts(), Experts()]), BY_PATTERN)
    with pytest.raises(ValueError, match=r"got none in ModuleList; not considered: gate_up_proj of 1 Experts"):
        prune_(nn.ModuleList([Experts()]), Block(8, 1), 0.5)


def test_pruning_warns_of_weights_that_it_leaves_alone_unless_told_which_to_take(recwarn):
    model = nn.ModuleDict({"experts": Experts(), "up": nn.Linear(32, 32)})
    with pytest.warns(UserWarning, match=r"prune_: not considered: gate_up_proj of 1 Experts \(4,096 weights\)"):
        prune_(model, Block(8, 1), 0.5)
    recwarn.clear()
    prune_(model, Block(8, 1), 0.5, filter_fn=lambda module, name: True)
    prune_(nn.Sequential(nn.Linear(32, 32), nn.Embedding(500, 32)), Block(8, 1), 0.5)
    assert not recwarn.list


def test_shared_weights_count_once():
    first, second = Experts(), Experts()
    second.gate_up_proj = first.gate_up_proj
    (row,) = skipped_weights(nn.ModuleList([first, second]))
    assert (row.count, row.weights) == (2, 4096)


def test_a_layer_without_weights_is_no_candidate():
    model = pruned(nn.Sequential(nn.Linear(32, 32)))
    model.append(nn.Linear(32, 0))
    plan = sparsify_(model, BY_PATTERN)
    assert [row.chosen for row in plan.rows] == ["8x1", "dense"]
