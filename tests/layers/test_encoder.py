from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from encoder_cases import RAGGED, EncoderLayerCase, encoder_cases
from torch import nn

from sparsenlp.layers import SparseEncoderLayer
from sparsenlp.layers.encoder import read_dense, read_projection
from sparsenlp.ops import encoder_layer, encoder_pack

CASE = EncoderLayerCase(RAGGED, position_bias=True)


@pytest.mark.parametrize("case", encoder_cases(position_bias=True, pre_norm=True), ids=str)
def test_layer_is_the_op(case):
    layer = SparseEncoderLayer(case.weights(), case.precision, tile=32)
    y = layer(case.x(), case.mask(), case.bias())
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)
    stream, spans = encoder_pack(case.x(), case.mask())
    expected = encoder_layer(stream, spans, case.weights(), case.bias(), case.precision)
    used = spans[0].view(-1, 1, 16).expand_as(stream) >= 0
    torch.testing.assert_close(layer.step(stream, spans, case.bias())[used], expected[used])
    assert layer(case.x().bfloat16(), case.mask(), case.bias()).dtype == torch.bfloat16


def test_state_dict_round_trip():
    layer = SparseEncoderLayer(CASE.weights())
    other = copy.deepcopy(layer)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    assert {"query.values", "fc2.crow_indices", "norm1.weight", "output.bias"} < layer.state_dict().keys()
    assert torch.equal(other(CASE.x(), CASE.mask()), layer(CASE.x(), CASE.mask()))
    assert not list(layer.parameters())


def test_state_dicts_with_other_indices_are_refused():
    layer = SparseEncoderLayer(CASE.weights())
    state = layer.state_dict() | {"key.col_indices": layer.get_buffer("key.col_indices") + 100}
    with pytest.raises(ValueError, match=r"key: .* expected col_indices in \[0, 32\)"):
        layer.load_state_dict(state)


def test_compile_and_export_with_any_length():
    layer = SparseEncoderLayer(EncoderLayerCase(RAGGED).weights())
    x, mask = CASE.x(), CASE.mask()
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=512)}
    with torch.no_grad():
        program = torch.export.export(layer, (x, mask), dynamic_shapes=(dims, dims)).module()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for case in (CASE, EncoderLayerCase((3, 17))):  # torch.export asserts on its own that there is not one tile
            expected = layer(case.x(), case.mask())
            torch.testing.assert_close(program(case.x(), case.mask()), expected)
            torch.testing.assert_close(compiled(case.x(), case.mask()), expected)


def test_errors():
    weights = CASE.weights()
    with pytest.raises(ValueError, match="expected an activation among"):
        SparseEncoderLayer(replace(weights, activation="swish"))
    broken = replace(weights.key, weight=replace(weights.key.weight, col_indices=weights.key.weight.col_indices + 99))
    with pytest.raises(ValueError, match="expected col_indices in"):
        SparseEncoderLayer(replace(weights, key=broken))


@pytest.mark.parametrize("shape", [(16, 12), (10, 12), (16, 0), (0, 12), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weights_are_read_in_place(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    read = read_dense(weight).validate()
    assert torch.equal(read.to_dense(), weight)
    assert read.values.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, (8, 1)), (torch.bfloat16, (8, 2))])
def test_compressing_leaves_out_zeros(dtype, block):
    weight = torch.randn(32, 12).to(dtype)
    assert read_dense(weight, compress=True).density == 1
    weight[8:, 2:] = 0
    read = read_dense(weight, compress=True).validate()
    assert read.block == block
    assert read.density < 0.4
    assert torch.equal(read.to_dense(), weight)


def test_other_modules_are_not_read():
    class Other(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"expected an nn\.Linear or SparseLinear, got Other"):
        read_projection(Other(8, 8))
