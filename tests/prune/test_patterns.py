import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp.prune import NM, Block, Unstructured, parse_pattern


@pytest.mark.parametrize("text", ["unstructured", "8x1", "4x4", "1x16", "2:4", "1:4", "4:8"])
def test_parse_is_the_inverse_of_str(text):
    assert str(parse_pattern(text)) == text


def test_parse_reads_rows_by_columns():
    assert parse_pattern("8x1") == Block(n=8, k=1)
    assert parse_pattern("2:4") == NM(n=2, m=4)


@pytest.mark.parametrize("text", ["", "8", "8x", "8*1", "2:4:8", "-1x4", "Unstructured"])
def test_parse_refuses_anything_else(text):
    with pytest.raises(ValueError, match='pattern: expected "unstructured"'):
        parse_pattern(text)


def test_block_scores_are_sums_over_blocks():
    elementwise = torch.arange(24.0).view(4, 6)
    expected = torch.tensor([[0 + 1 + 2 + 6 + 7 + 8, 3 + 4 + 5 + 9 + 10 + 11], [12 * 6 + 24, 12 * 6 + 42]]).float()
    torch.testing.assert_close(Block(2, 3).scores(elementwise), expected)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5), k=st.integers(1, 5), rows=st.integers(1, 4), cols=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_block_expand_repeats_each_unit(n, k, rows, cols, seed):
    unit_mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask = Block(n, k).expand(unit_mask, (rows * n, cols * k))
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.kron(unit_mask.int(), torch.ones(n, k, dtype=torch.int)).bool())


def test_nm_protects_the_best_and_scores_a_group_by_its_loss():
    elementwise = torch.tensor([[5.0, 1.0, 2.0, 7.0, 1.0, 1.0, 1.0, 1.0]])
    inf = torch.inf
    assert NM(2, 4).scores(elementwise).tolist() == [[inf, 3.0, 3.0, inf, 2.0, 2.0, inf, inf]]
    assert NM(1, 4).scores(elementwise).tolist() == [[8.0, 8.0, 8.0, inf, 3.0, 3.0, 3.0, inf]]


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_weights_are_the_units(pattern):
    unit_mask = torch.tensor([[True, False, True, False]])
    assert torch.equal(pattern.expand(unit_mask, (1, 4)), unit_mask)


@pytest.mark.parametrize(
    ("pattern", "message"), [(Block(8, 1), "8x1: .* got 12x6"), (NM(2, 4), "2:4: .* got shape 12x6")]
)
def test_shapes_that_do_not_divide_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        pattern.scores(torch.zeros(12, 6))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(1, 1), NM(2, 4)])
@pytest.mark.parametrize("shape", [(4,), (2, 4, 4), (0, 4)])
def test_only_nonempty_matrices_have_units(pattern, shape):
    with pytest.raises(ValueError, match="nonempty 2-D matrix"):
        pattern.scores(torch.zeros(shape))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 2), NM(2, 4)])
def test_expand_refuses_a_mask_of_other_units(pattern):
    with pytest.raises(ValueError, match="expected a unit mask of shape"):
        pattern.expand(torch.ones(3, 3, dtype=torch.bool), (4, 8))


@pytest.mark.parametrize(
    ("make", "message"), [(lambda: Block(0, 4), "sides of at least 1, got 0x4"), (lambda: NM(4, 4), "got 4:4")]
)
def test_impossible_patterns_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
