"""What load_state_dict takes, and what it refuses before it changes anything."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsenlp import NMLinear, SparseLinear, SparsifyConfig, from_pretrained, save_pretrained, sparsify_


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16)

    def forward(self, x):
        return self.second(torch.relu(self.first(self.norm(x))))


@torch.no_grad()
def sparse_mlp(seed=0, density=0.3):
    torch.manual_seed(seed)
    model = Mlp()
    nn.init.normal_(model.norm.weight)
    for linear in (model.first, model.second):
        rows, columns = linear.weight.shape
        mask = torch.zeros(rows // 8 * columns)
        mask[torch.randperm(mask.numel())[: int(density * mask.numel())]] = 1
        linear.weight.mul_(mask.view(rows // 8, columns).repeat_interleave(8, 0))
    sparsify_(model, SparsifyConfig(measure="off", blocks=((8, 1),)))
    return model


def patterned_mlp(seed=0):
    torch.manual_seed(seed)
    model = Mlp()
    for name in ("first", "second"):
        linear = getattr(model, name)
        groups = torch.rand(linear.weight.shape).unflatten(1, (-1, 4))
        linear.weight.data *= (groups.argsort(dim=2).argsort(dim=2) < 2).flatten(1)
        setattr(model, name, NMLinear.from_dense(linear))
    return model


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("build", [sparse_mlp, patterned_mlp])
@pytest.mark.parametrize("strict", [True, False])
def test_our_own_file(build, strict, tmp_path):
    saved, other = build(0), build(1)
    file = save_pretrained(saved, tmp_path / "mlp") / "model.safetensors"
    other.load_state_dict(load_file(file), strict=strict)
    assert torch.equal(other(X), saved(X))
    assert_unchanged(other, snapshot(saved))


def test_a_loaded_model_takes_it_too(tmp_path):
    first, second = (save_pretrained(sparse_mlp(seed), tmp_path / str(seed)) for seed in (0, 1))
    model = from_pretrained(first, Mlp())
    model.load_state_dict(load_file(second / "model.safetensors"))
    assert torch.equal(model(X), sparse_mlp(1)(X))


def drop(state, name):
    del state[name]


FAULTS = {
    "more blocks": (
        lambda s: s.update(sparse_mlp(1, 0.5).state_dict()),
        "first: expected values of shape .* from_pretr",
    ),
    "column": (lambda s: s["second.col_indices"].fill_(99), r"second: BlockSparse: expected col_indices in \[0, 32\)"),
    "long column": (lambda s: s.update({"second.col_indices": s["second.col_indices"].long() + 2**32}), "of dtype"),
    "no indices": (lambda s: drop(s, "second.crow_indices"), "second: expected .* together, got no crow_indices"),
    "dense": (lambda s: s.update(Mlp().state_dict()), "first: expected .* of a sparse layer, got a dense weight"),
    "int8": (
        lambda s: s.update({"second.values": s["second.values"].to(torch.int8)}),
        "second: expected values of dty",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_nothing_is_changed_by_what_is_refused(fault, strict, copied):
    model, state = sparse_mlp(0), snapshot(sparse_mlp(1))
    model = copy.deepcopy(model) if copied else model
    change, message = FAULTS[fault]
    change(state)
    before, result = snapshot(model), model(X)
    with pytest.raises((ValueError, TypeError), match=message):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)
    assert torch.equal(model(X), result)


def test_dense_weights_alone_do_not_pass_for_loaded():
    model = sparse_mlp()
    with pytest.raises(ValueError, match="load it into the dense model, then sparsify_ that"):
        model.load_state_dict(Mlp().state_dict(), strict=False)


def test_an_int8_layer_takes_int8_alone():
    dense = nn.Linear(16, 8)
    layers = [SparseLinear.from_dense(dense, (8, 4)), SparseLinear.from_dense(dense, (8, 4)).quantize()]
    for layer, other in (layers, layers[::-1]):
        with pytest.raises(TypeError, match="expected values of dtype"):
            layer.load_state_dict(other.state_dict(), strict=False)
