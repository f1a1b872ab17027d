from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsenlp import NMLinear, native
from sparsenlp.formats import NM
from sparsenlp.prune import NM as Pattern


def pruned_linear(pattern=(2, 4), bias=True) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(24, 32, bias=bias)
    keep = torch.rand(32, 24 // pattern[1], pattern[1]).argsort(dim=2) < pattern[0]
    linear.weight.data *= keep.flatten(1)
    return linear


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_same_function_as_dense(pattern, bias):
    linear = pruned_linear(pattern, bias)
    sparse = NMLinear.from_dense(linear, pattern)
    x = torch.randn(5, 24)
    torch.testing.assert_close(sparse(x), linear(x))
    assert torch.equal(sparse.to_dense().weight, linear.weight)
    fused = NMLinear.from_dense(linear, pattern, activation="gelu")
    residual = torch.randn(5, 32)
    torch.testing.assert_close(fused(x, residual), nn.functional.gelu(linear(x) + residual))


@torch.no_grad()
def test_takes_what_the_pruning_pattern_leaves():
    linear = nn.Linear(24, 32)
    scores = Pattern(2, 4).scores(linear.weight.abs())
    linear.weight.data *= scores.isinf()
    assert torch.equal(NMLinear.from_dense(linear).to_dense().weight, linear.weight)


def test_state_dict_holds_canonical_names_once():
    sparse = NMLinear.from_dense(pruned_linear())
    state = sparse.state_dict()
    assert sorted(state) == ["bias", "indices", "values"]
    assert state["values"].shape == state["indices"].shape == (32, 12)
    other = NMLinear(24, 32)
    other.load_state_dict(state)
    x = torch.randn(3, 24)
    assert torch.equal(other(x), sparse(x))
    on_meta = nn.Sequential(NMLinear(24, 32, device="meta"))
    on_meta.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=True)
    assert torch.equal(on_meta(x), sparse(x))


@torch.no_grad()
def test_survives_deepcopy_and_to():
    sparse = NMLinear.from_dense(pruned_linear())
    x = torch.randn(3, 24)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    double = copy.deepcopy(sparse).to(torch.float64)
    assert double.indices.dtype == torch.uint8
    torch.testing.assert_close(double(x.double()).float(), sparse(x))
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), sparse(x), rtol=2e-2, atol=2e-2)


def test_trains_only_stored_weights():
    sparse = NMLinear.from_dense(pruned_linear())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    before = sparse.to_dense().weight.detach()
    x, target = torch.randn(16, 24), torch.randn(16, 32)
    losses = []
    for _ in range(20):
        loss = (sparse(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = sparse.to_dense().weight.detach()
    assert losses[-1] < losses[0]
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)
    with torch.inference_mode():
        torch.testing.assert_close(sparse.eval()(x), sparse.to_dense()(x))


def test_bias_and_flags_carry_over():
    linear = pruned_linear().eval().requires_grad_(False)
    sparse = NMLinear.from_dense(linear)
    assert sparse.bias is linear.bias
    assert not sparse.values.requires_grad
    assert not sparse.training


def test_export():
    model = nn.Sequential(nn.LayerNorm(24), NMLinear.from_dense(pruned_linear(), activation="gelu"))
    x = torch.randn(3, 24)
    program = torch.export.export(model, (x,))
    assert ("sparsenlp.nm_linear" in str(program.graph)) == native.available  # else the reference is traced through
    torch.testing.assert_close(program.module()(x), model(x))


def test_compile_fullgraph():
    model = nn.Sequential(nn.LayerNorm(24), NMLinear.from_dense(pruned_linear()))
    x = torch.randn(3, 24)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_bad_indices_are_refused_before_loading():
    sparse = NMLinear.from_dense(pruned_linear())
    before = copy.deepcopy(sparse.state_dict())
    state = copy.deepcopy(before)
    state["indices"][0, 0] = 9
    with pytest.raises(ValueError, match=r"expected indices in \[0, 4\), got 9"):
        sparse.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())
    nested = nn.ModuleDict({"fc": sparse})
    with pytest.raises(ValueError, match="fc: NM: expected"):
        nested.load_state_dict({f"fc.{name}": tensor for name, tensor in state.items()})


def test_errors():
    with pytest.raises(ValueError, match="at most 1 nonzeros in every group of 4, got"):
        NMLinear.from_dense(pruned_linear(), (1, 4))
    with pytest.raises(ValueError, match="expected an activation among"):
        NMLinear(8, 8, activation="swish")
    with pytest.raises(ValueError, match="in_features divisible by 4, got 6"):
        NMLinear(6, 8)
    with pytest.raises(ValueError, match="0 < n <= m, got 5:4"):
        NMLinear(8, 8, (5, 4))
    weight = NM.from_dense(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"expected bias of shape \(8,\)"):
        NMLinear.from_weight(weight, torch.zeros(9))
    weight.indices[0, 0] = 1
    with pytest.raises(ValueError, match="increase within each group"):
        NMLinear.from_weight(weight)


def test_repr_says_what_it_is():
    text = repr(NMLinear.from_dense(pruned_linear(bias=False), activation="relu"))
    assert text == "NMLinear(24, 32, pattern=2:4, bias=False, activation=relu)"


@pytest.mark.parametrize("input_scale", [None, 0.05])
@torch.no_grad()
def test_quantize(input_scale):
    """The product of rounded inputs and rounded weights, to float32's precision; the state dict has the scales."""
    layer = NMLinear.from_dense(pruned_linear(), activation="relu")
    int8 = layer.quantize(input_scale)
    x, residual = torch.randn(5, 24), torch.randn(5, 32)
    scale = x.abs().amax(1, keepdim=True) / 127 if input_scale is None else torch.tensor(input_scale)
    rounded = (x / scale).round().clamp(-127, 127)
    weight = int8.weight.to_dense()
    assert not torch.equal(weight, layer.weight.to_dense())
    expected = torch.relu(rounded.double() * scale @ weight.double().t() + int8.bias.double() + residual)
    torch.testing.assert_close(int8(x, residual).double(), expected, rtol=1e-5, atol=1e-5)
    assert int8.bias is layer.bias
    assert not int8.values.requires_grad
    other = NMLinear(24, 32, activation="relu", quantized=True)
    other.load_state_dict(int8.state_dict())
    other.input_scale = input_scale
    assert torch.equal(other(x), int8(x))
    half = copy.deepcopy(int8).to(torch.bfloat16)
    assert half.scales.dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()).float(), int8(x), rtol=2e-2, atol=6e-2)
    assert "pattern=2:4, int8" in repr(int8)


@pytest.mark.parametrize("pattern", [(1, 2), (1, 4), (2, 8)])
def test_patterns_that_fit_into_2_of_4(pattern):
    """What the error of the CUDA backend advises loses nothing."""
    linear = pruned_linear(pattern)
    stored = NMLinear.from_dense(NMLinear.from_dense(linear, pattern).to_dense(), (2, 4))
    assert torch.equal(stored.weight.to_dense(), linear.weight)
