from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsenlp import BlockSparse, NMLinear, SparseLinear, native
from sparsenlp.ops import bsr_linear


def pruned_linear(rows=32, columns=24, block=(8, 1), bias=True) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias)
    n, k = block
    keep = torch.rand(rows // n, columns // k) < 0.4
    linear.weight.data *= keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    return linear


@pytest.mark.parametrize("block", [(8, 1), (4, 2), (16, 4)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_same_function_as_dense(block, bias):
    linear = pruned_linear(block=block, bias=bias)
    sparse = SparseLinear.from_dense(linear, block)
    x = torch.randn(5, 24)
    torch.testing.assert_close(sparse(x), linear(x))
    assert torch.equal(sparse.to_dense().weight, linear.weight)
    fused = SparseLinear.from_dense(linear, block, activation="gelu")
    torch.testing.assert_close(fused(x), nn.functional.gelu(linear(x)))


@torch.no_grad()
def test_mask_decides_what_is_stored():
    linear = nn.Linear(8, 8)
    mask = torch.zeros(8, 8)
    mask[:, 2] = 1
    sparse = SparseLinear.from_dense(linear, (8, 1), mask)
    assert sparse.weight.nnz_blocks == 1
    assert torch.equal(sparse.to_dense().weight, linear.weight * mask)


def test_state_dict_holds_canonical_names_once():
    sparse = SparseLinear.from_dense(pruned_linear(block=(4, 2)), (4, 2))
    state = sparse.state_dict()
    assert sorted(state) == ["bias", "col_indices", "crow_indices", "values"]
    assert state["values"].shape == (sparse.weight.nnz_blocks, 4, 2)
    other = SparseLinear(24, 32, (4, 2), sparse.weight.nnz_blocks)
    other.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    assert torch.equal(other.values, sparse.values)
    x = torch.randn(3, 24)
    torch.testing.assert_close(other(x), sparse(x))


@torch.no_grad()
def test_survives_deepcopy_and_to():
    sparse = SparseLinear.from_dense(pruned_linear(), (8, 1))
    x = torch.randn(3, 24)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    double = copy.deepcopy(sparse).to(torch.float64)
    assert double.crow_indices.dtype == torch.int32
    torch.testing.assert_close(double(x.double()).float(), sparse(x))


def test_trains_only_stored_blocks():
    sparse = SparseLinear.from_dense(pruned_linear(), (8, 1))
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


def test_bias_and_flags_carry_over():
    linear = pruned_linear().eval().requires_grad_(False)
    sparse = SparseLinear.from_dense(linear, (8, 1))
    assert sparse.bias is linear.bias
    assert not sparse.values.requires_grad
    assert not sparse.training


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = nn.Sequential(nn.LayerNorm(24), SparseLinear.from_dense(pruned_linear(), (8, 1), activation="gelu"))
    x = torch.randn(3, 24)
    program = torch.export.export(model, (x,), strict=strict)
    assert ("sparsenlp.bsr_linear" in str(program.graph)) == native.available  # else the reference is traced through
    torch.testing.assert_close(program.module()(x), model(x))


def test_compile_fullgraph():
    model = nn.Sequential(nn.LayerNorm(24), SparseLinear.from_dense(pruned_linear(), (8, 1)))
    x = torch.randn(3, 24)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_bad_indices_are_refused_before_loading():
    sparse = SparseLinear.from_dense(pruned_linear(), (8, 1))
    before = copy.deepcopy(sparse.state_dict())
    state = copy.deepcopy(before)
    state["col_indices"][0] = 1000
    with pytest.raises(ValueError, match=r"expected col_indices in \[0, 24\), got"):
        sparse.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())
    nested = nn.ModuleDict({"fc": sparse})
    with pytest.raises(ValueError, match="fc: BlockSparse"):
        nested.load_state_dict({f"fc.{name}": tensor for name, tensor in state.items()})


def test_errors():
    with pytest.raises(ValueError, match="divisible by blocks of 7x1, got 32x24"):
        SparseLinear.from_dense(pruned_linear(), (7, 1))
    with pytest.raises(ValueError, match="expected an activation among"):
        SparseLinear(8, 8, (8, 1), 0, activation="swish")
    weight = BlockSparse.from_dense(torch.ones(8, 8), (8, 1))
    with pytest.raises(ValueError, match=r"expected bias of shape \(8,\)"):
        SparseLinear.from_weight(weight, torch.zeros(9))
    bad = BlockSparse(weight.crow_indices, weight.col_indices + 1, weight.values, weight.shape)
    with pytest.raises(ValueError, match="col_indices in"):
        SparseLinear.from_weight(bad)


def test_repr_says_what_it_is():
    text = repr(SparseLinear.from_dense(pruned_linear(bias=False), (8, 1), activation="relu"))
    assert "24, 32, block=8x1, sparsity=" in text
    assert "bias=False, activation=relu" in text


@pytest.mark.parametrize("input_scale", [None, 0.03])
def test_quantized_layer(input_scale):
    dense = pruned_linear(block=(8, 4))
    layer = SparseLinear.from_dense(dense, (8, 4), activation="relu").eval().quantize(input_scale)
    assert layer.values.dtype == torch.int8
    assert not layer.values.requires_grad
    assert not layer.training
    assert layer.bias is dense.bias
    assert "int8" in repr(layer)
    x = torch.randn(5, dense.in_features)
    with torch.no_grad():
        assert torch.equal(layer(x), bsr_linear(x, layer.weight, dense.bias, "relu", input_scale=input_scale))
        torch.testing.assert_close(layer(x), dense(x).relu(), rtol=0.1, atol=0.1)
        again = SparseLinear(dense.in_features, dense.out_features, (8, 4), layer.weight.nnz_blocks, quantized=True)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.weight.to_dense(), layer.weight.to_dense())


def test_quantized_layer_keeps_its_scales_when_the_model_changes_dtype():
    layer = SparseLinear.from_dense(pruned_linear(block=(8, 4)), (8, 4)).quantize()
    scales, x = layer.scales.clone(), torch.randn(5, layer.in_features)
    expected = layer(x)
    layer = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(layer.scales, scales)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_quantize_refuses_a_useless_input_scale():
    layer = SparseLinear.from_dense(pruned_linear(block=(8, 4)), (8, 4))
    with pytest.raises(ValueError, match="expected a positive, finite input_scale"):
        layer.quantize(input_scale=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_adds_a_residual(dtype):
    dense = pruned_linear(block=(8, 2)).to(dtype)
    layer = SparseLinear.from_dense(dense, (8, 2))
    x, residual = torch.randn(5, dense.in_features).to(dtype), torch.randn(5, dense.out_features).to(dtype)
    torch.testing.assert_close(layer(x, residual), dense(x) + residual, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["blocks", "pattern"])
@torch.no_grad()
def test_an_input_of_fewer_bits_is_widened(dtype, kind):
    dense = pruned_linear()
    dense.weight.data *= torch.tensor([1.0, 0, 0, 1]).repeat(6)
    layer = SparseLinear.from_dense(dense, (8, 1)) if kind == "blocks" else NMLinear.from_dense(dense)
    x = torch.randn(3, 24).to(dtype)
    assert torch.equal(layer(x, residual=torch.ones(3, 32, dtype=dtype)), layer(x.float(), residual=torch.ones(3, 32)))
    with pytest.raises(TypeError, match="expected x of dtype"):
        layer.to(dtype)(x.float())


def test_a_weight_says_its_dtype_as_a_dense_one_would():
    layer = SparseLinear.from_dense(pruned_linear(block=(8, 4)), (8, 4)).to(torch.bfloat16)
    assert (layer.weight.dtype, layer.weight.device) == (torch.bfloat16, torch.device("cpu"))
    assert layer.quantize().weight.dtype == torch.float32
    assert NMLinear.from_dense(nn.Linear(8, 8), (4, 4)).weight.dtype == torch.float32
