from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsenlp import BlockSparse
from sparsenlp.formats.block import check_count


@st.composite
def matrices(draw):
    """A random block-sparse matrix with its block shape: (dense, block)."""
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows, cols = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    keep = draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    keep = torch.tensor(keep, dtype=torch.bool).reshape(rows, cols)
    dense = torch.arange(1.0, rows * n * cols * k + 1).reshape(rows * n, cols * k)
    return dense * keep.repeat_interleave(n, 0).repeat_interleave(k, 1), (n, k)


@settings(deadline=None)
@given(matrices())
def test_round_trip(matrix):
    dense, block = matrix
    weight = BlockSparse.from_dense(dense, block).validate()
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(weight.reblock((1, 1)).validate().to_dense(), dense)
    stored = weight.values.numel()
    assert weight.density == (stored / dense.numel() if dense.numel() else 0.0)
    assert torch.allclose(weight.row_density() * (dense.shape[1] // block[1]), weight.crow_indices.diff().float())


@settings(deadline=None)
@given(matrices())
def test_agrees_with_torch_bsr(matrix):
    dense, block = matrix
    if 0 in dense.shape:
        return
    expected = dense.to_sparse_bsr(block)
    weight = BlockSparse.from_dense(dense, block)
    assert torch.equal(weight.crow_indices, expected.crow_indices().int())
    assert torch.equal(weight.col_indices, expected.col_indices().int())
    assert torch.equal(weight.values, expected.values())


def test_mask_keeps_blocks_that_hold_only_zeros():
    mask = torch.zeros(4, 4)
    mask[0, 1] = 1
    weight = BlockSparse.from_dense(torch.zeros(4, 4), (2, 2), mask)
    assert weight.nnz_blocks == 1
    assert weight.sparsity == 0.75


@settings(deadline=None)
@given(matrices())
def test_quantized_weights_are_within_half_a_scale(matrix):
    dense, block = matrix
    dense = dense.repeat(1, 4).sin()  # K becomes a multiple of 4 k
    weight = BlockSparse.from_dense(dense, block)
    quantized = weight.quantize().validate()
    assert quantized.values.dtype == torch.int8
    assert quantized.block[1] % 4 == 0
    error = (quantized.to_dense() - dense).abs()
    assert bool((error <= quantized.scales[:, None] * 0.5001).all())
    assert torch.equal(quantized.dequantize().to_dense(), quantized.to_dense())


def test_a_row_of_zeros_quantizes_to_zeros():
    dense = torch.ones(8, 8)
    dense[3] = 0
    weight = BlockSparse.from_dense(dense, (8, 4)).quantize().validate()
    assert weight.scales[3] == 1
    assert torch.equal(weight.to_dense()[3], torch.zeros(8))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (BlockSparse.from_dense(torch.ones(8, 6), (8, 1)), "divisible by blocks of 8x4, got 8x6"),
        (BlockSparse.from_dense(torch.full((8, 4), torch.inf), (8, 4)), "expected finite weights to quantize"),
        (BlockSparse.from_dense(torch.full((8, 4), torch.nan), (8, 4)), "expected finite weights to quantize"),
    ],
)
def test_quantize_errors(weight, message):
    with pytest.raises(ValueError, match=message):
        weight.quantize()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scales": None}, TypeError, "expected scales with int8 values and only then"),
        ({"scales": torch.ones(7)}, ValueError, r"expected float32 scales of shape \(8,\)"),
        ({"scales": torch.ones(8, dtype=torch.float64)}, ValueError, "expected float32 scales"),
        ({"scales": torch.tensor([1.0] * 7 + [torch.inf])}, ValueError, "expected finite scales above 0"),
        ({"scales": torch.tensor([1.0] * 7 + [torch.nan])}, ValueError, "expected finite scales above 0"),
        ({"scales": torch.zeros(8)}, ValueError, "expected finite scales above 0"),
        ({"values": torch.full((1, 8, 4), -128, dtype=torch.int8)}, ValueError, r"in \[-127, 127\], got -128"),
        ({"values": torch.ones(1, 8, 4)}, TypeError, "expected scales with int8 values and only then"),
        ({"values": torch.ones(1, 8, 2, dtype=torch.int8), "shape": (8, 2)}, ValueError, "k a multiple of 4, got 2"),
    ],
)
def test_validate_names_the_fault_of_int8(change, error, message):
    weight = BlockSparse.from_dense(torch.ones(8, 4), (8, 4)).quantize()
    with pytest.raises(error, match=message):
        replace(weight, **change).validate()


def test_memory_is_values_and_indices():
    weight = BlockSparse.from_dense(torch.randn(64, 64), (8, 1))
    assert weight.nbytes == 4 * (64 * 64 + 8 * 64 + 9)
    assert weight.reblock((8, 4)).quantize().nbytes == 64 * 64 + 4 * (8 * 16 + 9 + 64)


def good() -> BlockSparse:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).repeat_interleave(2, 0)
    return BlockSparse.from_dense(torch.ones(6, 3) * mask, (2, 1))


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"crow_indices": torch.tensor([0, 2, 2, 4])}, TypeError, "expected crow_indices of dtype torch.int32"),
        ({"col_indices": torch.tensor([0, 2, 1, 2])}, TypeError, "expected col_indices of dtype torch.int32"),
        ({"crow_indices": index(0, 2, 4)}, ValueError, "expected 4 crow_indices, got 3"),
        ({"crow_indices": index(0, 2, 2, 5)}, ValueError, "from 0 to 4, got 0 to 5"),
        ({"crow_indices": index(1, 2, 2, 4)}, ValueError, "from 0 to 4, got 1 to 4"),
        ({"crow_indices": index(0, 3, 2, 4)}, ValueError, "never to decrease"),
        ({"col_indices": index(0, 2, 1)}, ValueError, "expected 4 col_indices, got 3"),
        ({"col_indices": index(0, 2, 1, 3)}, ValueError, r"in \[0, 3\), got 0 to 3"),
        ({"col_indices": index(-1, 2, 1, 2)}, ValueError, r"in \[0, 3\), got -1 to 2"),
        ({"col_indices": index(2, 0, 1, 2)}, ValueError, "increase within each block row"),
        ({"col_indices": index(0, 2, 1, 1)}, ValueError, "increase within each block row"),
        ({"col_indices": torch.zeros(8, dtype=torch.int32)[::2]}, ValueError, "1-D and contiguous"),
        ({"values": torch.ones(4, 2, 1, dtype=torch.int32)}, TypeError, "expected floating-point or int8 values"),
        ({"values": torch.ones(4, 2)}, ValueError, r"expected values of shape \(nnzb, n, k\)"),
        ({"shape": (6, 2**31)}, ValueError, "expected sizes from 0 to 2147483647, got 6 x 2147483648"),
        ({"shape": (-2, 3)}, ValueError, "expected sizes from 0 to 2147483647, got -2 x 3"),
        ({"values": torch.ones(4, 4, 1)}, ValueError, "divisible by blocks of 4x1, got 6x3"),
        ({"values": torch.ones(4, 2, 1, device="meta")}, ValueError, "expected crow_indices on meta"),
    ],
)
def test_validate_names_the_fault(change, error, message):
    weight = good().validate()
    parts = {name: getattr(weight, name) for name in ("crow_indices", "col_indices", "values", "shape")}
    with pytest.raises(error, match=message):
        BlockSparse(**(parts | change)).validate()


EDGES = [-(2**31), -(2**31) + 1, -2, -1, 0, 1, 2, 3, 4, 5, 2**30, 2**31 - 2, 2**31 - 1]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(EDGES), min_size=0, max_size=4),
    st.lists(st.sampled_from(EDGES), min_size=0, max_size=3),
)
@example([2**31 - 1, -(2**31), -1], [])
@example([1, 2**31 - 1, -(2**31)], [0, 2])
def test_validate_accepts_only_rows_that_lie_in_the_matrix(inner, columns):
    """Against the same rules in Python's integers, which do not go round."""
    crow = [0, *inner, len(columns)]
    rows = [columns[a:b] for a, b in pairwise(crow)]
    right = all(a <= b for a, b in pairwise(crow)) and all(0 <= column < 3 for column in columns)
    right = right and all(a < b for row in rows for a, b in pairwise(row))
    values = torch.ones(len(columns), 2, 1)
    weight = BlockSparse(index(*crow), index(*columns), values, (2 * len(rows), 3))
    if right:
        weight.validate()
    else:
        with pytest.raises(ValueError, match="expected"):
            weight.validate()


def test_more_blocks_than_indices_can_count_are_refused():
    with pytest.raises(ValueError, match="expected at most 2147483647 blocks, got 2147483648; choose larger blocks"):
        check_count("BlockSparse", 2**31)
    check_count("BlockSparse", 2**31 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(6, 4), (4, 1)), "divisible by blocks of 4x1, got 6x4"),
        ((torch.ones(6, 4), (2, 3)), "divisible by blocks of 2x3, got 6x4"),
        ((torch.ones(6), (2, 1)), "expected a 2-D matrix"),
        ((torch.ones(6, 4), (0, 1)), "at least 1, got 0x1"),
        ((torch.ones(6, 4), (2, 1), torch.ones(6, 5)), r"expected a mask of shape \(6, 4\)"),
    ],
)
def test_from_dense_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockSparse.from_dense(*arguments)
