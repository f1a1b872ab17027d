from itertools import pairwise

import pytest

from sparsenlp.prune import cubic_sparsity


def test_ends_and_middle():
    assert cubic_sparsity(0, 0, 100, 0.9) == 0.0
    assert cubic_sparsity(5, 10, 100, 0.9, initial=0.2) == 0.2
    assert cubic_sparsity(50, 0, 100, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic_sparsity(55, 10, 100, 0.9, initial=0.2) == pytest.approx(0.9 - 0.7 * 0.5**3)
    assert cubic_sparsity(100, 0, 100, 0.9) == 0.9
    assert cubic_sparsity(500, 0, 100, 0.9) == 0.9


def test_it_rises_and_slows_down():
    values = [cubic_sparsity(step, 0, 20, 0.9) for step in range(21)]
    rises = [b - a for a, b in pairwise(values)]
    assert all(rise > 0 for rise in rises)
    assert rises == sorted(rises, reverse=True)


def test_one_shot():
    assert cubic_sparsity(0, 0, 0, 0.7) == 0.7


@pytest.mark.parametrize("arguments", [(0, 5, 4, 0.5), (0, -1, 4, 0.5), (0, 0, 4, 1.0), (0, 0, 4, 0.5, 0.6)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="cubic_sparsity: expected"):
        cubic_sparsity(*arguments)
