"""SparseConv1d against nn.Conv1d with the same zeros."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from sparsenlp import SparseConv1d, SparseLinear
from sparsenlp.layers.sparse_conv1d import filter_matrix

BLOCK = (8, 4)
SPACE = [
    {},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 4, "padding": "valid", "stride": 3},
    {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 5},
    *({"kernel_size": 4, "padding": "same", "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "circular"},
]


def pruned(block=BLOCK, **options):
    """A convolution with half of the blocks of each tap zero."""
    torch.manual_seed(0)
    conv = nn.Conv1d(**({"in_channels": 12, "out_channels": 16, "kernel_size": 3} | options))
    n, k = block
    keep = torch.rand(16 // n, 12 // k, conv.kernel_size[0]) < 0.5
    with torch.no_grad():
        conv.weight *= keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    return conv


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own layer
@pytest.mark.parametrize("options", SPACE, ids=str)
def test_same_function_and_gradients(options):
    dense = pruned(**options)
    sparse = SparseConv1d.from_dense(deepcopy(dense), BLOCK)
    assert sparse.filters.weight.sparsity > 0.2
    for shape in ((2, 12, 19), (12, 19)):
        x, same = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        expected, got = dense(x), sparse(same)
        torch.testing.assert_close(got, expected)
        slope = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        (expected * slope).sum().backward()
        (got * slope).sum().backward()
        torch.testing.assert_close(same.grad, x.grad)
    back = sparse.to_dense()
    assert {name: getattr(back, name) for name in ("kernel_size", "stride", "padding", "padding_mode")} == {
        name: getattr(dense, name) for name in ("kernel_size", "stride", "padding", "padding_mode")
    }
    torch.testing.assert_close(back.weight, dense.weight)
    expected = dense.weight.grad.transpose(1, 2).flatten(1)
    stored = (dense.weight != 0).transpose(1, 2).flatten(1)
    grad = sparse.filters.weight.to(torch.float32)
    grad = type(grad)(grad.crow_indices, grad.col_indices, sparse.filters.values.grad, grad.shape).to_dense()
    torch.testing.assert_close(grad, expected * stored)
    if dense.bias is not None:
        torch.testing.assert_close(sparse.filters.bias.grad, dense.bias.grad)


def test_mask_decides_what_is_stored():
    conv = nn.Conv1d(12, 16, 3).eval().requires_grad_(False)
    mask = torch.zeros_like(conv.weight)
    mask[:8, :4, 1] = 1
    sparse = SparseConv1d.from_dense(conv, BLOCK, mask, "relu")
    assert sparse.filters.weight.nnz_blocks == 1
    assert sparse.filters.bias is conv.bias
    assert not sparse.training
    assert not sparse.filters.values.requires_grad
    x = torch.randn(2, 12, 9)
    with torch.no_grad():
        conv.weight *= mask
    torch.testing.assert_close(sparse(x), conv(x).relu())


@pytest.mark.parametrize("options", SPACE[3:6], ids=str)
def test_linear_filters(options):
    """Split, the convolution computes the same through an nn.Linear, which masks and hooks reach."""
    conv = nn.Conv1d(12, 16, **options)
    twin = SparseConv1d.split(conv)
    assert type(twin.filters) is nn.Linear
    assert twin.filters.bias is conv.bias
    seen = []
    twin.filters.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    x, keep = torch.randn(2, 12, 19), torch.rand_like(conv.weight) < 0.5
    torch.testing.assert_close(twin(x), conv(x))
    assert seen == [12 * conv.kernel_size[0]]
    with torch.no_grad():
        conv.weight *= keep
        twin.filters.weight *= filter_matrix(keep)
    torch.testing.assert_close(twin(x), conv(x))
    assert torch.equal(twin.to_dense().weight, conv.weight)
    twin.filters = SparseLinear.from_dense(twin.filters, (8, 1))
    torch.testing.assert_close(twin(x), conv(x))


def test_an_embedding_is_read_as_it_lies():
    """Channels are last in memory in x and in y, so nothing is copied but the result."""
    sparse = SparseConv1d.from_dense(pruned(), BLOCK)
    y = sparse(nn.Embedding(50, 12)(torch.randint(50, (2, 19))).transpose(1, 2))
    assert y.shape == (2, 16, 17)
    assert y.transpose(1, 2).is_contiguous()


def test_quantized():
    dense = pruned()
    sparse = SparseConv1d.from_dense(dense, BLOCK)
    x = torch.randn(3, 12, 30)
    for int8 in (sparse.quantize(), sparse.quantize(float(x.abs().max()) / 127)):
        assert int8.filters.values.dtype == torch.int8
        with torch.no_grad():
            torch.testing.assert_close(int8(x), dense(x), rtol=0.05, atol=0.05)


def test_state_dict():
    sparse = SparseConv1d.from_dense(pruned(padding=1), BLOCK)
    names = {"filters.crow_indices", "filters.col_indices", "filters.values", "filters.bias"}
    assert sparse.state_dict().keys() == names
    filters = SparseLinear(36, 16, BLOCK, sparse.filters.weight.nnz_blocks)
    other = SparseConv1d(12, 16, 3, padding=1, filters=filters)
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(2, 12, 9)
    assert torch.equal(other(x), sparse(x))
    broken = sparse.state_dict()
    broken["filters.col_indices"] = broken["filters.col_indices"] + 100
    with pytest.raises(ValueError, match=r"filters: .*expected col_indices"):
        other.load_state_dict(broken)


def test_repr():
    sparse = SparseConv1d.from_dense(pruned(stride=2, padding=1), BLOCK)
    assert repr(sparse).startswith(
        "SparseConv1d(\n  12, 16, kernel_size=(3,), stride=(2,), padding=(1,)\n  (filters): SparseLinear("
    )


CONV = SparseConv1d.from_dense(pruned(), BLOCK)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SparseConv1d.from_dense(nn.Linear(8, 8), BLOCK), TypeError, "expected an nn.Conv1d, got Linear"),
        (lambda: SparseConv1d.from_dense(nn.Conv1d(8, 8, 3, groups=2), BLOCK), ValueError, "groups = 1, got 2"),
        (
            lambda: SparseConv1d.from_dense(nn.Conv1d(12, 16, 3), BLOCK, torch.ones(16, 36)),
            ValueError,
            r"expected a mask of shape \(16, 12, 3\), got \(16, 36\)",
        ),
        (
            lambda: SparseConv1d.from_dense(nn.Conv1d(12, 20, 3), BLOCK),
            ValueError,
            "expected a shape divisible by blocks of 8x4, got 20x36",
        ),
        (
            lambda: SparseConv1d(12, 16, 2, filters=CONV.filters),
            ValueError,
            "expected filters of 16 x 24, got 16 x 36",
        ),
        (
            lambda: SparseConv1d(12, 16, 3, padding="some", filters=CONV.filters),
            ValueError,
            "expected a padding of same, valid or a number, got 'some'",
        ),
        (
            lambda: SparseConv1d(12, 16, 3, stride=2, padding="same", filters=CONV.filters),
            ValueError,
            "expected stride 1 with padding='same', got 2",
        ),
        (
            lambda: SparseConv1d(12, 16, 3, padding_mode="wrap", filters=CONV.filters),
            ValueError,
            "expected a padding_mode among zeros, reflect, replicate, circular, got 'wrap'",
        ),
        (
            lambda: SparseConv1d(12, 16, 3, dilation=0, filters=CONV.filters),
            ValueError,
            "dilation of at least 1, got 0",
        ),
        (lambda: CONV(torch.zeros(2, 11, 9)), ValueError, r"expected x \(B, 12, L\) or \(12, L\), got \(2, 11, 9\)"),
        (lambda: CONV(torch.zeros(12)), ValueError, r"expected x \(B, 12, L\)"),
        (lambda: CONV(torch.zeros(2, 12, 2)), ValueError, "expected sequences of at least 3 positions, got 2"),
        (
            lambda: SparseConv1d.split(nn.Conv1d(12, 16, 3)).quantize(),
            TypeError,
            "expected sparse filters to quantize, got Linear",
        ),
        (lambda: CONV(torch.zeros(2, 12, 9).double()), TypeError, "expected x of dtype torch.float32"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
