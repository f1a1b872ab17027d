import pytest
import torch

from sparsenlp.prune import NM, Block, Unstructured, block_obs, sparsegpt, wanda
from sparsenlp.prune.reconstruct import arrange

PATTERNS = [Unstructured(), Block(8, 1), Block(4, 4), NM(2, 4)]


def problem(rows=32, columns=48, samples=400, seed=0):
    """A weight, and correlated inputs of uneven size (samples, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = (
        torch.randn(samples, columns, generator=generator)
        @ (mix + torch.eye(columns))
        * torch.rand(columns, generator=generator).add(0.1)
    )
    return torch.randn(rows, columns, generator=generator), inputs


def error(weight, new, inputs):
    return ((inputs @ (new - weight).t()).square().sum() / (inputs @ weight.t()).square().sum()).item()


def identity_fisher(weight, size=16):
    return torch.eye(size).expand(weight.numel() // size, size, size)


SOLVERS = {
    "sparsegpt": lambda weight, *rest, **options: sparsegpt(weight, torch.eye(weight.shape[1]), *rest, **options),
    "wanda": lambda weight, *rest, **options: wanda(weight, torch.ones(weight.shape[1]), *rest, **options),
    "block_obs": lambda weight, *rest, **options: block_obs(weight, identity_fisher(weight), *rest, **options),
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_patterns_and_counts_are_exact(solver, pattern):
    weight, _ = problem()
    for sparsity in (0.0, 0.1, 0.3, 0.5):
        mask, new = SOLVERS[solver](weight, pattern, sparsity)
        units = pattern.scores(mask.float())
        unit = weight.numel() // units.numel() * pattern.step
        assert int((~mask).sum()) == round(sparsity * weight.numel() / unit) * unit
        assert torch.equal(new != 0, mask)
        if isinstance(pattern, Block):
            assert set(units.unique().tolist()) <= {0.0, float(pattern.n * pattern.k)}
        if isinstance(pattern, NM) and sparsity == 0.5:
            assert (mask.view(-1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_matrix_is_never_pruned_whole(solver):
    mask, _ = SOLVERS[solver](torch.rand(8, 2) + 1, Block(8, 1), 0.9)
    assert int((~mask).sum()) == 8


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_pruned_stays_pruned(solver, pattern):
    weight, _ = problem()
    first, weight = SOLVERS[solver](weight, pattern, 0.25)
    second, again = SOLVERS[solver](weight, pattern, 0.5, previous=first)
    assert not (second & ~first).any()
    assert int((~second).sum()) == weight.numel() // 2
    assert not again[~second].any()
    third, unchanged = SOLVERS[solver](again, pattern, 0.1, previous=second)
    assert torch.equal(third, second)
    torch.testing.assert_close(unchanged, again)


def test_sparsegpt_by_hand():
    """H⁻¹ = 1/3 [[2, -1], [-1, 2]]: the scores are 1 / (2/3) and 4 / (1/2), and 1 · H₀₁ / H₁₁ moves to the second."""
    mask, new = sparsegpt(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), Unstructured(), 0.5, dampening=0.0
    )
    assert mask.tolist() == [[False, True]]
    torch.testing.assert_close(new, torch.tensor([[0.0, 2.5]]))


def test_sparsegpt_scores_a_block_by_the_sum_over_its_rows():
    """With H = I the columns score 1 + 16, 9 + 4 and 4 + 4.41; the magnitude of single weights would say otherwise."""
    weight = torch.tensor([[1.0, 3.0, 2.0], [4.0, 2.0, 2.1]])
    mask, new = sparsegpt(weight, torch.eye(3), Block(2, 1), 1 / 3)
    assert mask.tolist() == [[True, True, False]] * 2
    assert torch.equal(new, weight * mask)


def test_sparsegpt_solves_least_squares_for_what_goes_first():
    """If all that is pruned comes before all that stays, the update is the exact minimum."""
    weight, inputs = problem(rows=8, columns=16)
    weight[:, :4] *= 1e-3
    mask, new = sparsegpt(weight, inputs.t() @ inputs, Block(8, 1), 0.25, dampening=0.0)
    assert mask.all(dim=0).tolist() == [False] * 4 + [True] * 12
    exact = torch.linalg.lstsq(inputs[:, 4:].double(), inputs.double() @ weight.t().double()).solution.t()
    torch.testing.assert_close(new[:, 4:].double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block_size", [1, 8, 20])
def test_lazy_updates_change_nothing(block_size):
    """2:4 chooses four columns at a time whatever the block size, so only the order of the sums differs."""
    weight, inputs = problem()
    gram = inputs.t() @ inputs
    mask, new = sparsegpt(weight, gram, NM(2, 4), 0.5, block_size=48)
    lazy_mask, lazy = sparsegpt(weight, gram, NM(2, 4), 0.5, block_size=block_size)
    assert torch.equal(mask, lazy_mask)
    torch.testing.assert_close(new, lazy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_reconstructs_better_than_wanda_and_magnitude(pattern):
    weight, inputs = problem()
    gram = inputs.t() @ inputs
    by_sparsegpt = error(weight, sparsegpt(weight, gram, pattern, 0.5, block_size=16)[1], inputs)
    by_wanda = error(weight, wanda(weight, gram.diagonal(), pattern, 0.5)[1], inputs)
    by_magnitude = error(weight, wanda(weight, torch.ones(48), pattern, 0.5)[1], inputs)
    assert by_sparsegpt < by_wanda < by_magnitude


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_refining_reaches_the_least_squares_of_the_mask(pattern):
    weight, inputs = problem()
    gram = inputs.t() @ inputs
    mask, swept = sparsegpt(weight, gram, pattern, 0.5, dampening=0.0)
    same, refined = sparsegpt(weight, gram, pattern, 0.5, dampening=0.0, refine_steps=60)
    assert torch.equal(mask, same)
    assert error(weight, refined, inputs) < error(weight, swept, inputs)
    for row in range(4):
        kept = mask[row]
        exact = torch.linalg.lstsq(inputs[:, kept], inputs @ weight[row][:, None]).solution[:, 0]
        torch.testing.assert_close(refined[row][kept], exact, atol=1e-3, rtol=1e-3)
        assert not refined[row][~kept].any()


def test_sparsegpt_does_not_depend_on_the_scale_of_the_gram_nor_change_its_arguments():
    weight, inputs = problem()
    gram = inputs.t() @ inputs
    before = weight.clone(), gram.clone()
    mask, new = sparsegpt(weight, gram, Unstructured(), 0.5)
    scaled_mask, scaled = sparsegpt(weight, gram / 400, Unstructured(), 0.5)
    assert torch.equal(mask, scaled_mask)
    torch.testing.assert_close(new, scaled)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_sparsegpt_serves_inputs_that_are_never_used():
    weight, inputs = problem()
    inputs[:, 5] = 0
    mask, new = sparsegpt(weight, inputs.t() @ inputs, Block(8, 1), 0.5)
    assert not mask[:, 5].any()
    assert new.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(dtype):
    weight = problem()[0].to(dtype)
    for solve in SOLVERS.values():
        mask, new = solve(weight, Unstructured(), 0.5)
        assert new.dtype == dtype
        assert torch.equal(new, weight * mask)


def test_wanda_by_hand():
    """w² E[x²] is 4, 1, 1, 12 in the first row and 100, 36, 25, 0.03 in the second: two go in each."""
    weight = torch.tensor([[2.0, 1.0, -1.0, 2.0], [10.0, 6.0, -5.0, 0.1]])
    mask, new = wanda(weight, torch.tensor([1.0, 1.0, 1.0, 3.0]), Unstructured(), 0.5)
    assert mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert torch.equal(new, weight * mask)


def random_fisher(groups, size, seed=0):
    factor = torch.randn(groups, size, 2 * size, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.mT / size


def test_obs_matches_the_exact_solution_of_a_quadratic():
    """Loss 1/2 (w - w₀)ᵀ F (w - w₀): minimal, given what is pruned, where the gradient of what stays is zero."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    fisher = random_fisher(4, 6)
    mask, new = block_obs(weight, fisher.inverse(), Unstructured(), 0.5)
    for row in range(4):
        kept, gone = mask[row], ~mask[row]
        moved = torch.linalg.solve(fisher[row][kept][:, kept], fisher[row][kept][:, gone] @ weight[row][gone])
        torch.testing.assert_close(new[row][kept], weight[row][kept] + moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(1, 2), Block(2, 1), Block(1, 3)], ids=str)
def test_obs_removes_the_unit_whose_removal_costs_least(pattern):
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    fisher = random_fisher(1, 12)
    old = arrange(weight, pattern)
    size = 12 // pattern.scores(weight.abs()).numel()

    def cost(unit):
        gone = torch.zeros(12, dtype=torch.bool)
        gone[unit * size : (unit + 1) * size] = True
        schur = fisher[0][gone][:, gone] - fisher[0][gone][:, ~gone] @ torch.linalg.solve(
            fisher[0][~gone][:, ~gone], fisher[0][~gone][:, gone]
        )
        return (old[gone] @ schur @ old[gone]).item()

    best = min(range(12 // size), key=cost)
    mask, _ = block_obs(weight, fisher.inverse(), pattern, size / 12)
    assert arrange(~mask, pattern).nonzero().flatten().tolist() == list(range(best * size, (best + 1) * size))


def test_obs_beats_pruning_without_an_update():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    fisher = random_fisher(16, 32)

    def loss(new):
        change = (new - weight)[:, :, None]
        return (change.mT @ fisher @ change).sum()

    for pattern in (Unstructured(), NM(2, 4), Block(1, 4)):
        mask, new = block_obs(weight, fisher.inverse(), pattern, 0.5)
        assert loss(new) < 0.9 * loss(weight * mask)


def test_arrange_keeps_blocks_together():
    matrix = torch.arange(8).view(4, 2)
    assert arrange(matrix, Block(2, 1)).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert arrange(matrix, NM(1, 2)).tolist() == list(range(8))


WEIGHT = torch.ones(8, 4)
NAN = torch.full((4,), float("nan"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsegpt(WEIGHT, torch.eye(5), Unstructured(), 0.5), r"sparsegpt: expected a gram of shape \(4, 4\)"),
        (lambda: sparsegpt(WEIGHT, torch.diag(NAN), Unstructured(), 0.5), "sparsegpt: expected a finite gram"),
        (lambda: sparsegpt(WEIGHT, torch.zeros(4, 4), Unstructured(), 0.5), "positive definite gram, got .* 0.01"),
        (lambda: sparsegpt(WEIGHT, -torch.eye(4), Unstructured(), 0.5), "expected a positive definite gram"),
        (lambda: sparsegpt(WEIGHT, torch.ones(4, 4).triu(), Unstructured(), 0.5), "expected a symmetric gram"),
        (
            lambda: sparsegpt(WEIGHT, torch.eye(4), Unstructured(), 0.5, dampening=-1),
            "expected a dampening of at least",
        ),
        (lambda: sparsegpt(WEIGHT, torch.eye(4), Unstructured(), 0.5, block_size=0), "expected a block_size of at"),
        (lambda: sparsegpt(WEIGHT, torch.eye(4), Unstructured(), 1.0), "sparsity: expected a fraction"),
        (lambda: sparsegpt(WEIGHT, torch.eye(4), NM(2, 4), 0.6), "sparsity: expected at most 0.5 for 2:4"),
        (lambda: sparsegpt(WEIGHT, torch.eye(4), Block(3, 1), 0.5), "3x1: expected a shape divisible"),
        (lambda: sparsegpt(WEIGHT / 0, torch.eye(4), Unstructured(), 0.5), "sparsegpt: expected a finite weight"),
        (lambda: wanda(WEIGHT, torch.ones(5), Unstructured(), 0.5), r"wanda: expected input_square of shape \(4,\)"),
        (lambda: wanda(WEIGHT, NAN, Unstructured(), 0.5), "wanda: expected input_square finite"),
        (lambda: block_obs(WEIGHT, torch.eye(5)[None], Unstructured(), 0.5), r"block_obs: expected an inverse Fisher"),
        (lambda: block_obs(WEIGHT, torch.eye(4).repeat(8, 1, 1), Block(8, 1), 0.5), "B a multiple of 8"),
        (lambda: block_obs(WEIGHT, -torch.eye(4).repeat(8, 1, 1), Unstructured(), 0.5), "positive definite inverse"),
        (
            lambda: wanda(WEIGHT, torch.ones(4), Unstructured(), 0.5, previous=torch.ones(4, 4).bool()),
            r"wanda: expected a mask of shape \(8, 4\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
