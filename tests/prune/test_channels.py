from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsenlp.prune import Unstructured, channel_scores, prune_, remove_filters_, remove_units_

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Tagger(nn.Module):
    """Features beside the output of a recurrent layer, read by a linear layer and one more recurrent layer."""

    def __init__(self, kind, layers=1, bidirectional=False, hidden=5, **options):
        super().__init__()
        self.rnn = kind(6, hidden, layers, bidirectional=bidirectional, batch_first=True, **options)
        width = hidden * (2 if bidirectional else 1)
        self.second = nn.GRU(width, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6 + width + 8, 3)

    def forward(self, x):
        y = self.rnn(x)[0]
        return self.head(torch.cat([x, y, self.second(y)[0]], dim=-1))


class TextCNN(nn.Module):
    def __init__(self, filters=(4, 5), deep=6):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(6, count, size) for count, size in zip(filters, (2, 3), strict=True))
        self.norm = nn.BatchNorm1d(filters[1])
        self.deep = nn.Conv1d(filters[1], deep, 2, bias=False)
        self.fc = nn.Linear(filters[0] + deep * 4, 2)

    def forward(self, x):
        x = x.transpose(1, 2)
        pooled = self.convs[0](x).relu().amax(dim=2)
        deep = self.deep(self.norm(self.convs[1](x)).relu()).relu()
        return self.fc(torch.cat([pooled, deep.flatten(1)], dim=1))


READERS = {"second": 0, "head": 6}


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, str(model)


def assert_unchanged(model, before):
    state, text = snapshot(model)
    assert text == before[1]
    assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())


@torch.no_grad()
def silence(model, units):
    """Let nothing read these units of `model.rnn`, {cell: units}."""
    rnn, hidden = model.rnn, model.rnn.hidden_size
    directions = 2 if rnn.bidirectional else 1
    ends = ("", "_reverse")[:directions]
    for cell, numbers in units.items():
        layer, direction = divmod(cell, directions)
        outputs = [hidden * direction + unit for unit in numbers]
        getattr(rnn, f"weight_hh_l{layer}{ends[direction]}")[:, [*numbers]] = 0
        if layer + 1 < rnn.num_layers:
            for end in ends:
                getattr(rnn, f"weight_ih_l{layer + 1}{end}")[:, outputs] = 0
        else:
            model.second.weight_ih_l0[:, outputs] = 0
            model.second.weight_ih_l0_reverse[:, outputs] = 0
            model.head.weight[:, [6 + unit for unit in outputs]] = 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_removing_silent_units_changes_nothing(kind, layers, bidirectional, bias):
    model = seeded(lambda: Tagger(kind, layers, bidirectional, bias=bias))
    cells = layers * (1 + bidirectional)
    units = {cell: [cell % 5, (cell + 3) % 5] for cell in range(cells)}
    silence(model, units)
    expected = model(X)
    assert remove_units_(model, "rnn", units, READERS) is model
    torch.testing.assert_close(model(X), expected, **TOLERANCE)
    built = Tagger(kind, layers, bidirectional, hidden=3, bias=bias)
    assert str(built) == str(model)
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(X), expected, **TOLERANCE)
    model.train()(X).sum().backward()  # while the graph of the old output is alive


@torch.no_grad()
def test_removing_silent_filters_changes_nothing():
    model = seeded(TextCNN)
    model.norm.running_mean.copy_(torch.arange(5))
    model.fc.weight[:, 1] = 0
    model.deep.weight[:, [0, 4]] = 0
    model.fc.weight[:, 4 + 3 * 4 : 4 + 4 * 4] = 0
    expected = model(X)
    remove_filters_(model, "convs.0", [1], {"fc": 0})
    torch.testing.assert_close(model(X), expected, **TOLERANCE)
    remove_filters_(model, "convs.1", [0, 4], {"norm": 0, "deep": 0})
    torch.testing.assert_close(model(X), expected, **TOLERANCE)
    remove_filters_(model, "deep", [3], {"fc": 3}, positions=4)
    torch.testing.assert_close(model(X), expected, **TOLERANCE)
    built = TextCNN((3, 3), deep=5)
    assert str(built) == str(model)
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built.eval()(X), expected, **TOLERANCE)


def squares(model):
    return {name: parameter.detach().square() for name, parameter in model.named_parameters()}


def test_scores_of_units_by_hand():
    model = seeded(lambda: Tagger(nn.LSTM, 2, True))
    scores, rnn = squares(model), model.rnn
    rows = [2 + 5 * gate for gate in range(4)]
    first = channel_scores(model, "rnn", scores, READERS)
    by_hand = rnn.weight_ih_l0_reverse[rows].square().sum() + rnn.weight_hh_l0_reverse[rows].square().sum()
    by_hand += rnn.weight_hh_l0_reverse[:, 2].square().sum() + rnn.weight_ih_l1[:, 7].square().sum()
    by_hand += rnn.weight_ih_l1_reverse[:, 7].square().sum()
    torch.testing.assert_close(first[1][2], by_hand.detach())
    assert {cell: tuple(s.shape) for cell, s in first.items()} == dict.fromkeys(range(4), (5,))
    last = rnn.weight_ih_l1[rows].square().sum() + rnn.weight_hh_l1[rows].square().sum()
    last += rnn.weight_hh_l1[:, 2].square().sum() + model.head.weight[:, 8].square().sum()
    last += model.second.weight_ih_l0[:, 2].square().sum() + model.second.weight_ih_l0_reverse[:, 2].square().sum()
    torch.testing.assert_close(first[2][2], last.detach())


def test_scores_of_filters_by_hand():
    model = seeded(TextCNN)
    parts = torch.cat([model.deep.weight[2].flatten(), model.fc.weight[:, 12:16].flatten()]).detach()
    for reduction, expected in (("l1", parts.square().sum()), ("mean", parts.square().mean())):
        got = channel_scores(model, "deep", squares(model), {"fc": 4}, 4, reduction)
        torch.testing.assert_close(got[0][2], expected)
    norms = channel_scores(model, "deep", {n: p.abs() for n, p in model.named_parameters()}, {"fc": 4}, 4, "l2")
    torch.testing.assert_close(norms[0][2], parts.norm())


@pytest.mark.parametrize(
    ("units", "readers", "message"),
    [
        ({0: [5], 1: [0]}, READERS, "remove_units_: expected units of cell 0 from 0 to 4, got 5"),
        ({0: [1, 1], 1: [0, 2]}, READERS, "expected each of the units of cell 0 once, got 1 twice"),
        ({0: [0], 1: [0], 2: [0]}, READERS, "expected cells from 0 to 1, got 2"),
        ({0: [0]}, READERS, r"expected as many units of each of 2 cells, got \[0, 1\]"),
        ({0: range(5), 1: range(5)}, READERS, "expected to keep at least one of 5 units, got all"),
        ({0: [0], 1: [0]}, {"head": 15}, "expected reader head to have inputs 15 to 24, got 24 inputs"),
        ({0: [0], 1: [0]}, {"head": -1}, "expected reader head to have inputs -1"),
        ({0: [0], 1: [0]}, {"": 0}, "expected reader  to be one of nn.Linear, .*, got Tagger"),
    ],
)
def test_wrong_units_leave_the_model_untouched(units, readers, message):
    model = seeded(lambda: Tagger(nn.GRU, 1, True))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        remove_units_(model, "rnn", units, readers)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("filters", "options", "message"),
    [
        ([4], {}, "remove_filters_: expected filters from 0 to 3, got 4"),
        ([0, 0], {}, "once, got 0 twice"),
        (range(4), {}, "expected to keep at least one of 4 filters, got all"),
        ([0], {"positions": 0}, "expected at least 1 position, got 0"),
        ([0], {"positions": 9}, "expected reader fc to have inputs 0 to 35, got 28 inputs"),
        ([0], {"name": "fc"}, "expected fc to be an nn.Conv1d, got nn.Linear"),
    ],
)
def test_wrong_filters_leave_the_model_untouched(filters, options, message):
    model = seeded(TextCNN)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        remove_filters_(model, **({"name": "convs.0", "filters": filters, "readers": {"fc": 0}} | options))
    assert_unchanged(model, before)


def test_other_refusals():
    model = Tagger(nn.LSTM, proj_size=4)
    with pytest.raises(ValueError, match="expected rnn without a projection, got proj_size=4"):
        remove_units_(model, "rnn", {0: [0]}, READERS)
    with pytest.raises(ValueError, match=r"expected head to be an nn\.LSTM, nn\.GRU or nn\.RNN, got nn\.Linear"):
        remove_units_(model, "head", {0: [0]}, {})
    model = TextCNN()
    model.convs[0] = nn.Conv1d(6, 4, 2, groups=2)
    with pytest.raises(ValueError, match=r"expected convs\.0 without groups, got 2"):
        remove_filters_(model, "convs.0", [0], {"fc": 0})
    model = TextCNN()
    prune_(model, Unstructured(), 0.5)
    with pytest.raises(ValueError, match=r"expected masks burned in .*, got a mask on convs.0"):
        remove_filters_(model, "convs.0", [0], {"fc": 0})
    model = TextCNN()
    model.other = model.fc
    with pytest.raises(ValueError, match="expected weights of its own in fc, got weights shared"):
        remove_filters_(model, "convs.0", [0], {"fc": 0})
    with pytest.raises(ValueError, match=r"expected scores \(4, 6, 2\) of convs.0.weight, got none"):
        channel_scores(model, "convs.0", {}, {"fc": 0})
    with pytest.raises(ValueError, match="reduction: expected one of l1, l2, mean, got l3"):
        channel_scores(model, "convs.0", {}, {"fc": 0}, reduction="l3")
    with pytest.raises(ValueError, match=r"expected fc to be recurrent or an nn\.Conv1d"):
        channel_scores(model, "fc", {}, {})
