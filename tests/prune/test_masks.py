import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp.prune import NM, Block, Threshold, Unstructured, global_masks, local_masks, masks, row_masks

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
@pytest.mark.parametrize("make", [local_masks, row_masks, global_masks])
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


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("make", [local_masks, row_masks, global_masks])
def test_scores_below_zero_rank_as_their_shift_does(make, pattern):
    """Movement scores are signed. Sums over units of one size keep their order when each score rises by the same."""
    scores = {name: (16 * s).round() for name, s in scores_of((32, 24), (16, 64)).items()}
    signed = {name: s - 9 for name, s in scores.items()}
    previous = None
    for sparsity in (0.25, 0.5):
        expected, masks = make(scores, pattern, sparsity, previous), make(signed, pattern, sparsity, previous)
        assert all(torch.equal(masks[name], expected[name]) for name in masks)
        previous = masks


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_row_scope_prunes_every_row_alike(pattern):
    scores = scores_of((32, 64), (16, 64), ties=True)
    mask = row_masks(scores, pattern, 0.5)["layer0"]
    assert (mask.sum(dim=1) == 32).all()
    rows = 8 if pattern == Block(8, 1) else 4
    alone = {str(i): part for i, part in enumerate(scores["layer0"].split(rows))}
    if isinstance(pattern, Block):
        apart = local_masks(alone, pattern, 0.5)
        assert torch.equal(torch.cat(list(apart.values())), mask)


def test_row_scope_goes_on_from_uneven_rows():
    previous = {"a": torch.tensor([[True, True, True, True], [True, False, False, False]])}
    mask = row_masks({"a": torch.arange(8.0).view(2, 4)}, Unstructured(), 0.5, previous)["a"]
    assert mask.tolist() == [[False, False, True, True], [True, False, False, False]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("make", [local_masks, row_masks, global_masks])
def test_strides_and_dtype_of_scores_do_not_matter(make, pattern):
    scores = {"a": torch.randperm(32 * 16, generator=torch.Generator().manual_seed(0)).view(32, 16).float()}
    twisted = {"a": scores["a"].double().t().contiguous().t()}
    assert not twisted["a"].is_contiguous()
    assert torch.equal(make(twisted, pattern, 0.25)["a"], make(scores, pattern, 0.25)["a"])


@pytest.mark.parametrize("count", [1, 7, 100, 1000, 1500])
def test_selection_over_parts_is_that_of_one_sort(count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(1500, generator=generator) * 10 ** torch.randint(-30, 30, (1500,), generator=generator)
    values[::7], values[3::11], values[5::13] = 0.0, -0.0, 1.0
    parts = [masks._order(part) for part in values.split([1000, 1, 499])]
    kept = torch.cat(masks._keep(parts, count))
    assert torch.equal((~kept).nonzero().flatten(), values.argsort(stable=True)[:count].sort().values)


def test_a_threshold_in_each_scope():
    scores = {"a": torch.tensor([[1.0, 4.0], [8.0, 10.0]]), "b": torch.tensor([[0.5, 2.0]])}
    half = Threshold(alpha=0.5)
    assert [m.int().tolist() for m in local_masks(scores, Unstructured(), half).values()] == [
        [[0, 0], [1, 1]],
        [[0, 1]],
    ]
    assert [m.int().tolist() for m in row_masks(scores, Unstructured(), half).values()] == [[[0, 1], [1, 1]], [[0, 1]]]
    assert [m.int().tolist() for m in global_masks(scores, Unstructured(), half).values()] == [
        [[0, 0], [1, 1]],
        [[0, 1]],
    ], "the best of b stays, as global scope keeps at least one unit"
    assert [m.int().tolist() for m in local_masks(scores, Unstructured(), Threshold(absolute=4.0)).values()] == [
        [[0, 1], [1, 1]],
        [[0, 1]],
    ], "4 is not below 4, and one unit stays"


def test_a_threshold_on_blocks_compares_their_aggregates():
    scores = {"a": torch.tensor([[3.0, 1.0], [4.0, 1.0]])}
    for aggregation, value in (("sum", 7.0), ("l2", 5.0), ("mean", 3.5)):
        at = local_masks(scores, Block(2, 1), Threshold(absolute=value), aggregation=aggregation)["a"]
        assert at.tolist() == [[True, False], [True, False]]
        high = local_masks(scores, Block(1, 1), Threshold(absolute=value), aggregation=aggregation)["a"]
        assert int(high.sum()) == 1


def test_an_absolute_threshold_may_be_negative():
    mask = local_masks({"a": torch.tensor([[-2.0, -1.0, 1.0]])}, Unstructured(), Threshold(absolute=-1.0))["a"]
    assert mask.tolist() == [[False, True, True]]


def test_a_threshold_leaves_the_n_best_of_every_m():
    mask = local_masks({"a": torch.tensor([[1.0, 2.0, 3.0, 4.0, 9, 9, 9, 9]])}, NM(2, 4), Threshold(absolute=5.0))["a"]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


def test_a_threshold_never_brings_back():
    previous = {"a": torch.tensor([[False, True, True]])}
    mask = local_masks({"a": torch.tensor([[9.0, 1.0, 2.0]])}, Unstructured(), Threshold(absolute=0.0), previous)["a"]
    assert torch.equal(mask, previous["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha in \[0, 1\], got -0.1"),
        ({"alpha": float("nan")}, r"alpha in \[0, 1\], got nan"),
        ({"absolute": float("inf")}, "a finite absolute value, got inf"),
        ({}, "either absolute or alpha, got absolute=None and alpha=None"),
        ({"absolute": 1.0, "alpha": 0.5}, "either absolute or alpha"),
    ],
)
def test_impossible_thresholds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"Threshold: expected {message}"):
        Threshold(**arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_rank_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="masks: expected finite scores for a"):
        local_masks({"a": torch.tensor([[1.0, bad]])}, Unstructured(), 0.5)


def test_signed_scores_are_refused_where_they_mean_nothing():
    signed = {"a": torch.tensor([[1.0, -1.0], [1.0, 2.0]])}
    with pytest.raises(ValueError, match="expected scores >= 0 for a, as alpha multiplies the highest, got -1"):
        local_masks(signed, Unstructured(), Threshold(alpha=0.5))
    with pytest.raises(ValueError, match="a: aggregation: expected sum or mean for scores below zero, got l2"):
        local_masks(signed, Block(2, 1), 0.5, aggregation="l2")


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
