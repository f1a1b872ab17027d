from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsenlp.formats import BlockMask
from sparsenlp.layers import SparseAttention


def window(queries: int, keys: int) -> BlockMask:
    return BlockMask.sliding_window(queries, 20, 0, keys, block=(16, 16))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_same_function_as_dense(bias):
    dense = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    sparse = SparseAttention.from_dense(dense, window)
    x = torch.randn(2, 50, 32)
    padding = torch.arange(50) >= torch.tensor([[50], [30]])
    expected, _ = dense(x, x, x, key_padding_mask=padding, attn_mask=~window(50, 50).to_dense()[0])
    y, _ = sparse(x, ~padding)
    empty = ~(window(50, 50).to_dense()[0] & ~padding[:, None]).any(dim=2)
    torch.testing.assert_close(y[~empty], expected[~empty], rtol=1e-5, atol=1e-5)
    zeros = sparse.output(torch.zeros(32))
    torch.testing.assert_close(y[empty], zeros.expand(int(empty.sum()), 32))


@torch.no_grad()
def test_decoding_repeats_the_whole_sequence():
    layer = SparseAttention(32, 4, window, kv_heads=2)
    x = torch.randn(2, 40, 32)
    whole, _ = layer(x)
    y, past = layer(x[:, :37])
    steps = [y]
    for i in range(37, 40):
        y, past = layer(x[:, i : i + 1], past=past)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_trains_and_survives_deepcopy():
    layer = SparseAttention(32, 4, window, kv_heads=2)
    x = torch.randn(2, 40, 32)
    layer(x)[0].square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.parameters() if p is not layer.key.bias)
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], layer(x)[0])
    assert sorted({name.split(".")[0] for name in layer.state_dict()}) == ["key", "output", "query", "value"]


def test_the_mask_is_made_once_for_a_length():
    made = []

    def counted(queries, keys):
        made.append((queries, keys))
        return window(queries, keys)

    layer = SparseAttention(32, 4, counted)
    for length in (20, 20, 30):
        layer(torch.randn(1, length, 32))
    assert made == [(20, 20), (30, 30)]


def test_errors():
    for features, heads, kv_heads in ((30, 4, 4), (32, 4, 3), (32, 0, 1)):
        with pytest.raises(ValueError, match="SparseAttention: expected heads that divide features"):
            SparseAttention(features, heads, window, kv_heads)
    with pytest.raises(ValueError, match="SparseAttention: expected self-attention without"):
        SparseAttention.from_dense(nn.MultiheadAttention(32, 4, kdim=16, vdim=16), window)
    with pytest.raises(ValueError, match="SparseAttention: expected no dropout"):
        SparseAttention.from_dense(nn.MultiheadAttention(32, 4, dropout=0.1), window)
