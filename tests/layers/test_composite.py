"""torch's recurrent layers with linear parts: the same function, gradients, hooks and Parameters; and back."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from sparsenlp import SparseConv1d, SparseGRU, SparseLinear, SparseLSTM
from sparsenlp.layers.composite import join_composites_, named_layers, split, split_composites_, splitting
from sparsenlp.prune import InputStatistics

CASES = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}, "packed"),
    (nn.LSTM, {"batch_first": True, "proj_size": 4}, "with states"),
    (nn.LSTM, {"bidirectional": True, "proj_size": 4, "bias": False}, "packed"),
    (nn.GRU, {"num_layers": 2, "batch_first": True}, "packed"),
    (nn.GRU, {"bidirectional": True, "bias": False}, "with states"),
    (nn.GRU, {"batch_first": True}, "unbatched"),
]


def inputs(rnn, form, batch=3, steps=5):
    """(x, states or None) in one of the forms that torch takes."""
    size = rnn.input_size
    if form == "unbatched":
        return torch.randn(steps, size), None
    x = torch.randn(*((batch, steps) if rnn.batch_first else (steps, batch)), size)
    if form == "packed":
        return pack_padded_sequence(x, torch.tensor([2, 5, 4]), rnn.batch_first, enforce_sorted=False), None
    cells = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = torch.randn(cells, batch, getattr(rnn, "proj_size", 0) or rnn.hidden_size)
    return x, (h, torch.randn(cells, batch, rnn.hidden_size)) if isinstance(rnn, nn.LSTM) else h


def numbers(result):
    y, states = result
    return [getattr(y, "data", y), *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.parametrize(("kind", "options", "form"), CASES, ids=str)
def test_a_split_layer_gives_what_torchs_gives(kind, options, form):
    torch.manual_seed(0)
    rnn = kind(6, 8, **options)
    twin = split(rnn)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in rnn.parameters()}
    x, states = inputs(rnn, form)
    expected, got = numbers(rnn(x, states)), numbers(twin(x, states))
    gradients = []
    for results in (expected, got):
        rnn.zero_grad()
        sum(result.cos().sum() for result in results).backward()
        gradients.append([p.grad.clone() for p in rnn.parameters()])
    for a, b in zip([*expected, *gradients[0]], [*got, *gradients[1]], strict=True):
        assert torch.equal(a, b)


def test_dropout_between_layers_is_torchs():
    rnn = nn.LSTM(6, 8, num_layers=2, dropout=0.5)
    twin, x = split(rnn), torch.randn(4, 2, 6)
    results = []
    for layer in (rnn, twin):
        torch.manual_seed(3)
        results.append(layer(x)[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], rnn.eval()(x)[0])


def test_autocast_is_torchs():
    rnn, x = nn.LSTM(6, 8), torch.randn(4, 2, 6)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, got = rnn(given)[0], split(rnn)(given)[0]
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("kind", "options", "form"), CASES[:-1], ids=str)
def test_hooks_see_the_inputs_of_every_matrix(kind, options, form):
    """Inputs are told by replaying them: what the matrices make of them must be the gates of torch's layer."""
    torch.manual_seed(0)
    rnn = kind(6, 8, **options)
    twin = split(rnn)
    x, states = inputs(rnn, form)
    seen = {}
    for name, matrix in twin.matrices.items():
        matrix.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    expected, got = numbers(rnn(x, states)), numbers(twin(x, states))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)
    assert seen.keys() == twin.matrices.keys()
    for name, matrix in twin.matrices.items():
        step_by_step = _inputs_of(rnn, name, x, states)
        assert seen[name].shape[-1] == matrix.in_features
        torch.testing.assert_close(seen[name].double(), step_by_step, rtol=1e-5, atol=1e-6)


def _inputs_of(rnn, name, x, states):
    """What the matrix `name` multiplies, in the order of batch and steps, or packed: from the cells, one by one."""
    packed = not isinstance(x, torch.Tensor)
    if packed:
        padded, lengths = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
    else:
        padded = x if rnn.batch_first else x.transpose(0, 1)
        lengths = torch.full((len(padded),), padded.shape[1])
    h, c = (None, None) if states is None else states if isinstance(states, tuple) else (states, None)
    kind, layer = name.split("_")[0], int(name.split("_")[1][1:])
    reverse = name.endswith("_reverse")
    rnn, inputs = copy.deepcopy(rnn).double(), padded.double()
    for at in range(layer + 1):
        directions, met = ("", "_reverse") if rnn.bidirectional else ("",), {}
        outputs = []
        for d, direction in enumerate(directions):
            cell = at * len(directions) + d
            own = [None if s is None else s[cell].double() for s in (h, c)]
            y, met[bool(d)] = _run_direction(rnn, at, direction, inputs, lengths, own)
            outputs.append(y)
        if at == layer:
            rows = {"ih": inputs, **met[reverse]}[kind]
        inputs = torch.cat(outputs, -1)
    if not packed:
        return rows
    return pack_padded_sequence(rows, lengths, True, enforce_sorted=False).data


def _run_direction(rnn, layer, direction, x, lengths, states):
    w = {k: getattr(rnn, f"{k}_l{layer}{direction}", None) for k in ("weight_ih", "weight_hh", "weight_hr")}
    b = {k: getattr(rnn, f"{k}_l{layer}{direction}", 0.0) for k in ("bias_ih", "bias_hh")}
    batch, steps, _ = x.shape
    size = w["weight_hh"].shape[1]
    y = x.new_zeros(batch, steps, size)
    met = {"hh": x.new_zeros(batch, steps, size), "hr": x.new_zeros(batch, steps, rnn.hidden_size)}
    for i, t0 in itertools.product(range(batch), [0]):
        h = x.new_zeros(size) if states[0] is None else states[0][i]
        c = x.new_zeros(rnn.hidden_size) if states[1] is None else states[1][i]
        order = range(t0, int(lengths[i]))
        for t in reversed(order) if direction else order:
            met["hh"][i, t] = h
            a, r = w["weight_ih"] @ x[i, t] + b["bias_ih"], w["weight_hh"] @ h + b["bias_hh"]
            if isinstance(rnn, nn.LSTM):
                gate_i, f, g, o = (a + r).chunk(4)
                c = f.sigmoid() * c + gate_i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                met["hr"][i, t] = h
                h = h if w["weight_hr"] is None else w["weight_hr"] @ h
            else:
                (ar, az, an), (rr, rz, rn) = a.chunk(3), r.chunk(3)
                z = (az + rz).sigmoid()
                h = (1 - z) * (an + (ar + rr).sigmoid() * rn).tanh() + z * h
            y[i, t] = h
    return y.detach(), {k: v.detach() for k, v in met.items()}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(6, 8), nn.GRU(8, 8)])
        self.again = self.layers[1]
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in (*self.layers, self.again):
            x, _ = layer(x)
        return self.head(x)


def test_splitting_a_model_and_back():
    model, x, calls = Model().eval(), torch.randn(4, 2, 6), []
    hook = model.layers[0].register_forward_hook(lambda module, args, output: calls.append(module))
    expected, names = model(x), list(model.state_dict())
    parameters = dict(model.named_parameters())
    split_composites_(model)
    assert isinstance(model.layers[0], SparseLSTM)
    assert isinstance(model.again, SparseGRU)
    assert model.again is model.layers[1]
    assert torch.equal(model(x), expected)
    assert "layers.0.hh_l0.weight" in model.state_dict()
    join_composites_(model)
    assert type(model.layers[0]) is nn.LSTM
    assert model.again is model.layers[1]
    assert torch.equal(model(x), expected)
    assert len(calls) == 3, "hooks stay on"
    hook.remove()
    assert not model.layers[0]._forward_hooks
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_what_is_not_exactly_torchs_stays():
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict({"own": Own(4, 4), "normed": nn.LSTM(4, 4), "rnn": nn.RNN(4, 4)})
    nn.utils.prune.random_unstructured(model["normed"], "weight_hh_l0", 0.5)
    assert split_composites_(model) == {}
    assert split_composites_(nn.LSTM(4, 4)) == {}, "a model that is one layer has no place to put another"


def test_splitting_leaves_torchs_layers_after_an_error():
    model = Model()
    before = list(model.modules())
    with pytest.raises(KeyError), splitting(model):
        raise KeyError(type(model.layers[0]).__name__)
    assert list(model.modules()) == before


def test_named_layers_of_a_whole_model_are_those_of_the_split_one():
    model = Model()
    views = {name: layer.weight for name, layer in named_layers(model) if isinstance(layer, nn.Linear)}
    split_composites_(model)
    parts = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert views.keys() == parts.keys()
    assert all(views[name] is parts[name] for name in views)


def test_statistics_of_inputs_skip_padding():
    """(B, T) padding of plain tensors is left out; packed tokens have none."""
    torch.manual_seed(0)
    rnn = nn.LSTM(6, 8, batch_first=True)
    x, lengths = torch.randn(3, 5, 6), torch.tensor([2, 5, 4])
    mask = torch.arange(5) < lengths[:, None]
    packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    squares = []
    for given in (x, packed):
        twin = split(rnn)
        statistics = InputStatistics(twin.matrices, ("input_square",))
        with statistics.observing(mask):
            twin(given)
        squares.append({name: found.input_square for name, found in statistics.items()})
    expected = x[mask].square().mean(0)
    for found in squares:
        torch.testing.assert_close(found["ih_l0"], expected)
    torch.testing.assert_close(squares[0]["hh_l0"], squares[1]["hh_l0"])


def test_a_convolution_trains_while_it_is_split():
    """Its weight is a copy, which comes back; one that two layers share is left alone."""
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, groups=2))
    x = torch.randn(2, 4, 7)
    conv, before = model[0], model(x)
    with splitting(model):
        assert isinstance(model[0], SparseConv1d)
        torch.testing.assert_close(model(x), before)
        model[0].filters.weight.data.mul_(2)
        after = model(x)
    assert model[0] is conv
    torch.testing.assert_close(model(x), after)
    assert type(model[3]) is nn.Conv1d
    tied = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    tied[1].weight = tied[0].weight
    assert split_composites_(tied) == {}


def test_mixed_matrices_are_refused():
    twin = split(nn.LSTM(6, 8))
    twin.hh_l0 = SparseLinear.from_dense(twin.hh_l0, (8, 1))
    with pytest.raises(TypeError, match=r"SparseLSTM: expected hh_l0 as nn\.Linear, as ih_l0, got SparseLinear"):
        twin(torch.randn(3, 2, 6))
    with pytest.raises(TypeError, match=r"expected hh_l0 as Linear of torch\.float32, as ih_l0, got SparseLinear"):
        SparseLSTM(6, 8, matrices=twin.matrices)
