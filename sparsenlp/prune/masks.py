"""Scores -> masks: which units stay at a given sparsity, with exact counts, or above a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import Pattern, check_aggregation

MIN_KEPT = 0.01
"""Global scope keeps at least this fraction of every matrix's units, so that no layer dies."""


@dataclass(frozen=True)
class Threshold:
    """Prune the units that score below `absolute`, or below `alpha` times the highest score they are ranked with.

    A unit scores the aggregate of its weights' scores. With magnitudes `alpha` is the classic
    α · max|w|, with accumulated gradients ("gradient") α · max|dL/dw|; it lies in [0, 1] and needs
    scores >= 0. Raises ValueError unless one of the two is given, in its range.
    """

    absolute: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if (self.absolute is None) == (self.alpha is None):
            raise ValueError(
                f"Threshold: expected either absolute or alpha, got absolute={self.absolute} and alpha={self.alpha}"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"Threshold: expected alpha in [0, 1], got {self.alpha}")
        if self.absolute is not None and not math.isfinite(self.absolute):
            raise ValueError(f"Threshold: expected a finite absolute value, got {self.absolute}")


def check_sparsity(pattern: Pattern, sparsity: float | Threshold) -> None:
    """Raise ValueError unless 0 <= sparsity < 1 and the pattern can have so many zeros; a Threshold passes."""
    if isinstance(sparsity, Threshold):
        return
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a fraction of zeros in [0, 1), got {sparsity}")
    if sparsity > pattern.max_sparsity:
        raise ValueError(f"sparsity: expected at most {pattern.max_sparsity:g} for {pattern}, got {sparsity}")


def local_masks(
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    sparsity: float | Threshold,
    previous: Mapping[str, Tensor] | None = None,
    aggregation: str = "sum",
) -> dict[str, Tensor]:
    """Prune the same fraction of every matrix.

    scores       name -> (N, K) finite scores, ranked as float32, lowest pruned first; asked for once each
    sparsity     fraction of zeros, or a Threshold, which stands for as many zeros as units lie below it
    previous     name -> (N, K) bool masks of whole units; a unit pruned there stays pruned
    aggregation  of the scores in a unit: "sum", "l2" or "mean"
    returns      name -> (N, K) bool, True = kept; round(sparsity * units) units of each are pruned, or
                 as many as `previous` has if that is more; at least one is kept

    Equal scores are pruned in index order. Memory: 4 bytes a unit and the masks, beside temporaries
    for one matrix. Raises ValueError for a sparsity that the pattern cannot have, a shape it does not
    divide, scores that are not finite, and scores below zero with "l2" or Threshold.alpha.
    """
    check_sparsity(pattern, sparsity)
    masks = {}
    for name, elementwise in scores.items():
        keys = _keys(name, elementwise, pattern, sparsity, previous, aggregation)
        flat = keys.flatten()
        (keep,) = _keep([flat], int(_counts(flat, pattern, sparsity)))
        masks[name] = pattern.expand(keep.view_as(keys), _shape(elementwise))
    return masks


def row_masks(
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    sparsity: float | Threshold,
    previous: Mapping[str, Tensor] | None = None,
    aggregation: str = "sum",
) -> dict[str, Tensor]:
    """Prune the same fraction of every row of every matrix, with blocks of every row of blocks.

    Otherwise as `local_masks`, of a row where that says of a matrix. It also gives the rows of a
    sparse product equal work.
    """
    check_sparsity(pattern, sparsity)
    masks = {}
    for name, elementwise in scores.items():
        keys = _keys(name, elementwise, pattern, sparsity, previous, aggregation)
        counts = _counts(keys, pattern, sparsity)
        place = torch.arange(keys.shape[1], device=keys.device)
        order = keys.argsort(dim=1, stable=True)
        keep = torch.empty_like(keys, dtype=torch.bool).scatter_(1, order, place >= counts[:, None])
        masks[name] = pattern.expand(keep, _shape(elementwise))
    return masks


def global_masks(
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    sparsity: float | Threshold,
    previous: Mapping[str, Tensor] | None = None,
    aggregation: str = "sum",
    min_kept: float = MIN_KEPT,
) -> dict[str, Tensor]:
    """Rank the units of all matrices together by their raw scores; otherwise as `local_masks`.

    The best `min_kept` of every matrix's units (at least one) are never pruned; the total is exact.
    Raises ValueError if the sparsity leaves fewer units than that floor.
    """
    check_sparsity(pattern, sparsity)
    if pattern.max_sparsity < 1:  # the pattern keeps a share of every matrix by itself
        min_kept = 0.0
    keys, shapes = {}, {}
    for name, elementwise in scores.items():
        keys[name] = _keys(name, elementwise, pattern, sparsity, previous, aggregation)
        shapes[name] = _shape(elementwise)
    count = _global_count(list(keys.values()), pattern, sparsity, min_kept)
    keep = _keep([units.flatten() for units in keys.values()], count)
    return {
        name: pattern.expand(part.view_as(units), shapes[name])
        for (name, units), part in zip(keys.items(), keep, strict=True)
    }


def _global_count(keys: Sequence[Tensor], pattern: Pattern, sparsity: float | Threshold, min_kept: float) -> int:
    """How many units to prune in all, once the best `min_kept` of every matrix are protected in `keys`, in place."""
    highest = torch.stack([_highest(units.flatten()) for units in keys]).amax()
    if min_kept:
        for units in keys:
            _protect_best_(units.view(-1), min_kept)
    total = sum(units.numel() for units in keys)
    pruned = sum(int((units == _PRUNED).count_nonzero()) for units in keys)
    if isinstance(sparsity, Threshold):
        limit = _limit(highest, sparsity)
        return max(sum(int((units < limit).count_nonzero()) for units in keys), pruned)
    count = max(min(_whole_steps(total, pattern, sparsity), total - 1), pruned)
    most = sum(int((units != _PROTECTED).count_nonzero()) for units in keys)
    if count > most:
        raise ValueError(
            f"global_masks: expected a sparsity of at most {most / total:.4f}, which keeps "
            f"{min_kept:.0%} of every matrix, got {sparsity}"
        )
    return count


def _keys(
    name: str,
    elementwise: Tensor,
    pattern: Pattern,
    sparsity: float | Threshold,
    previous: Mapping[str, Tensor] | None,
    aggregation: str,
) -> Tensor:
    """A new int32 tensor of the shape of the units, in the order of their float32 scores."""
    check_aggregation(aggregation)
    elementwise = elementwise.float()
    lowest, highest = elementwise.aminmax()
    if not (lowest > -torch.inf and highest < torch.inf):  # false for NaN too
        raise ValueError(f"masks: expected finite scores for {name}, got NaN or infinite ones")
    if isinstance(sparsity, Threshold) and sparsity.alpha is not None and lowest < 0:
        raise ValueError(f"masks: expected scores >= 0 for {name}, as alpha multiplies the highest, got {lowest:g}")
    if previous is not None and name in previous:
        elementwise = elementwise.masked_fill(~previous[name], -torch.inf)
    try:
        return _order(pattern.scores(elementwise, aggregation))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _order(values: Tensor) -> Tensor:
    """Float32 -> int32 in the same order, -0.0 as 0.0; a new contiguous tensor."""
    return _flip_((values.contiguous() + 0.0).view(torch.int32))


def _flip_(bits: Tensor) -> Tensor:
    """Of negative floats the bits below the sign rise as the value falls: turn those over. Its own inverse."""
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


_PRUNED = int(_order(torch.tensor(-torch.inf)))
_PROTECTED = int(_order(torch.tensor(torch.inf)))


def _counts(keys: Tensor, pattern: Pattern, sparsity: float | Threshold) -> Tensor:
    """Units to prune along the last dimension, (...,) int64: at least one kept, never fewer than are pruned already."""
    size = keys.shape[-1]
    pruned = (keys == _PRUNED).count_nonzero(dim=-1)
    if isinstance(sparsity, Threshold):
        wanted = (keys < _limit(_highest(keys), sparsity)[..., None]).count_nonzero(dim=-1)
    else:
        wanted = torch.full_like(pruned, _whole_steps(size, pattern, sparsity))
    return torch.maximum(wanted.clamp(max=size - 1), pruned)


def _whole_steps(units: int, pattern: Pattern, sparsity: float) -> int:
    return round(sparsity * units / pattern.step) * pattern.step


def _highest(keys: Tensor) -> Tensor:
    """The highest key along the last dimension that a score gave; _PRUNED if there is none."""
    return keys.masked_fill(keys == _PROTECTED, _PRUNED).amax(dim=-1)


def _limit(highest: Tensor, threshold: Threshold) -> Tensor:
    """Keys below this one are below the threshold; the shape of `highest`."""
    values = _flip_(highest.clone()).view(torch.float32)
    if threshold.alpha is not None:
        return _order(values.clamp_min(0.0) * threshold.alpha)
    return _order(torch.full_like(values, threshold.absolute or 0.0))


def _protect_best_(keys: Tensor, fraction: float) -> None:
    """Give the best `fraction` (at least one, pruned ones aside) of (units,) the highest key."""
    kept = max(1, math.ceil(fraction * keys.numel()))
    (best,) = _keep([keys], keys.numel() - kept)
    keys.masked_fill_(best & (keys != _PRUNED), _PROTECTED)


def _keep(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """For each (units,) a bool, False for exactly the `count` lowest of all parts together.

    Among equals the first in index order go, which also keeps the units of an n:m group together:
    they are neighbours with one score.
    """
    if not count:
        return [torch.ones_like(part, dtype=torch.bool) for part in parts]
    threshold = _kth_smallest(parts, count)
    keep = [part >= threshold for part in parts]
    ties = count - sum(mask.numel() - int(mask.count_nonzero()) for mask in keep)
    for part, mask in zip(parts, keep, strict=True):
        if not ties:
            break
        equal = (part == threshold).nonzero().flatten()[:ties]
        mask[equal] = False
        ties -= len(equal)
    return keep


def _kth_smallest(parts: Sequence[Tensor], k: int) -> int:
    """The k-th smallest, from 1, of all int32 parts together: a radix selection, which joins and copies none."""
    high, k = _pick(parts, k, lambda part: (part >> 16).add_(2**15))
    high -= 2**15
    low, _ = _pick(parts, k, lambda part: part[(part >> 16) == high] & 0xFFFF)
    return (high << 16) | low


def _pick(parts: Sequence[Tensor], k: int, digit: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The 16-bit digit at which the k-th smallest lies, and its place among those that share the digit."""
    counts = torch.zeros(2**16, dtype=torch.int64, device=parts[0].device)
    for part in parts:
        counts += torch.bincount(digit(part), minlength=2**16)
    found = int(torch.searchsorted(counts.cumsum(0), k))
    return found, k - int(counts[:found].sum())


def _shape(scores: Tensor) -> tuple[int, int]:
    return scores.shape[0], scores.shape[1]


MASKS = {"local": local_masks, "row": row_masks, "global": global_masks}
"""Scope -> what makes the masks."""
SCOPES = tuple(MASKS)
