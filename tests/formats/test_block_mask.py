from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp.formats import BlockMask

BLOCKS = [(16, 16), (32, 16), (16, 48)]


@st.composite
def masks(draw, block=None, shape=None):
    """A random mask with its block: some blocks whole, some empty, some the same, some with no regularity."""
    block = block or draw(st.sampled_from(BLOCKS))
    queries, keys = shape or (draw(st.integers(0, 70)), draw(st.integers(0, 70)))
    heads = draw(st.sampled_from([1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    m, n = block
    kind = torch.randint(0, 4, (heads, -(-queries // m), -(-keys // n)), generator=generator)
    noise = torch.rand(heads, queries, keys, generator=generator) < 0.3
    causal = torch.arange(queries)[:, None] % m >= torch.arange(keys) % n
    kinds = kind.repeat_interleave(m, 1).repeat_interleave(n, 2)[:, :queries, :keys]
    return (kinds == 1) | (kinds == 2) & noise | (kinds == 3) & causal, block


@settings(deadline=None)
@given(masks())
def test_round_trip(case):
    dense, block = case
    mask = BlockMask.from_dense(dense, block).validate()
    assert torch.equal(mask.to_dense().expand_as(dense), dense)
    heads, queries, keys = dense.shape
    some = sum(
        bool(dense[h, i : i + block[0], j : j + block[1]].any())
        for h in range(heads)
        for i in range(0, queries, block[0])
        for j in range(0, keys, block[1])
    )
    assert mask.nnz_blocks == some


@settings(deadline=None)
@given(st.data())
def test_union_and_intersection(data):
    shape = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70)))
    (a, block), (b, _) = data.draw(masks((16, 16), shape)), data.draw(masks((16, 16), shape))
    first, second = BlockMask.from_dense(a, block), BlockMask.from_dense(b, block)
    assert torch.equal((first | second).validate().to_dense(), a | b)
    assert torch.equal((first & second).validate().to_dense(), a & b)


def positions(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None, :]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (50, 50), (64, 64), (1, 70), (20, 90)])
def test_builders(queries, keys, block):
    q, k = positions(queries, keys)
    sizes = {"queries": queries, "keys": keys, "block": block}
    causal = BlockMask.causal(**sizes).validate()
    assert torch.equal(causal.to_dense()[0], k <= q)
    window = BlockMask.sliding_window(left=20, right=3, **sizes).validate()
    assert torch.equal(window.to_dense()[0], (k >= q - 20) & (k <= q + 3))
    special = BlockMask.global_tokens(positions=[0, 37], **sizes).validate()
    assert torch.equal(special.to_dense()[0], (q == 0) | (q == 37) | (k == 0) | (k == 37))
    together = (window | special) & causal
    expected = (window.to_dense() | special.to_dense()) & causal.to_dense()
    assert torch.equal(together.to_dense(), expected)


def test_regular_masks_share_their_patterns():
    assert BlockMask.causal(640).patterns.shape == (1, 64, 64)
    assert BlockMask.sliding_window(640, 100, 100).patterns.shape[0] == 4
    assert BlockMask.causal(640).nnz_blocks == 55


def test_bigbird():
    mask = BlockMask.bigbird(640, window=3, globals_=1, random=2, heads=4).validate()
    kept = mask.to_dense()[:, ::64, ::64]
    row, column = torch.arange(10)[:, None], torch.arange(10)[None, :]
    fixed = ((row - column).abs() <= 1) | (row == 0) | (column == 0)
    assert bool((kept | ~fixed).all())
    assert torch.equal((kept & ~fixed).sum(dim=2).clamp(max=2), (~fixed).sum(dim=1).clamp(max=2).expand(4, 10))
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(mask.to_dense(), BlockMask.bigbird(640, window=3, globals_=1, random=2, heads=4).to_dense())


def test_draw_and_density():
    mask = BlockMask.sliding_window(64, 16, 0, block=(16, 16))
    assert mask.draw() == "+...\n++..\n.++.\n..++"
    assert mask.density == 7 / 16
    assert (mask | BlockMask.from_dense(torch.ones(64, 64).bool(), (16, 16))).draw() == "\n".join(["####"] * 4)
    assert BlockMask.from_dense(torch.zeros(64, 64).bool()).density == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patterns": torch.zeros(1, 16, 16)}, TypeError, "expected patterns of dtype torch.bool"),
        ({"patterns": torch.zeros(16, 16).bool()}, ValueError, r"expected contiguous patterns \(P, m, n\)"),
        ({"patterns": torch.zeros(1, 16, 8).bool()}, ValueError, "expected block sides in multiples of 16, got 16x8"),
        ({"heads": 0}, ValueError, "expected at least 1 head, got 0"),
        ({"heads": 2}, ValueError, "expected 9 contiguous crow_indices"),
        ({"shape": (80, 64)}, ValueError, "expected 6 contiguous crow_indices"),
        ({"shape": (64, 48)}, ValueError, r"expected col_indices in \[0, 3\), got 0 to 3"),
        ({"crow_indices": torch.tensor([0, 1, 3, 5, 7])}, TypeError, "expected crow_indices of dtype torch.int32"),
        ({"crow_indices": torch.tensor([0, 3, 1, 5, 7]).int()}, ValueError, "expected crow_indices never to decrease"),
        (
            {"crow_indices": torch.tensor([0, 2**31 - 1, -(2**31), -1, 7]).int()},
            ValueError,
            "expected crow_indices never to decrease",
        ),
        ({"shape": (64, 2**31)}, ValueError, "expected sizes from 0 to 2147483647, got 64 x 2147483648"),
        ({"shape": (-64, 64)}, ValueError, "expected sizes from 0 to 2147483647, got -64 x 64"),
        ({"crow_indices": torch.tensor([0, 1, 3, 5, 6]).int()}, ValueError, "expected crow_indices from 0 to 7"),
        ({"crow_indices": torch.tensor([0, 2, 3, 5, 7]).int()}, ValueError, "expected col_indices to increase"),
        ({"pattern_indices": torch.zeros(6).int()}, ValueError, "expected 7 contiguous pattern_indices"),
        ({"pattern_indices": torch.full((7,), 2).int()}, ValueError, r"expected pattern_indices in \[-1, 2\)"),
        ({"pattern_indices": torch.full((7,), -2).int()}, ValueError, r"expected pattern_indices in \[-1, 2\)"),
    ],
)
def test_validate(change, error, message):
    mask = BlockMask.sliding_window(64, 16, 0, block=(16, 16))
    with pytest.raises(error, match=f"BlockMask: {message}"):
        replace(mask, **change).validate()


def test_errors():
    with pytest.raises(ValueError, match="expected a bool mask"):
        BlockMask.from_dense(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="multiples of 16, got 8x16"):
        BlockMask.causal(64, block=(8, 16))
    with pytest.raises(ValueError, match="expected masks of the same shape"):
        BlockMask.causal(64) | BlockMask.causal(65)


def test_stack_gives_each_head_its_mask():
    masks = [BlockMask.causal(50, block=(16, 16)), BlockMask.sliding_window(50, 5, 9, block=(16, 16))]
    masks.append(BlockMask.bigbird(50, heads=2, block=(16, 16)))
    stacked = BlockMask.stack(masks).validate()
    assert torch.equal(stacked.to_dense(), torch.cat([mask.to_dense() for mask in masks]))
    with pytest.raises(ValueError, match="expected masks of the same shape and block"):
        BlockMask.stack([BlockMask.causal(50), BlockMask.causal(51)])


def test_a_large_mask_is_drawn_smaller():
    left = torch.zeros(96, 80).bool()
    left[:64, :32] = True
    left[64, 40] = True
    mask = BlockMask.stack([BlockMask.causal(96, 80, block=(16, 16)), BlockMask.from_dense(left, (16, 16))])
    assert mask.draw(1, most=3) == "#..\n#..\n.+."
    text = str(mask)
    assert text.startswith("BlockMask: 96 x 80, blocks 16x16, 2 heads, 40.0% of the blocks\n\n")
    assert text.count("\n\n") == 2
    assert "......" not in mask.draw(1)
