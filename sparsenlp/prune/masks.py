"""Scores -> masks: which units stay at a given sparsity, with exact counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .patterns import Pattern

MIN_KEPT = 0.01
"""Global scope keeps at least this fraction of every matrix's units, so that no layer dies."""

SCOPES = ("local", "global")

_PRUNED = -1.0  # below every valid score, so that what is pruned already goes first


def check_sparsity(pattern: Pattern, sparsity: float) -> None:
    """Raise ValueError unless 0 <= sparsity < 1 and the pattern can have so many zeros."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a fraction of zeros in [0, 1), got {sparsity}")
    if sparsity > pattern.max_sparsity:
        raise ValueError(f"sparsity: expected at most {pattern.max_sparsity:g} for {pattern}, got {sparsity}")


def local_masks(
    scores: Mapping[str, Tensor], pattern: Pattern, sparsity: float, previous: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Prune the same fraction of every matrix.

    scores    name -> (N, K) finite scores >= 0, lowest pruned first
    previous  name -> (N, K) bool masks of whole units; a unit pruned there stays pruned
    returns   name -> (N, K) bool, True = kept; round(sparsity * units) units of each are pruned, or
              as many as `previous` has if that is more; at least one is kept

    Equal scores are pruned in index order. Raises ValueError for a sparsity that the pattern cannot
    have, a shape it does not divide, or scores that are negative or not finite.
    """
    check_sparsity(pattern, sparsity)
    masks = {}
    for name, units in _unit_scores(scores, pattern, previous).items():
        keep = _keep(units.flatten(), _target(units, pattern, sparsity))
        masks[name] = pattern.expand(keep.view_as(units), _shape(scores[name]))
    return masks


def global_masks(
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    sparsity: float,
    previous: Mapping[str, Tensor] | None = None,
    min_kept: float = MIN_KEPT,
) -> dict[str, Tensor]:
    """Rank the units of all matrices together by their raw scores; otherwise as `local_masks`.

    The best `min_kept` of every matrix's units (at least one) are never pruned; the total is exact.
    Raises ValueError if the sparsity leaves fewer units than that floor.
    """
    check_sparsity(pattern, sparsity)
    units = _unit_scores(scores, pattern, previous)
    if pattern.max_sparsity < 1:  # the pattern keeps a share of every matrix by itself
        min_kept = 0.0
    flat = torch.cat([_protect_best(u.flatten(), min_kept) if min_kept else u.flatten() for u in units.values()])
    count = _target(flat, pattern, sparsity)
    limit = int((flat != torch.inf).sum())
    if count > limit:
        raise ValueError(
            f"global_masks: expected a sparsity of at most {limit / flat.numel():.4f}, which keeps "
            f"{min_kept:.0%} of every matrix, got {sparsity}"
        )
    keep = _keep(flat, count).split([u.numel() for u in units.values()])
    return {
        name: pattern.expand(part.view_as(u), _shape(scores[name]))
        for (name, u), part in zip(units.items(), keep, strict=True)
    }


def _unit_scores(
    scores: Mapping[str, Tensor], pattern: Pattern, previous: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    units = {}
    for name, elementwise in scores.items():
        lowest, highest = elementwise.aminmax()
        if not (lowest >= 0 and highest < torch.inf):  # false for NaN too
            raise ValueError(f"masks: expected finite scores >= 0 for {name}, got NaN, infinite or negative ones")
        if previous is not None and name in previous:
            elementwise = elementwise.masked_fill(~previous[name], _PRUNED)
        try:
            units[name] = pattern.scores(elementwise)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return units


def _target(units: Tensor, pattern: Pattern, sparsity: float) -> int:
    """Units to prune: the wanted fraction in whole steps, at least one kept, never fewer than are pruned already."""
    wanted = round(sparsity * units.numel() / pattern.step) * pattern.step
    return max(min(wanted, units.numel() - 1), int((units < 0).sum()))


def _protect_best(units: Tensor, fraction: float) -> Tensor:
    """A copy in which the best `fraction` (at least one, pruned ones aside) score +inf."""
    kept = max(1, math.ceil(fraction * units.numel()))
    best = _keep(units, units.numel() - kept)
    return units.masked_fill(best & (units >= 0), torch.inf)


def _keep(units: Tensor, count: int) -> Tensor:
    """Boolean (units,), False for all that are pruned already and for exactly `count` in total, the lowest.

    Among equals the first in index order go, which also keeps the units of an n:m group together:
    they are neighbours with one score.
    """
    keep = units >= 0
    live = units[keep]
    more = count - (units.numel() - live.numel())
    if more <= 0:
        return keep
    threshold = live.kthvalue(more).values
    below = live < threshold
    ties = (live == threshold).nonzero().flatten()
    live_keep = ~below
    live_keep[ties[: more - int(below.sum())]] = False
    keep[keep.clone()] = live_keep
    return keep


def _shape(scores: Tensor) -> tuple[int, int]:
    return scores.shape[0], scores.shape[1]
