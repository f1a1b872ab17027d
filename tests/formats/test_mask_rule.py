from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsenlp.formats import MaskRule

RULES = [
    MaskRule(),
    MaskRule(window=20, block=16),
    MaskRule(window=0, global_tokens=17, block=32),
    MaskRule(window=5, global_tokens=1, random_blocks=2, block=16),
]


def drawn(rule: MaskRule, length: int) -> torch.Tensor:
    """(length, length) bool: what neither the window nor the global tokens account for."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    window = torch.ones(length, length).bool() if rule.window is None else (q - k).abs() <= rule.window
    fixed = window | (q < rule.global_tokens) | (k < rule.global_tokens)
    fixed = fixed & (k <= q) if rule.causal else fixed
    dense = rule(length).validate().to_dense()[0]
    assert bool((dense | ~fixed).all())
    return dense & ~fixed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_by_definition(rule, causal):
    rest = drawn(replace(rule, causal=causal), 100)
    if not rule.random_blocks:
        assert not bool(rest.any())
        return
    blocks = torch.nn.functional.pad(rest, (0, 12, 0, 12)).unflatten(1, (7, 16)).unflatten(0, (7, 16)).any(3).any(1)
    assert 0 < int(blocks.sum(dim=1).max()) <= rule.random_blocks
    assert not causal or not bool(rest.triu(1).any())
    assert not torch.equal(rest, drawn(replace(rule, causal=causal, seed=1), 100))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_last_queries_attend_as_in_the_whole_sequence(rule):
    """With a cache of keys: also where the blocks of the step lie elsewhere than those of the sequence."""
    rule = replace(rule, causal=True)
    whole = rule(100).to_dense()
    for first, last in ((0, 40), (40, 41), (41, 58), (58, 100)):
        assert torch.equal(rule(last - first, last).to_dense(), whole[:, first:last, :last])


def test_time_follows_the_blocks_that_are_kept():
    """Not the length squared, which would take minutes here."""
    mask = MaskRule(window=64, causal=True)(1, 100_000_000)
    assert mask.nnz_blocks == 2
    assert MaskRule(window=64, causal=True)(4_000).nnz_blocks == 125


def test_errors():
    with pytest.raises(ValueError, match="MaskRule: expected window of at least 0, got -1"):
        MaskRule(window=-1)
    with pytest.raises(ValueError, match="MaskRule: expected random_blocks of at least 0, got -2"):
        MaskRule(random_blocks=-2)
    with pytest.raises(ValueError, match="MaskRule: expected a block in multiples of 16, got 24"):
        MaskRule(block=24)
