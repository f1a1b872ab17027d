"""Which weights are removed together: single weights, n x k blocks, or the worst of every m."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats.block import split_blocks

AGGREGATIONS = ("sum", "l2", "mean")


class Pattern(Protocol):
    """A rule that groups the weights of an (N, K) matrix into units that are kept or pruned whole.

    max_sparsity  no mask of this pattern has more zeros than this fraction
    step          units are pruned in multiples of this number
    """

    @property
    def max_sparsity(self) -> float: ...

    @property
    def step(self) -> int: ...

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if a matrix of `shape` cannot be divided into whole units."""

    def scores(self, elementwise: Tensor, aggregation: str = "sum") -> Tensor:
        """One score per unit from one score per weight (N, K); the lowest are pruned first, +inf never.

        aggregation  of the scores in a unit: "sum", "l2" (their Euclidean norm) or "mean"

        A unit of which a weight scores -inf, as what is pruned already does, scores -inf.
        """

    def expand(self, unit_mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """Boolean mask over the weights, `shape` (N, K), from one boolean per unit."""


@dataclass(frozen=True)
class Unstructured:
    """Every weight is its own unit."""

    @property
    def max_sparsity(self) -> float:
        return 1.0

    @property
    def step(self) -> int:
        return 1

    def check(self, shape: tuple[int, ...]) -> None:
        _check_matrix(self, shape)

    def scores(self, elementwise: Tensor, aggregation: str = "sum") -> Tensor:
        """(N, K) -> (N, K), unchanged."""
        self.check(tuple(elementwise.shape))
        return elementwise

    def expand(self, unit_mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """(N, K) -> (N, K), unchanged."""
        _check_units(self, unit_mask, shape)
        return unit_mask.bool()

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block:
    """Blocks of n rows (output features) by k columns (input features), kept or pruned whole."""

    n: int
    k: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise ValueError(f"Block: expected sides of at least 1, got {self.n}x{self.k}")

    @property
    def max_sparsity(self) -> float:
        return 1.0

    @property
    def step(self) -> int:
        return 1

    def check(self, shape: tuple[int, ...]) -> None:
        _check_matrix(self, shape)
        if shape[0] % self.n or shape[1] % self.k:
            raise ValueError(f"{self}: expected a shape divisible by blocks of {self}, got {shape[0]}x{shape[1]}")

    def scores(self, elementwise: Tensor, aggregation: str = "sum") -> Tensor:
        """(N, K) -> (N / n, K / k)."""
        self.check(tuple(elementwise.shape))
        return _aggregate(split_blocks(elementwise, (self.n, self.k)), (2, 3), aggregation)

    def expand(self, unit_mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """(N / n, K / k) -> (N, K)."""
        self.check(shape)
        _check_units(self, unit_mask, (shape[0] // self.n, shape[1] // self.k))
        return unit_mask.bool().repeat_interleave(self.n, dim=0).repeat_interleave(self.k, dim=1)

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass(frozen=True)
class NM:
    """The n best of every m consecutive weights along K are kept (2:4 is what GPUs accelerate).

    The sparsity of a full mask is fixed at 1 - n / m. A lower sparsity s, as on the way of a gradual
    schedule, makes a fraction s / (1 - n / m) of the groups n:m, those that lose least first, and
    leaves the others dense.

    The unit is one weight. The n best of a group score +inf; the m - n others share one score, the
    aggregate of theirs, so that a whole group goes at once.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"NM: expected 0 < n < m, got {self.n}:{self.m}")

    @property
    def max_sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def step(self) -> int:
        return self.m - self.n

    def check(self, shape: tuple[int, ...]) -> None:
        _check_matrix(self, shape)
        if shape[1] % self.m:
            raise ValueError(f"{self}: expected columns divisible by {self.m}, got shape {shape[0]}x{shape[1]}")

    def scores(self, elementwise: Tensor, aggregation: str = "sum") -> Tensor:
        """(N, K) -> (N, K); see the class."""
        self.check(tuple(elementwise.shape))
        groups = elementwise.unflatten(1, (-1, self.m))
        worst = _ranks(groups) < self.step
        loss = _aggregate(torch.where(worst, groups, 0), (2,), aggregation)
        if aggregation == "mean":
            loss = loss * (self.m / self.step)
        return torch.where(worst, loss[..., None], torch.inf).flatten(1)

    def expand(self, unit_mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """(N, K) -> (N, K), unchanged."""
        self.check(shape)
        _check_units(self, unit_mask, shape)
        return unit_mask.bool()

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_pattern(text: str) -> Pattern:
    """ "unstructured", "8x1" (rows x columns) or "2:4"; the inverse of `str`. Raises ValueError."""
    if text == "unstructured":
        return Unstructured()
    found = re.fullmatch(r"(\d{1,6})([x:])(\d{1,6})", text)
    if found is None:
        raise ValueError(f'pattern: expected "unstructured", "8x1" (rows x columns) or "2:4", got "{text}"')
    first, second = int(found[1]), int(found[3])
    return Block(first, second) if found[2] == "x" else NM(first, second)


def check_aggregation(aggregation: str) -> None:
    """Raise ValueError unless it is one of AGGREGATIONS."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {aggregation}")


def _aggregate(scores: Tensor, dims: tuple[int, ...], aggregation: str) -> Tensor:
    """Sum, mean or norm over `dims`; -inf wherever one of the scores is."""
    check_aggregation(aggregation)
    if aggregation != "l2":
        return scores.sum(dim=dims) if aggregation == "sum" else scores.mean(dim=dims)
    lowest = scores.amin(dim=dims)
    if ((lowest < 0) & (lowest > -torch.inf)).any():
        raise ValueError("aggregation: expected sum or mean for scores below zero, got l2")
    return scores.square().sum(dim=dims).sqrt().masked_fill(lowest == -torch.inf, -torch.inf)


def _ranks(groups: Tensor) -> Tensor:
    """Place of each value among its last dimension, 0 = lowest, ties in index order; int16 of the same shape.

    Counting the lower ones is many times faster than sorting when that dimension is short.
    """
    size = groups.shape[-1]
    position = torch.arange(size, device=groups.device)
    ranks = torch.zeros_like(groups, dtype=torch.int16)
    for j in range(size):
        other = groups[..., j : j + 1]
        ranks += torch.where(position > j, other <= groups, other < groups)
    return ranks


def _check_matrix(pattern: Pattern, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{pattern}: expected a nonempty 2-D matrix, got shape {tuple(shape)}")


def _check_units(pattern: Pattern, unit_mask: Tensor, expected: tuple[int, int]) -> None:
    if tuple(unit_mask.shape) != tuple(expected):
        raise ValueError(f"{pattern}: expected a unit mask of shape {tuple(expected)}, got {tuple(unit_mask.shape)}")
