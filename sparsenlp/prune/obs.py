"""Optimal brain surgeon on a linear layer, a few blocks of columns at a time, with all that remains updated exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import Block
from .reconstruct import Solution, check_weight, inverse_factor

_BYTES_AT_ONCE = 1 << 28
"""Of the inverses of rows of blocks that are worked on together."""


@torch.no_grad()
def exact_obs(
    weight: Tensor,
    gram: Tensor,
    pattern: Block,
    sparsity: float,
    dampening: float = 0.01,
    at_once: int = 16,
    previous: Tensor | None = None,
) -> Solution:
    """Prune a linear layer's weight so that its outputs change least, one handful of blocks after the other.

    weight     (N, K), any floating dtype; computed in float32
    gram       (K, K), the sum or mean of x xᵀ over calibration inputs x; its scale does not matter
    pattern    blocks of n x k; all rows of a block of rows keep the same columns, and so share one inverse
    sparsity   fraction of zeros, in [0, 1), the same in every row of blocks (to one block)
    dampening  of the gram's mean diagonal, added to its diagonal
    at_once    blocks of a row that go in one step; 1 is the exact greedy order
    previous   (N, K) bool mask of whole blocks, outside of which `weight` is zero: what is pruned stays pruned
    returns    (mask, new weight); round(sparsity * blocks) blocks are pruned, at least one is kept; what remains
               is the best there is for this mask

    A block Q scores Σ w_Q ([H⁻¹]_QQ)⁻¹ w_Qᵀ over its rows, H being the gram of the columns that are still there.
    SparseGPT fixes an order of the columns and compensates to the right only, so that all rows share its inverses;
    rows of blocks are few enough to have one each: (N / n) K³ / 2 multiply-adds at 50 %. Source: Frantar & Alistarh
    2022 (Optimal Brain Compression, arXiv:2208.11580), for single weights and N:M; here for blocks.

    Raises ValueError as `sparsegpt`, and for `at_once` below 1.
    """
    check_weight("exact_obs", weight, pattern, sparsity, previous)
    if at_once < 1:
        raise ValueError(f"exact_obs: expected at_once of at least 1, got {at_once}")
    rows, total = weight.shape
    groups, units = rows // pattern.n, total // pattern.k
    factor = inverse_factor("exact_obs", gram, total, dampening)
    inverse = factor.t() @ factor
    new = weight.detach().float().reshape(groups, pattern.n, total).clone()
    alive = torch.ones(groups, units, dtype=torch.bool, device=weight.device)
    if previous is not None:
        alive = previous.reshape(groups, pattern.n, units, pattern.k)[:, 0, :, 0].clone()
    goals = [min(round(sparsity * units * group), groups * units - 1) for group in range(groups + 1)]
    quota = torch.tensor(goals, device=weight.device).diff()
    together = max(_BYTES_AT_ONCE // (4 * total * total), 1)
    for start in range(0, groups, together):
        part = slice(start, start + together)
        _prune_rows(new[part], alive[part], inverse, quota[part], pattern.k, at_once)
    mask = alive[:, None, :, None].expand(groups, pattern.n, units, pattern.k).reshape(rows, total)
    return mask, (new.reshape(rows, total) * mask).to(weight.dtype)


def _prune_rows(new: Tensor, alive: Tensor, inverse: Tensor, quota: Tensor, width: int, at_once: int) -> None:
    """Prune rows of blocks (G, n, K) in place until `quota` (G,) of the units `alive` (G, U) are gone from each."""
    inverses = inverse.expand(len(new), -1, -1).clone()
    for group in (~alive).any(dim=1).nonzero().flatten().tolist():
        gone = (~alive[group]).nonzero().flatten()[None]
        one = slice(group, group + 1)
        _remove(new[one], inverses[one], gone, width)
    while True:
        missing = quota - (~alive).sum(dim=1)
        due = (missing > 0).nonzero().flatten()
        if not len(due):
            return
        step = min(int(missing[due].min()), at_once)
        everyone = len(due) == len(new)
        some, theirs = (new, inverses) if everyone else (new[due], inverses[due])
        scores = _scores(some, theirs, alive[due], width)
        gone = scores.topk(step, dim=1, largest=False).indices
        _remove(some, theirs, gone, width)
        if not everyone:
            new[due], inverses[due] = some, theirs
        alive[due[:, None], gone] = False


def _scores(new: Tensor, inverses: Tensor, alive: Tensor, width: int) -> Tensor:
    """(G, U): how much the squared error of the outputs grows with each unit's removal; infinite for those gone."""
    groups, rows, total = new.shape
    if width == 1:
        rise = new.square().sum(dim=1) / inverses.diagonal(dim1=1, dim2=2)
    else:
        own = inverses.view(groups, -1, width, total // width, width).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        own = torch.where(alive[..., None, None], own, torch.eye(width, device=new.device))
        weights = new.view(groups, rows, -1, width).permute(0, 2, 3, 1)
        rise = (torch.linalg.solve(own, weights) * weights).sum(dim=(2, 3))
    return rise.masked_fill_(~alive, torch.inf)


def _remove(new: Tensor, inverses: Tensor, units: Tensor, width: int) -> None:
    """Take units (G, r) out of the weights (G, n, K) and of the inverses (G, K, K), in place."""
    columns = (units[:, :, None] * width + torch.arange(width, device=units.device)).flatten(1)
    total = new.shape[2]
    across = inverses.gather(1, columns[:, :, None].expand(-1, -1, total))
    inner = across.gather(2, columns[:, None, :].expand(-1, columns.shape[1], -1))
    solved = torch.linalg.solve(inner.double(), across.double()).float()
    weights = new.gather(2, columns[:, None, :].expand(-1, new.shape[1], -1))
    new.baddbmm_(weights, solved, alpha=-1)
    inverses.baddbmm_(across.transpose(1, 2), solved, alpha=-1)
    new.scatter_(2, columns[:, None, :].expand(-1, new.shape[1], -1), 0.0)
