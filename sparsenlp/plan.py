"""The record of a conversion: what was chosen for each layer, the times behind it, and on which machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Any

import torch

from .measure import Timing, machine_line

BlockShape = tuple[int, int]
Times = dict[int, Timing]
"""{tokens: seconds per call}"""


@dataclass(frozen=True)
class PlanRow:
    """One nn.Linear.

    shape           (N, K) of the weight
    sparsity        fraction of its weights that are zero
    block           (n, k) of the SparseLinear that replaces it, None if it stays dense
    stored_density  fraction of the weights that `block` stores
    reason          why this was chosen
    speedup         dense time / best sparse time, geometric mean over the token counts; None if not measured
    dense, sparse   the times; those of an alike layer where layers shared a measurement
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    sparsity: float
    block: BlockShape | None = None
    stored_density: float = 1.0
    reason: str = ""
    speedup: float | None = None
    dense: Times = field(default_factory=dict)
    sparse: dict[BlockShape, Times] = field(default_factory=dict)

    def keep_dense(self, reason: str, speedup: float | None = None) -> PlanRow:
        return replace(self, reason=reason, speedup=speedup)

    def choose(self, block: BlockShape, density: float, reason: str, speedup: float | None = None) -> PlanRow:
        return replace(self, block=block, stored_density=density, reason=reason, speedup=speedup)

    def with_times(self, dense: Times, sparse: dict[BlockShape, Times]) -> PlanRow:
        return replace(self, dense=dense, sparse=sparse)

    @property
    def chosen(self) -> str:
        return "dense" if self.block is None else block_name(self.block)

    @property
    def best(self) -> Times:
        """Times of the chosen block, or of the fastest one if dense won; empty if not measured."""
        if self.block is not None:
            return self.sparse.get(self.block, {})
        return min(self.sparse.values(), key=geometric_mean, default={})

    def as_dict(self) -> dict[str, Any]:
        """JSON data; times in seconds."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity,
            "chosen": self.chosen,
            "stored_density": self.stored_density,
            "reason": self.reason,
            "speedup": self.speedup,
            "dense_seconds": _times_dict(self.dense),
            "sparse_seconds": {block_name(block): _times_dict(times) for block, times in self.sparse.items()},
        }


@dataclass(frozen=True)
class Plan:
    """What `sparsify_` did. `str(plan)` is a table, `as_dict` the same as JSON data.

    machine       as `measure.machine()`
    threads       torch threads during the measuring
    measured      whether times decided
    measurements  how many distinct ones were made
    """

    rows: tuple[PlanRow, ...]
    machine: dict[str, Any]
    threads: int
    token_counts: tuple[int, ...]
    measured: bool
    measurements: int

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers that are sparse now."""
        return tuple(row.name for row in self.rows if row.block is not None)

    @property
    def spread(self) -> float | None:
        """Largest (p80 - p20) / median among the times; None without any."""
        times = (t for row in self.rows for ts in (row.dense, *row.sparse.values()) for t in ts.values())
        return max((t.spread for t in times), default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "threads": self.threads,
            "token_counts": list(self.token_counts),
            "measured": self.measured,
            "measurements": self.measurements,
            "spread": self.spread,
            "rows": [row.as_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        return "\n".join([_align(self._cells()), *self._footer()])

    def _cells(self) -> list[list[str]]:
        counts = self.token_counts if self.measured else ()
        columns = [f"{kind} ms @{m}" for m in counts for kind in ("dense", "sparse")]
        cells = [["layer", "shape", "dtype", "zeros", "chosen", *columns, "why"]]
        for row in self.rows:
            times = [_ms(ts.get(m)) for m in counts for ts in (row.dense, row.best)]
            shape = "x".join(map(str, row.shape))
            dtype = str(row.dtype).removeprefix("torch.")
            cells.append([row.name, shape, dtype, f"{row.sparsity:.1%}", row.chosen, *times, row.reason])
        return cells

    def _footer(self) -> list[str]:
        lines = [f"{len(self.converted)} of {len(self.rows)} layers are sparse now"]
        if self.measured and self.spread is not None:
            lines.append(
                f"{self.measurements} measurements on {self.threads} threads, medians, weights warm; "
                f"largest spread (p80 - p20) {self.spread:.0%}; sparse = the block chosen, or the best if dense won"
            )
        return [*lines, machine_line({**self.machine, "threads": self.threads})]


def geometric_mean(times: Times) -> float:
    """Of the medians over the token counts, seconds."""
    return exp(sum(log(timing.median) for timing in times.values()) / len(times))


def block_name(block: BlockShape) -> str:
    """(8, 1) -> "8x1"."""
    return f"{block[0]}x{block[1]}"


def _times_dict(times: Times) -> dict[str, Any]:
    return {str(tokens): timing.as_dict() for tokens, timing in times.items()}


def _ms(timing: Timing | None) -> str:
    return "-" if timing is None else f"{1e3 * timing.median:.3f}"


def _align(cells: list[list[str]]) -> str:
    """A plain-text table: the first column and the last to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for first, *middle, last in cells:
        padded = [text.rjust(width) for text, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return "\n".join(lines)
