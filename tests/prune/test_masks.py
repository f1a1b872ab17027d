import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp.prune import NM, Block, Unstructured, global_masks, local_masks

PATTERNS = [Unstructured(), Block(8, 1), Block(4, 4), NM(2, 4)]


def scores_of(*shapes, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"layer{i}": torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}
    return {name: (4 * s).round() for name, s in scores.items()} if ties else scores


def zeros(mask):
    return int((~mask).sum())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("make", [local_masks, global_masks])
def test_counts_are_exact(make, pattern, ties):
    scores = scores_of((32, 24), (16, 64), ties=ties)
    for sparsity in (0.0, 0.1, 0.25, 0.4375, 0.5):
        masks = make(scores, pattern, sparsity)
        if make is local_masks:
            for mask in masks.values():
                unit = mask.numel() // pattern.scores(mask.float()).numel() * pattern.step
                assert zeros(mask) == round(sparsity * mask.numel() / unit) * unit
        unit = 1792 // sum(pattern.scores(s).numel() for s in scores.values()) * pattern.step
        if make is global_masks:
            assert sum(map(zeros, masks.values())) == round(sparsity * 1792 / unit) * unit


def test_constant_scores_still_give_exact_counts():
    scores = {"a": torch.zeros(10, 10), "b": torch.ones(10, 10)}
    assert zeros(local_masks(scores, Unstructured(), 0.37)["a"]) == 37
    masks = global_masks(scores, Unstructured(), 0.37)
    assert (zeros(masks["a"]), zeros(masks["b"])) == (74, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), sparsity=st.floats(0, 0.9))
def test_the_lowest_blocks_go(seed, sparsity):
    scores = scores_of((16, 8), seed=seed)["layer0"]
    mask = local_masks({"a": scores}, Block(4, 2), sparsity)["a"]
    units = Block(4, 2).scores(scores)
    kept = Block(4, 2).scores(mask.float()) > 0
    assert not kept.all() or sparsity < 0.5 / units.numel() + 1e-9
    if not kept.all():
        assert units[kept].min() >= units[~kept].max()


def test_global_scope_compares_layers_by_raw_scores():
    scores = {"low": torch.full((20, 20), 1.0), "high": torch.full((20, 20), 2.0)}
    masks = global_masks(scores, Unstructured(), 0.5)
    assert zeros(masks["low"]) == 396, "1 % of the starved matrix is kept"
    assert zeros(masks["high"]) == 4, "and the total is exact"


def test_global_scope_refuses_a_sparsity_below_its_floor():
    with pytest.raises(ValueError, match=r"expected a sparsity of at most 0\.9900, .* got 0\.995"):
        global_masks(scores_of((20, 20), (40, 10)), Unstructured(), 0.995)


def test_a_matrix_is_never_pruned_whole():
    masks = local_masks(scores_of((8, 2)), Block(8, 1), 0.9)
    assert zeros(masks["layer0"]) == 8


def test_nm_masks_have_n_of_every_m_once_full():
    scores = scores_of((8, 32), ties=True)
    groups = local_masks(scores, NM(2, 4), 0.5)["layer0"].view(8, 8, 4)
    assert (groups.sum(-1) == 2).all()
    best = scores["layer0"].view(8, 8, 4).sort(-1).values[..., 2:].sum(-1)
    torch.testing.assert_close((scores["layer0"].view(8, 8, 4) * groups).sum(-1), best)


def test_nm_on_the_way_makes_the_cheapest_groups_first():
    scores = scores_of((8, 32))
    groups = local_masks(scores, NM(2, 4), 0.125)["layer0"].view(-1, 4)
    done = groups.sum(-1) == 2
    assert int(done.sum()) == 16
    assert (groups[~done].sum(-1) == 4).all()
    loss = scores["layer0"].view(-1, 4).sort(-1).values[:, :2].sum(-1)
    assert loss[done].max() <= loss[~done].min()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("make", [local_masks, global_masks])
def test_what_is_pruned_stays_pruned(make, pattern):
    shapes = (32, 24), (16, 64)
    masks = None
    for step, sparsity in enumerate((0.1, 0.3, 0.45, 0.5)):
        tighter = make(scores_of(*shapes, seed=step), pattern, sparsity, masks)
        if masks is not None:
            for name, mask in tighter.items():
                assert not (mask & ~masks[name]).any()
        masks = tighter
    assert sum(map(zeros, masks.values())) == 1792 // 2
    again = make(scores_of(*shapes, seed=9), pattern, 0.2, masks)
    assert all(torch.equal(again[name], masks[name]) for name in masks)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_scores_that_rank_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="masks: expected finite scores >= 0 for a"):
        local_masks({"a": torch.tensor([[1.0, bad]])}, Unstructured(), 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        local_masks(scores_of((4, 4)), Unstructured(), sparsity)


def test_sparsity_beyond_the_pattern_is_refused():
    with pytest.raises(ValueError, match=r"at most 0.5 for 2:4, got 0.6"):
        global_masks(scores_of((4, 4)), NM(2, 4), 0.6)


def test_the_error_names_the_matrix_that_does_not_divide():
    with pytest.raises(ValueError, match=r"layer1: 8x1: .* got 12x4"):
        local_masks(scores_of((16, 4), (12, 4)), Block(8, 1), 0.5)
