import itertools

import pytest
import torch

from sparsenlp.prune import Block, exact_obs, obs, sparsegpt


def problem(rows=16, columns=32, tokens=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 2 * mixing)
    return torch.randn(rows, columns, generator=generator), x.t() @ x


def error(weight, new, gram):
    """Squared error of the outputs over their square."""
    difference = (new - weight).double()
    return float(torch.trace(difference @ gram.double() @ difference.t()) / torch.trace(weight @ gram @ weight.t()))


def best_for(weight, mask, gram):
    """Least squares on the weights of each row that a mask keeps."""
    new = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        right = gram.double()[kept] @ weight[row].double()
        new[row, kept] = torch.linalg.solve(gram.double()[kept][:, kept], right)
    return new


def units(mask, n, k):
    return mask.unflatten(0, (-1, n)).unflatten(2, (-1, k)).float().mean(dim=(1, 3))


@pytest.mark.parametrize(("n", "k"), [(8, 1), (4, 1), (1, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("at_once", [1, 16])
def test_what_remains_is_the_least_squares_solution_for_the_mask(n, k, at_once):
    weight, gram = problem()
    mask, new = exact_obs(weight, gram, Block(n, k), 0.5, dampening=0.0, at_once=at_once)
    assert set(units(mask, n, k).flatten().tolist()) == {0.0, 1.0}
    assert (units(mask, n, k).sum(dim=1) == 32 // k // 2).all()
    assert not new[~mask].any()
    torch.testing.assert_close(new.double(), best_for(weight, mask, gram), rtol=1e-3, atol=1e-3)


def test_one_block_goes_where_it_costs_least():
    weight, gram = problem(rows=4, columns=6)
    mask, _ = exact_obs(weight, gram, Block(4, 1), 1 / 6, dampening=0.0)
    costs = []
    for column in range(6):
        candidate = torch.ones_like(weight, dtype=torch.bool)
        candidate[:, column] = False
        costs.append(error(weight, best_for(weight, candidate, gram), gram))
    assert (~mask[0]).nonzero().item() == costs.index(min(costs))


def test_close_to_the_best_of_all_masks():
    weight, gram = problem(rows=4, columns=8, seed=3)
    _, new = exact_obs(weight, gram, Block(4, 1), 0.5, dampening=0.0, at_once=1)
    errors = []
    for kept in itertools.combinations(range(8), 4):
        candidate = torch.zeros_like(weight, dtype=torch.bool)
        candidate[:, list(kept)] = True
        errors.append(error(weight, best_for(weight, candidate, gram), gram))
    assert error(weight, new, gram) <= sorted(errors)[len(errors) // 10]


def test_better_than_sparsegpt_in_blocks():
    weight, gram = problem(rows=64, columns=128, tokens=512)
    ours = exact_obs(weight, gram, Block(8, 1), 0.5)[1]
    theirs = sparsegpt(weight, gram, Block(8, 1), 0.5)[1]
    assert error(weight, ours, gram) < 0.8 * error(weight, theirs, gram)


def test_uneven_counts_are_exact():
    weight, gram = problem(rows=16, columns=7)
    mask, _ = exact_obs(weight, gram, Block(8, 1), 0.4)
    assert int((~mask).sum()) == round(0.4 * 14) * 8
    mask, new = exact_obs(weight, gram, Block(8, 1), 0.99)
    assert int(mask.sum()) == 8
    assert new.isfinite().all()


def test_what_is_pruned_stays_pruned():
    weight, gram = problem()
    first, new = exact_obs(weight, gram, Block(8, 1), 0.25, dampening=0.0)
    second, newer = exact_obs(new, gram, Block(8, 1), 0.5, dampening=0.0, previous=first)
    assert not (second & ~first).any()
    assert float((~second).float().mean()) == 0.5
    torch.testing.assert_close(newer.double(), best_for(new, second, gram), rtol=1e-3, atol=1e-3)


def test_in_parts_of_the_rows(monkeypatch):
    weight, gram = problem()
    whole = exact_obs(weight, gram, Block(4, 1), 0.5)
    monkeypatch.setattr(obs, "_BYTES_AT_ONCE", 1)
    parts = exact_obs(weight, gram, Block(4, 1), 0.5)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at_once": 0}, "exact_obs: expected at_once of at least 1, got 0"),
        ({"pattern": Block(5, 1)}, "expected a shape divisible by blocks of 5x1"),
        ({"gram": torch.eye(3)}, r"exact_obs: expected a gram of shape \(32, 32\), got \(3, 3\)"),
        ({"gram": torch.full((32, 32), torch.nan)}, "exact_obs: expected a finite gram"),
        ({"gram": -torch.eye(32)}, "exact_obs: expected a positive definite gram"),
        ({"weight": torch.full((16, 32), torch.inf)}, "exact_obs: expected a finite weight"),
        ({"sparsity": 1.0}, r"expected a fraction of zeros in \[0, 1\)"),
    ],
)
def test_errors(arguments, message):
    weight, gram = problem()
    with pytest.raises(ValueError, match=message):
        exact_obs(**({"weight": weight, "gram": gram, "pattern": Block(8, 1), "sparsity": 0.5} | arguments))
