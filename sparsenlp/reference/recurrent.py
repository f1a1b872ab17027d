"""What the references of sparse_lstm and sparse_gru share: the order of steps, states before them, projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.block import to_dense
from .bsr_linear import bsr_linear


class Step(NamedTuple):
    """Tokens [start, start + size) of a packed sequence are those of one step."""

    start: int
    size: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.size)


def steps_of(x: Tensor, batch_sizes: Tensor | None, reverse: bool) -> list[Step]:
    """The steps in the order in which a direction takes them, for x (T, B, K) or packed (tokens, K)."""
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    steps, start = [], 0
    for size in sizes:
        steps.append(Step(start, size))
        start += size
    return steps[::-1] if reverse else steps


def in_order(parts: list[Tensor], steps: list[Step]) -> Tensor:
    """Rows of all steps (tokens, ...), in the order of the tokens."""
    return torch.cat([part for _, part in sorted(zip(steps, parts, strict=True), key=lambda pair: pair[0].start)])


def before(rows: Tensor, initial: Tensor, steps: list[Step]) -> Tensor:
    """The state before each step (tokens, F), from those after it, `rows` (tokens, F), and the initial ones (B, F)."""
    parts, last = [], Step(0, 0)
    for step in steps:
        known = min(last.size, step.size)
        parts.append(torch.cat([rows[last.start : last.start + known], initial[known : step.size]]))
        last = step
    return in_order(parts, steps)


def update(state: Tensor, new: Tensor) -> Tensor:
    """(B, F) with the first rows replaced."""
    return torch.cat([new, state[new.shape[0] :]])


def linear(
    at: int,
    columns: int,
    crow_indices: list[Tensor],
    col_indices: list[Tensor],
    values: list[Tensor],
    scales: list[Tensor],
    bias: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """bsr_linear with matrix `at`, made dense once where it is not int8."""
    if scales:
        return lambda x: bsr_linear(x, crow_indices[at], col_indices[at], values[at], bias, "none", None, scales[at])
    weight = to_dense(crow_indices[at], col_indices[at], values[at], columns)
    return lambda x: F.linear(x, weight, bias)


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gates and cells are kept in for the backward pass."""
    return torch.promote_types(dtype, torch.float32)
