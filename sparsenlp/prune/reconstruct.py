"""Prune one weight matrix and make up for it with what remains: SparseGPT, block optimal brain surgeon; and Wanda.

Each solver is a pure function (weight, statistic, pattern, sparsity) -> (mask, new weight). `sparsegpt_` and `wanda_`
(prune/layerwise.py) and `block_obs_` (prune/fisher.py) apply them to the layers of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.block import split_blocks
from .masks import check_sparsity
from .patterns import NM, Block, Pattern

Solution = tuple[Tensor, Tensor]
"""Bool mask (N, K), True = kept, and the new weight (N, K) in the dtype of the old one, zero where pruned."""

_GROUPS_AT_ONCE = 1 << 14  # of an inverse Fisher, which are solved in float64

_LAZY = 16  # columns whose updates reach later columns at once; few enough that each step works on one core's cache

_PRUNED = -1.0  # below every score, so that what is pruned already goes first


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    sparsity: float,
    dampening: float = 0.01,
    block_size: int = 128,
    previous: Tensor | None = None,
    refine_steps: int = 0,
) -> Solution:
    """Prune a linear layer's weight so that its outputs change least, updating the weights that remain.

    weight      (N, K), any floating dtype; computed in float32
    gram        (K, K), the sum or mean of x xᵀ over calibration inputs x; its scale does not matter
    pattern     what is removed together
    sparsity    fraction of zeros, in [0, 1)
    dampening   of the gram's mean diagonal, added to its diagonal
    block_size  columns whose units are ranked together
    previous    (N, K) bool mask of whole units, outside of which `weight` is zero: what is pruned stays pruned
    refine_steps  of conjugate gradients after the sweep, beyond the paper: see `refine`
    returns     (mask, new weight); round(sparsity * units) units are pruned, at least one is kept

    Columns are visited from left to right. Of each `block_size` columns the units with the smallest
    sum of w² / [H⁻¹]ⱼⱼ over their weights go, H being the damped gram of the columns not visited yet;
    an n:m pattern at its full sparsity chooses m columns at a time. A removed weight's error is
    compensated by the later columns of its row. Source: Frantar & Alistarh 2023, arXiv:2301.00774.

    Raises ValueError for a shape that the pattern or the gram does not fit, values that are not finite,
    a gram that is not symmetric or, even damped, not positive definite, or a sparsity out of range.
    """
    check_weight("sparsegpt", weight, pattern, sparsity, previous)
    if block_size < 1:
        raise ValueError(f"sparsegpt: expected a block_size of at least 1, got {block_size}")
    total = weight.shape[1]
    factor = inverse_factor("sparsegpt", gram, total, dampening)
    step = pattern.m if isinstance(pattern, NM) else pattern.k if isinstance(pattern, Block) else 1
    ranked = max(block_size // step, 1) * step
    if isinstance(pattern, NM) and sparsity == pattern.max_sparsity:
        ranked = step
    lazy = _LAZY // ranked * ranked or next(width for width in range(_LAZY, 0, -1) if ranked % width == 0)
    columns = weight.detach().float().t().contiguous()  # [K, N]: a column of the weight is contiguous
    mask = torch.ones_like(columns, dtype=torch.bool)
    count, pruned = weight.numel() // unit_size(pattern), 0
    for start in range(0, total, lazy):
        stop = min(start + lazy, total)
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            if j % ranked == 0:
                end = min(j + ranked, total)
                scores = (columns[j:end] / factor.diagonal()[j:end, None]).square().t().contiguous()
                seen = None if previous is None else previous[:, j:end]
                goal = _target(count * end // total, count, pattern, sparsity)
                chosen, removed = _drop_lowest(scores, pattern, goal - pruned, seen)
                mask[j:end] = chosen.t()
                pruned += removed
            gone = errors[j - start].copy_(columns[j]).masked_fill_(mask[j], 0)
            columns[j] -= gone
            gone /= factor[j, j]
            columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], gone, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    mask, new = mask.t().contiguous(), columns.t().contiguous()
    if refine_steps:
        new = refine(weight, new, mask, gram, refine_steps, dampening)
    return mask, new.to(weight.dtype)


@torch.no_grad()
def refine(weight: Tensor, new: Tensor, mask: Tensor, gram: Tensor, steps: int, dampening: float = 0.01) -> Tensor:
    """Move what stays of a pruned weight towards the least change of the layer's outputs that its mask allows.

    weight, new  (N, K), before and after pruning; `new` is zero outside of the mask (N, K) bool
    gram         as in `sparsegpt`
    steps        of conjugate gradients in each row, preconditioned by H's diagonal; each takes N K² multiply-adds
    returns      (N, K) float32

    A sweep over the columns compensates for a pruned weight by later columns only; this uses all of them.
    """
    hessian = gram.float() + dampening * gram.diagonal().mean().float() * torch.eye(gram.shape[0], device=gram.device)
    inverse_diagonal = hessian.diagonal().reciprocal()
    new = new.float().clone()
    residual = ((weight.float() - new) @ hessian) * mask
    scaled = residual * inverse_diagonal
    direction, size = scaled, (residual * scaled).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian) * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)  # a row that is solved stays
        new += step * direction
        residual = residual - step * image
        scaled = residual * inverse_diagonal
        size, before = (residual * scaled).sum(dim=1, keepdim=True), size
        direction = scaled + torch.where(before > 0, size / before, 0) * direction
    return new


@torch.no_grad()
def wanda(
    weight: Tensor, input_square: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None = None
) -> Solution:
    """Prune by w² E[x²], compared within each output (each row of blocks); what remains is not changed.

    weight        (N, K), any floating dtype
    input_square  (K,), the sum or mean of x² over calibration inputs; its scale does not matter
    previous      as in `sparsegpt`
    returns       (mask, new weight); round(sparsity * units) units are pruned, as evenly as that divides over
                  the rows; at least one is kept

    Source: Sun et al. 2023, arXiv:2306.11695. Raises ValueError for a shape that the pattern or
    input_square does not fit, values that are not finite or negative squares, or a sparsity out of range.
    """
    check_weight("wanda", weight, pattern, sparsity, previous)
    if input_square.shape != weight.shape[1:]:
        raise ValueError(f"wanda: expected input_square of shape ({weight.shape[1]},), got {tuple(input_square.shape)}")
    if not (input_square.isfinite() & (input_square >= 0)).all():
        raise ValueError("wanda: expected input_square finite and at least 0, got NaN, infinite or negative values")
    units = _unit_scores(weight.float().square() * input_square.float(), pattern, previous)
    rows, across = units.shape
    goals = [_target(row * across, units.numel(), pattern, sparsity) for row in range(rows + 1)]
    quota = torch.tensor(goals, device=units.device).diff()
    ranks = units.argsort(dim=1, stable=True).argsort(dim=1)
    keep = (ranks >= quota[:, None]) & (units >= 0)
    mask = pattern.expand(keep, (weight.shape[0], weight.shape[1]))
    return mask, weight.detach() * mask


@torch.no_grad()
def block_obs(
    weight: Tensor, inverse_fisher: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None = None
) -> Solution:
    """Prune so that the loss rises least to second order, with a block-diagonal Fisher as its Hessian.

    weight          (N, K), any floating dtype
    inverse_fisher  (G, B, B): one inverse for every B weights in the order of `arrange`, as `EmpiricalFisher`
                    keeps it; its scale does not matter
    previous        as in `sparsegpt`
    returns         (mask, new weight); round(sparsity * units) units are pruned, at least one is kept

    A unit Q scores w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q, for n:m the sum over its weights taken singly. Then within each group all
    that is pruned there, P, goes at once: w - F⁻¹[:, P] ([F⁻¹]_PP)⁻¹ w_P, the exact minimum given P. Source: Kurtic
    et al. 2022, arXiv:2203.07259, who add up the updates of single units instead.

    Raises ValueError for a shape that the pattern or inverse_fisher does not fit, values that are not finite, an
    inverse Fisher that is not positive definite, or a sparsity out of range.
    """
    check_weight("block_obs", weight, pattern, sparsity, previous)
    unit, size = unit_size(pattern), inverse_fisher.shape[-1]
    if inverse_fisher.shape != (weight.numel() // size, size, size) or weight.numel() % size or size % unit:
        raise ValueError(
            f"block_obs: expected an inverse Fisher (G, B, B) with G * B = {weight.numel()} and B a multiple of "
            f"{unit}, got shape {tuple(inverse_fisher.shape)}"
        )
    old = arrange(weight.detach().float(), pattern).view(-1, size)
    own = inverse_fisher.unflatten(2, (-1, unit)).unflatten(1, (-1, unit)).diagonal(dim1=1, dim2=3)
    own = own.movedim(-1, 1).reshape(-1, unit, unit)  # the diagonal block of each unit
    rise = (_solve(own, old.reshape(-1, unit)) * old.reshape(-1, unit)).sum(dim=1, keepdim=True)
    scores = _restore((rise.clamp(min=0) / unit).expand(-1, unit), pattern, weight)
    count = weight.numel() // unit
    mask, _ = _drop_lowest(scores, pattern, _target(count, count, pattern, sparsity), previous)
    kept = arrange(mask, pattern).view(-1, size)
    new = torch.empty_like(old)
    for part in range(0, len(old), _GROUPS_AT_ONCE):
        group = slice(part, part + _GROUPS_AT_ONCE)
        gone = ~kept[group]
        inverse = inverse_fisher[group].float()
        # Identity where a weight stays: its row of the system then says that nothing of it is removed.
        both = gone[:, :, None] & gone[:, None, :]
        system = torch.where(both, inverse, torch.diag_embed((~gone).float()))
        removal = _solve(system, old[group].masked_fill(~gone, 0))
        new[group] = old[group] - (inverse @ removal[..., None]).squeeze(-1)
    weight = _restore(new.masked_fill_(~kept, 0), pattern, weight).to(weight.dtype)
    return mask, weight


def arrange(matrix: Tensor, pattern: Pattern) -> Tensor:
    """(N, K) -> (N * K,) with the weights of a block next to each other, blocks row by row; otherwise row by row."""
    return split_blocks(matrix, (pattern.n, pattern.k)).flatten() if isinstance(pattern, Block) else matrix.flatten()


def _restore(arranged: Tensor, pattern: Pattern, like: Tensor) -> Tensor:
    """The inverse of `arrange`, for a matrix of the shape of `like`."""
    if not isinstance(pattern, Block):
        return arranged.reshape(like.shape)
    shape = (like.shape[0] // pattern.n, like.shape[1] // pattern.k, pattern.n, pattern.k)
    return arranged.reshape(shape).transpose(1, 2).reshape(like.shape)


def unit_size(pattern: Pattern) -> int:
    """Weights of a unit."""
    return pattern.n * pattern.k if isinstance(pattern, Block) else 1


def _target(units: int, total: int, pattern: Pattern, sparsity: float) -> int:
    """How many of the first `units` of a matrix's `total` are pruned: whole steps, one of the total is kept."""
    return min(round(sparsity * units / pattern.step) * pattern.step, total - 1)


def _unit_scores(scores: Tensor, pattern: Pattern, previous: Tensor | None) -> Tensor:
    """Of each unit, below zero if `previous` pruned it."""
    return pattern.scores(scores if previous is None else scores.masked_fill(~previous, _PRUNED))


def _drop_lowest(scores: Tensor, pattern: Pattern, count: int, previous: Tensor | None) -> tuple[Tensor, int]:
    """The mask without the `count` lowest units, or all that `previous` pruned if these are more; how many went.

    Equal scores go in index order, which also keeps the units of an n:m group together.
    """
    units = _unit_scores(scores, pattern, previous)
    count = max(count, int((units < 0).sum()))
    keep = torch.ones_like(units, dtype=torch.bool)
    keep.view(-1)[units.flatten().argsort(stable=True)[:count]] = False
    return pattern.expand(keep, (scores.shape[0], scores.shape[1])), count


def inverse_factor(solver: str, gram: Tensor, size: int, dampening: float) -> Tensor:
    """Upper triangular U (K, K) float32 with H⁻¹ = Uᵀ U, H the damped gram; factored in float64."""
    if gram.shape != (size, size):
        raise ValueError(f"{solver}: expected a gram of shape ({size}, {size}), got {tuple(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError(f"{solver}: expected a finite gram, got NaN or infinite values")
    if dampening < 0:
        raise ValueError(f"{solver}: expected a dampening of at least 0, got {dampening}")
    hessian = gram.double()
    diagonal = hessian.diagonal()
    if not torch.allclose(hessian, hessian.t(), rtol=1e-3, atol=1e-4 * diagonal.abs().max().item()):
        raise ValueError(f"{solver}: expected a symmetric gram, got one that is not")
    hessian = hessian + dampening * diagonal.mean() * torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    # With both orders of indices reversed, H = R Rᵀ where R is upper triangular, so H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹.
    reversed_factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise ValueError(
            f"{solver}: expected a positive definite gram, got one that is not even with a dampening of "
            f"{dampening:g}; use more calibration data or a larger dampening"
        )
    identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(reversed_factor.flip(0, 1), identity, upper=True).float()


def _solve(matrices: Tensor, right: Tensor) -> Tensor:
    """x (G, B) float32 of A x = b for positive definite A (G, B, B) and b (G, B); solved in float64."""
    if matrices.shape[-1] == 1:
        if not (matrices > 0).all():
            raise ValueError("block_obs: expected a positive definite inverse Fisher, got one that is not")
        return right / matrices[..., 0]
    factor, failed = torch.linalg.cholesky_ex(matrices.double())
    if failed.any():
        raise ValueError("block_obs: expected a positive definite inverse Fisher, got one that is not")
    return torch.cholesky_solve(right.double()[..., None], factor).squeeze(-1).float()


def check_weight(solver: str, weight: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None) -> None:
    """Raise ValueError, beginning with `solver`, as the solvers say."""
    check_sparsity(pattern, sparsity)
    pattern.check(tuple(weight.shape))
    if not weight.isfinite().all():
        raise ValueError(f"{solver}: expected a finite weight, got NaN or infinite values")
    if previous is not None and previous.shape != weight.shape:
        raise ValueError(f"{solver}: expected a mask of shape {tuple(weight.shape)}, got {tuple(previous.shape)}")
