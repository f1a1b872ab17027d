from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp.formats import NM
from sparsenlp.formats.nm import index_bits, pack_indices


@st.composite
def matrices(draw):
    """A random N:M sparse matrix with its pattern: (dense, (n, m))."""
    m = draw(st.integers(1, 9))
    n = draw(st.integers(1, m))
    rows, groups = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    seed = draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(rows, groups, m, generator=generator).argsort(dim=2)
    kept = places < torch.randint(0, n + 1, (rows, groups, 1), generator=generator)
    dense = torch.arange(1.0, rows * groups * m + 1).reshape(rows, groups, m)
    return (dense * kept).flatten(1).reshape(rows, groups * m), (n, m)


@settings(deadline=None)
@given(matrices())
def test_round_trip(matrix):
    dense, (n, m) = matrix
    weight = NM.from_dense(dense, (n, m)).validate()
    assert torch.equal(weight.to_dense(), dense)
    assert weight.values.shape == (dense.shape[0], dense.shape[1] // m * n)
    assert weight.density == (pytest.approx(n / m) if dense.numel() else 0.0)
    assert weight.nbytes == weight.values.numel() * 5


@settings(deadline=None)
@given(matrices())
def test_packed_indices_unpack(matrix):
    dense, pattern = matrix
    weight = NM.from_dense(dense, pattern)
    packed, bits = pack_indices(weight.indices, pattern), index_bits(pattern)
    shifts = torch.arange(0, 8, bits)
    unpacked = (packed.long()[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)
    count = weight.indices.shape[1]
    assert unpacked.shape[1] == -(-count // 32) * 32
    assert torch.equal(unpacked[:, :count], weight.indices.long())
    assert not unpacked[:, count:].any()


def test_groups_with_fewer_nonzeros_store_their_lowest_zeros():
    weight = NM.from_dense(torch.tensor([[0.0, 0, 0, 7, 0, 0, 0, 0, 5, 0, 6, 0]]), (2, 4)).validate()
    assert weight.indices.tolist() == [[0, 3, 0, 1, 0, 2]]
    assert weight.values.tolist() == [[0, 7, 0, 0, 5, 6]]
    assert weight.sparsity == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_keeps_indices(dtype):
    weight = NM.from_dense(torch.tensor([[1.0, 0, 2, 0]])).to(dtype).validate()
    assert weight.values.dtype == dtype
    assert weight.indices.dtype == torch.uint8
    assert NM.from_dense(weight.to_dense()).values.dtype == dtype


def good() -> NM:
    return NM.from_dense(torch.tensor([[1.0, 2, 0, 0, 0, 3, 0, 4], [0, 5, 6, 0, 7, 0, 0, 8]]))


def test_quantize_keeps_half_a_step():
    weight = NM.from_dense(torch.tensor([[1.0, 0, -3, 0], [0, 0, 0, 0], [0, 0.5, 0.26, 0]]))
    int8 = weight.quantize().validate()
    assert int8.values.tolist() == [[42, -127], [0, 0], [127, 66]]
    torch.testing.assert_close(int8.scales, torch.tensor([3 / 127, 1, 0.5 / 127]))
    assert bool(((int8.to_dense() - weight.to_dense()).abs() <= int8.scales[:, None] / 2).all())
    assert int8.nbytes == 6 + 6 + 12
    with pytest.raises(ValueError, match="expected finite weights to quantize"):
        NM.from_dense(torch.tensor([[torch.inf, 0, 0, 0]])).quantize()


def index(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"values": torch.ones(2, 4, dtype=torch.int32)},
            TypeError,
            "expected floating-point or int8 values, got torch.int32",
        ),
        ({"indices": good().indices.int()}, TypeError, "expected indices of dtype torch.uint8, got torch.int32"),
        ({"indices": good().indices.to("meta")}, ValueError, "expected indices on cpu, got meta"),
        ({"scales": torch.ones(2)}, TypeError, "expected scales with int8 values and only then, got torch.float32"),
        ({"values": good().quantize().values}, TypeError, "expected scales with int8 values and only then"),
        ({"values": torch.ones(2, 3)}, ValueError, r"expected values of shape \(2, 4\), got \(2, 3\)"),
        ({"indices": index([0, 1, 0])}, ValueError, r"expected indices of shape \(2, 4\), got \(1, 3\)"),
        ({"shape": (2, 2**33)}, ValueError, "expected sizes from 0 to 2147483647, got 2 x 8589934592"),
        ({"shape": (2, 6)}, ValueError, "columns divisible by 4, got shape 2x6"),
        ({"shape": (3, 8)}, ValueError, r"expected values of shape \(3, 4\)"),
        ({"pattern": (0, 4)}, ValueError, "0 < n <= m <= 256, got 0:4"),
        ({"pattern": (5, 4)}, ValueError, "0 < n <= m <= 256, got 5:4"),
        ({"indices": index([0, 1, 1, 4], [1, 2, 0, 3])}, ValueError, r"indices in \[0, 4\), got 4"),
        ({"indices": index([0, 1, 1, 3], [2, 1, 0, 3])}, ValueError, "increase within each group"),
        ({"indices": index([0, 1, 1, 3], [1, 1, 0, 3])}, ValueError, "increase within each group"),
    ],
)
def test_validate_names_the_fault(change, error, message):
    with pytest.raises(error, match=message):
        replace(good().validate(), **change).validate()


@pytest.mark.parametrize(
    ("dense", "pattern", "message"),
    [
        (torch.ones(2, 4), (2, 4), "at most 2 nonzeros in every group of 4, got 4"),
        (torch.zeros(2, 6), (2, 4), "columns divisible by 4, got shape 2x6"),
        (torch.zeros(8), (2, 4), r"expected a 2-D matrix, got shape \(8,\)"),
        (torch.zeros(2, 8), (0, 4), "0 < n <= m <= 256, got 0:4"),
        (torch.zeros(2, 257), (1, 257), "0 < n <= m <= 256, got 1:257"),
    ],
)
def test_from_dense_errors(dense, pattern, message):
    with pytest.raises(ValueError, match=message):
        NM.from_dense(dense, pattern)


def test_only_small_groups_pack():
    with pytest.raises(ValueError, match="groups of at most 16 to pack indices, got 17"):
        pack_indices(index([0, 1]), (2, 17))
