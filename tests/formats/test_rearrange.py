from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp import BlockSparse
from sparsenlp.formats.rearrange import VACANT, nonzero_columns, nonzero_rows, rearrange, take


@st.composite
def layouts(draw, side):
    """(number of old lines, old line of each new one or VACANT): whole blocks shuffled, dropped, with holes, merged."""
    count, seed = draw(st.integers(0, 5)), draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(count, generator=generator)[: draw(st.integers(0, count))]
    lines = groups[:, None] * side + torch.rand(len(groups), side, generator=generator).argsort(1)
    lines[torch.rand(lines.shape, generator=generator) < 0.3] = VACANT
    if draw(st.booleans()) and len(lines) > 1 and side > 1:  # half of the first block beside half of the last
        half = side // 2
        lines[0, half:] = lines[-1, : side - half]
        lines = lines[:-1]
    return count * side, lines.flatten()


@st.composite
def cases(draw):
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    (height, rows), (width, columns) = draw(layouts(n)), draw(layouts(k))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    keep = torch.rand(height // n, width // k, generator=generator) < 0.6
    mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    dense = torch.randn(height, width, generator=generator) * mask * (torch.rand(mask.shape, generator=generator) < 0.5)
    return BlockSparse.from_dense(dense, (n, k), mask), rows, columns


@settings(deadline=None)
@given(cases())
def test_rearrange_is_indexing(case):
    weight, rows, columns = case
    dense = torch.nn.functional.pad(weight.to_dense(), (0, 1, 0, 1))
    result = rearrange(weight, rows, columns).validate()
    expected = BlockSparse.from_dense(dense[rows][:, columns], weight.block)
    assert torch.equal(result.to_dense(), expected.to_dense())
    assert torch.equal(result.crow_indices, expected.crow_indices)
    assert torch.equal(result.col_indices, expected.col_indices)
    assert result.shape == (rows.numel(), columns.numel())
    assert torch.equal(rearrange(weight, rows=rows).validate().to_dense(), dense[rows][:, :-1])
    assert torch.equal(rearrange(weight, columns=columns).validate().to_dense(), dense[:-1][:, columns])


@settings(deadline=None)
@given(cases())
def test_nonzero_rows_and_columns(case):
    weight, _, _ = case
    assert torch.equal(nonzero_rows(weight), (weight.to_dense() != 0).any(1))
    assert torch.equal(nonzero_columns(weight), (weight.to_dense() != 0).any(0))


def test_the_same_matrix_is_returned_where_nothing_changes():
    weight = BlockSparse.from_dense(torch.arange(1.0, 25).reshape(4, 6), (2, 3))
    assert rearrange(weight) is weight
    assert rearrange(weight, torch.arange(4), torch.arange(6)) is weight
    zero_row = BlockSparse.from_dense(torch.tensor([[1.0, 2], [0, 0]]), (2, 1))
    assert rearrange(zero_row, rows=torch.tensor([0, VACANT])) is zero_row


def test_blocks_of_zeros_are_not_stored():
    weight = BlockSparse.from_dense(torch.ones(4, 4), (2, 1))
    values = weight.values.clone()
    values[[1, 6]] = 0
    result = rearrange(replace(weight, values=values)).validate()
    assert result.nnz_blocks == 6
    assert result.col_indices.tolist() == [0, 2, 3, 0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
def test_every_dtype_keeps_its_values_and_scales(dtype):
    dense = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    weight = BlockSparse.from_dense(dense, (2, 4))
    weight = weight.quantize() if dtype == torch.int8 else weight.to(dtype)
    rows = torch.tensor([3, VACANT])
    result = rearrange(weight, rows=rows).validate()
    assert result.values.dtype == dtype
    assert torch.equal(result.to_dense()[0], weight.to_dense()[3])
    assert not result.to_dense()[1].any()
    if weight.scales is not None:
        assert torch.equal(result.scales, torch.stack([weight.scales[3], torch.tensor(1.0)]))


def test_take():
    assert take(torch.tensor([5.0, 6, 7]), torch.tensor([2, VACANT, 0]), 1.0).tolist() == [7, 1, 5]
    assert take(torch.zeros(0), torch.tensor([VACANT]), 4.0).tolist() == [4]
