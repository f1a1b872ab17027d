"""Reorder channels so that blocks hold weights of like importance, where that is free: the function stays the same.

A neuron, a value channel and a pair of query and key dimensions are numbered as one likes, as long as the projections
that meet there agree. Blocks span neighbouring numbers: when neighbours are important for the same inputs, the best
blocks keep more of the scores (channel permutation after Pool and Yu 2021, NeurIPS, for blocks instead of N:M).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn

from ..models.structure import COLUMNS, ROWS, LayerParts, Slice, is_conv1d, width
from .checks import check_choice
from .masks import check_sparsity
from .patterns import Block
from .structured import check_dense, find_stack

KINDS = ("neurons", "values", "queries")
SWAP_ROUNDS = 6
CHUNK = 512  # rows of the table of swaps held at a time


@dataclass(frozen=True)
class PermutedChannels:
    """Channels of one kind in one layer, and the share of their projections' scores that the best blocks keep."""

    layer: str
    kind: str
    before: float
    after: float


@dataclass(frozen=True)
class Permutation:
    """What `permute_` did.

    rows     one per kind of channels and layer
    before   share of the scores that the best blocks of each projection keep, over all projections concerned
    after    the same now
    orders   module name -> (order of its rows, order of its columns): old numbers in new places, None as they were
    """

    rows: tuple[PermutedChannels, ...]
    before: float
    after: float
    orders: dict[str, tuple[Tensor | None, Tensor | None]]

    def reorder(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores (N, K) or statistics of the model as it was, by module name, for the model as it is now."""
        return {name: _reorder(tensor, *self.orders.get(name, (None, None))) for name, tensor in scores.items()}

    def __str__(self) -> str:
        lines = [f"{row.layer:<32} {row.kind:<8} {row.before:.3f} -> {row.after:.3f}" for row in self.rows]
        return "\n".join([*lines, f"{'all':<41} {self.before:.3f} -> {self.after:.3f} of the scores kept"])


@torch.no_grad()
def permute_(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    pattern: Block,
    sparsity: float,
    kinds: Sequence[str] = KINDS,
) -> Permutation:
    """Reorder a transformer's free channels, in place, for blocks that keep more of the scores.

    scores     module name -> (N, K) finite scores >= 0 of every projection concerned, as a criterion gives them
    pattern    the blocks to prune afterwards
    sparsity   of each projection to prune to, in [0, 1)
    kinds      of channels: "neurons" (rows of fc1 or of gate and up, columns of fc2), "values" (rows of value, columns
               of output) and "queries" (rows of query and key), the last two within a head
    returns    how much more the best blocks keep; `reorder` takes scores and statistics along

    The model computes the same but for rounding, and its parameters keep their shapes; what an optimizer has stored
    for them no longer fits. Queries stay in place where positions rotate them, and channels of a head (or a layer) if
    blocks do not divide their number. Deterministic, and never worse than before. Channels are gathered block by block,
    each time those that add most to the best columns of their block, then exchanged in pairs while that keeps more.

    Raises ValueError, with the model untouched, for an unknown kind or family, another pattern than Block, a sparsity
    out of range, a shape that blocks do not divide, missing or invalid scores, weights that are masked, sparse or
    shared between modules, and a fused model.
    """
    if not isinstance(pattern, Block):
        raise ValueError(f"permute_: expected a Block pattern, got {pattern}")
    check_sparsity(pattern, sparsity)
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    stack = find_stack("permute_", model)
    names = {module: name for name, module in model.named_modules()}
    sets = [(parts, kind, slices) for parts in stack.layers for kind in KINDS for slices in _slices(parts, kind)]
    sets = [(parts, kind, slices) for parts, kind, slices in sets if kind in kinds]
    modules = {names[module]: module for _, _, slices in sets for module, _, _ in slices}
    check_dense("permute_", model, modules.values())
    for name, module in modules.items():
        _check_scores(name, scores.get(name), (width(module, ROWS), width(module, COLUMNS)), pattern)

    orders: dict[tuple[str, int], Tensor] = {}
    rows, totals = [], []
    for parts, kind, slices in sets:
        ranges = 1 if kind == "neurons" else parts.heads
        profiles = _profiles([(scores[names[part.module]], part) for part in slices], pattern, ranges)
        order, kept = _best_order(profiles, slices[0].lines.shape[0], 1 - sparsity)
        total = max(sum(profile.total for profile in profiles), torch.finfo(torch.float32).tiny)
        rows.append(PermutedChannels(parts.name, kind, kept[0] / total, kept[1] / total))
        totals.append((*kept, total))
        for module, dim, lines in slices:
            whole = orders.setdefault((names[module], dim), torch.arange(width(module, dim)))
            whole[lines.flatten()] = lines[order].flatten()
    by_module = {name: (orders.get((name, ROWS)), orders.get((name, COLUMNS))) for name in modules}
    for name, module in modules.items():
        _apply_(module, *by_module[name])
    before, after, total = (sum(column) for column in zip(*totals, strict=True)) if totals else (0.0, 0.0, 1.0)
    return Permutation(tuple(rows), before / total, after / total, by_module)


@dataclass(frozen=True)
class _Profile:
    """What one projection has for each channel.

    scores   (ranges, channels, groups) float32: summed over the other side of each block
    side     channels that a block spans
    """

    scores: Tensor
    side: int

    @property
    def total(self) -> float:
        return self.scores.double().sum().item()

    def blocks(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """(scores in this order (ranges, channels), those of blocks (ranges, channels / side, groups))."""
        ordered = self.scores.gather(1, order[:, :, None].expand_as(self.scores))
        return ordered, ordered.unflatten(1, (-1, self.side)).sum(dim=2)


def _slices(parts: LayerParts, kind: str) -> list[list[Slice]]:
    """The sets of slices (one or none) whose channels of this kind have to keep one order."""
    if kind == "neurons":
        return [parts.neuron_slices(torch.arange(parts.neurons))]
    if not parts.inputs:
        return []
    dims = torch.arange(parts.head_dim)
    channels = torch.arange(parts.heads * parts.head_dim)[:, None]
    query, key, value = parts.input_slices(channels, channels, channels)
    if kind == "queries":
        return [] if parts.rotary else [[query, key]]
    heads = torch.arange(parts.heads * parts.group).view(parts.heads, 1, parts.group)
    readers = (heads * parts.head_dim + dims[:, None]).flatten(0, 1)  # of each value channel, in the queries' heads
    return [[value, Slice(parts.output, COLUMNS, readers)]]


def _profiles(parts: Sequence[tuple[Tensor, Slice]], pattern: Block, ranges: int) -> list[_Profile]:
    """One for each line of a channel where blocks span several channels; none at all if they do not fit a range."""
    found = []
    for scores, (_, dim, lines) in parts:
        side, other = (pattern.n, pattern.k) if dim == ROWS else (pattern.k, pattern.n)
        channels = lines.shape[0] // ranges
        if channels % side:
            return []
        if side > 1:
            along = scores.float().cpu() if dim == ROWS else scores.float().cpu().t()
            summed = along.unflatten(1, (-1, other)).sum(dim=2)
            found += [_Profile(summed[column].view(ranges, channels, -1), side) for column in lines.unbind(dim=1)]
    return found


def _best_order(profiles: Sequence[_Profile], count: int, density: float) -> tuple[Tensor, tuple[float, float]]:
    """(old channel in each new place (count,), scores kept (before, after))."""
    if not profiles:
        return torch.arange(count), (0.0, 0.0)
    ranges, channels, _ = profiles[0].scores.shape
    identity = torch.arange(channels).repeat(ranges, 1)
    before = _kept(profiles, identity, density)
    order = torch.stack([_gather(profiles, r, density) for r in range(ranges)])
    for _ in range(SWAP_ROUNDS):
        if not _swap_(order, profiles, density):
            break
    after = _kept(profiles, order, density)
    if after <= before:
        order, after = identity, before
    return (order + channels * torch.arange(ranges)[:, None]).flatten(), (before, after)


def _kept(profiles: Sequence[_Profile], order: Tensor, density: float) -> float:
    """Sum of the scores in the best blocks of each projection."""
    blocks = [profile.blocks(order)[1] for profile in profiles]
    return sum((scores * _best(scores, density)).double().sum().item() for scores in blocks)


def _best(blocks: Tensor, density: float) -> Tensor:
    """1 for the blocks to keep, 0 for others, in the same shape."""
    count = max(1, round(density * blocks.numel()))
    best = torch.zeros(blocks.numel())
    best[blocks.flatten().topk(count, sorted=False).indices] = 1
    return best.view(blocks.shape)


def _gather(profiles: Sequence[_Profile], number: int, density: float) -> Tensor:
    """An order for one range of channels: block by block, each time those that add most to its best groups so far.

    As many are added at a time as are there, so that a block of eight takes four looks at all channels.
    """
    size = lcm(*(profile.side for profile in profiles))
    rest = torch.cat([profile.scores[number].t() for profile in profiles])  # (groups, channels not placed yet)
    count = max(1, round(density * rest.shape[0]))
    numbers = torch.arange(rest.shape[1])
    free = torch.ones(rest.shape[1], dtype=torch.bool)
    strength = rest.topk(count, dim=0).values.sum(dim=0)  # of a channel alone
    order: list[int] = []
    while bool(free.any()):
        block = strength.masked_fill(~free, -1).topk(1).indices
        free[block] = False
        while block.numel() < size:
            groups = rest[:, block].sum(dim=1).topk(count).indices
            adds = rest[groups].sum(dim=0).masked_fill_(~free, -1)
            chosen = adds.topk(min(block.numel(), size - block.numel())).indices
            free[chosen] = False
            block = torch.cat([block, chosen])
        order += numbers[block].tolist()
        if 2 * int(free.sum()) < free.numel():
            rest, strength, numbers = rest[:, free], strength[free], numbers[free]
            free = torch.ones(numbers.numel(), dtype=torch.bool)
    return torch.tensor(order)


def _swap_(order: Tensor, profiles: Sequence[_Profile], density: float) -> int:
    """Exchange pairs of channels, all at once, that gain with the blocks kept now; how many.

    The sum over the kept blocks is linear in who stands where, so gains of disjoint pairs add up; choosing the best
    blocks anew afterwards can only raise it.
    """
    unit = gcd(*(profile.side for profile in profiles))
    ranges, channels = order.shape
    place = torch.arange(channels) // unit
    value = torch.zeros(ranges, channels, channels // unit)  # of each channel in each unit of places
    for profile in profiles:
        ordered, blocks = profile.blocks(order)
        there = ordered @ _best(blocks, density).transpose(1, 2)
        value += there.repeat_interleave(profile.side // unit, dim=2)
    gain = value - value.gather(2, place[None, :, None].expand(ranges, -1, 1))
    threshold = 1e-6 * float(value.abs().max())
    swaps = 0
    for row, moves in zip(order, gain, strict=True):
        back = moves.t().contiguous()
        chunks = [slice(i, i + CHUNK) for i in range(0, channels, CHUNK)]
        pairs = [(moves[chunk].index_select(1, place) + back[place[chunk]]).max(dim=1) for chunk in chunks]
        best, partners = (torch.cat(columns) for columns in zip(*pairs, strict=True))
        partner, moved = partners.tolist(), [False] * channels
        first, second = [], []
        for i in best.argsort(descending=True, stable=True)[: int((best > threshold).sum())].tolist():
            if not (moved[i] or moved[partner[i]]):
                moved[i] = moved[partner[i]] = True
                first.append(i)
                second.append(partner[i])
        row[first + second] = row[second + first]
        swaps += len(first)
    return swaps


def _reorder(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    tensor = tensor if rows is None else tensor.index_select(0, rows.to(tensor.device))
    return tensor if columns is None else tensor.index_select(1, columns.to(tensor.device))


def _apply_(module: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    weight = module.weight.t() if is_conv1d(module) else module.weight
    weight.copy_(_reorder(weight, rows, columns))
    if rows is not None and module.bias is not None:
        module.bias.copy_(module.bias.index_select(0, rows.to(module.bias.device)))


def _check_scores(name: str, scores: Tensor | None, shape: tuple[int, int], pattern: Block) -> None:
    if scores is None or tuple(scores.shape) != shape:
        got = "none" if scores is None else str(tuple(scores.shape))
        raise ValueError(f"permute_: expected scores {shape} of {name}, got {got}")
    lowest, highest = scores.aminmax()
    if not (lowest >= 0 and highest < torch.inf):  # false for NaN too
        raise ValueError(f"permute_: expected finite scores >= 0 for {name}, got NaN, infinite or negative ones")
    try:
        pattern.check(shape)
    except ValueError as error:
        raise ValueError(f"permute_: {name}: {error}") from None
