"""The record of a conversion: what was chosen for each layer, the times behind it, and on which machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from math import exp, log
from typing import Any

import torch

from .measure import Timing, machine_line

BlockShape = tuple[int, int]
Times = dict[int, Timing]
"""{tokens: seconds per call}"""
Seconds = dict[int, float]
"""{tokens: predicted seconds per call}"""
SEPARATE = "separate layers"
"""An encoder that is not fused."""
DENSE = "dense"
"""A layer that is not sparse."""
MEASURES = ("model", "time", "off")
"""What may decide: a cost model and a timing that confirms it, timings alone, or the pattern of zeros."""


@dataclass(frozen=True)
class PlanRow:
    """One nn.Linear.

    shape           (N, K) of the weight
    sparsity        fraction of its weights that are zero
    block           (n, k) of the SparseLinear that replaces it, None if it stays dense
    stored_density  fraction of the weights that `block` stores
    reason          why this was chosen
    speedup         dense time / best sparse time, geometric mean over the token counts, as timed or, for a layer that
                    was not timed, as predicted; None without either
    dense, sparse   the times; those of an alike layer where layers shared a measurement
    predicted_dense, predicted_sparse   what the cost model said
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
    predicted_dense: Seconds = field(default_factory=dict)
    predicted_sparse: dict[BlockShape, Seconds] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def keep_dense(self, reason: str, speedup: float | None = None) -> PlanRow:
        return replace(self, reason=reason, speedup=speedup)

    def choose(self, block: BlockShape, density: float, reason: str, speedup: float | None = None) -> PlanRow:
        return replace(self, block=block, stored_density=density, reason=reason, speedup=speedup)

    def with_times(self, dense: Times, sparse: dict[BlockShape, Times]) -> PlanRow:
        return replace(self, dense=dense, sparse=sparse)

    def with_predictions(self, dense: Seconds, sparse: dict[BlockShape, Seconds]) -> PlanRow:
        return replace(self, predicted_dense=dense, predicted_sparse=sparse)

    @property
    def chosen(self) -> str:
        return DENSE if self.block is None else block_name(self.block)

    @property
    def best(self) -> Times:
        """Times of the chosen block, or of the fastest one if dense won; empty if not measured."""
        if self.block is not None:
            return self.sparse.get(self.block, {})
        return min(self.sparse.values(), key=geometric_mean, default={})

    @property
    def predicted_best(self) -> Seconds:
        """Predictions for the chosen block, or for the one predicted fastest if dense won; empty without a model."""
        if self.block is not None:
            return self.predicted_sparse.get(self.block, {})
        return min(self.predicted_sparse.values(), key=mean_seconds, default={})

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
            "predicted_dense_seconds": _seconds_dict(self.predicted_dense),
            "predicted_sparse_seconds": {block_name(b): _seconds_dict(s) for b, s in self.predicted_sparse.items()},
        }


@dataclass(frozen=True)
class CompositePlanRow:
    """A layer of several matrices (see layers.composite), which are all sparse or all dense.

    kind            torch's class, "LSTM"
    weights         in all matrices together
    sparsity        fraction of them that are zero
    block           (n, k) of the matrices, None if the layer stays dense
    precision       "int8" where they were quantized, else None
    stored_density  fraction of the weights that `block` stores
    reason, speedup, times, cosines   as in EncoderPlanRow, of DENSE and each block shape, "8x1", "8x1 int8"
    """

    name: str
    kind: str
    weights: int
    dtype: torch.dtype
    sparsity: float
    block: BlockShape | None = None
    precision: str | None = None
    stored_density: float = 1.0
    reason: str = ""
    speedup: float | None = None
    times: dict[str, Times] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        return DENSE if self.block is None else option_name(self.block, self.precision)

    def as_dict(self) -> dict[str, Any]:
        """JSON data; times in seconds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "weights": self.weights,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity,
            "chosen": self.chosen,
            "stored_density": self.stored_density,
            "reason": self.reason,
            "speedup": self.speedup,
            "seconds": {option: _times_dict(times) for option, times in self.times.items()},
            "cosines": self.cosines,
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.name} ({self.kind}, {self.weights:,} weights, {dtype}, {self.sparsity:.1%} zeros)"
        return "\n  ".join([f"{text}: {self.chosen}, {self.reason}", *_option_lines(self.times, self.cosines)])


@dataclass(frozen=True)
class SkippedRow:
    """Weights that were not considered, because no sparse layer holds such.

    kind       class of the modules that have them
    parameter  its name in them
    count      of the modules
    weights    in all of them together
    reason     why not
    prunable   `prune_` makes zeros in them all the same
    """

    kind: str
    parameter: str
    count: int
    weights: int
    reason: str
    prunable: bool = False

    def __str__(self) -> str:
        return f"not considered: {self.parameter} of {self.count} {self.kind} ({self.weights:,} weights): {self.reason}"


@dataclass(frozen=True)
class EncoderPlanRow:
    """One encoder, timed as it is (SEPARATE) and fused.

    chosen    the option that runs now
    reason    why
    speedup   separate time / chosen time, geometric mean over the token counts; None without times
    times     of each option
    cosines   of each fused option: least cosine similarity of a token's output to the separate layers', random input
    dead_weight  for each layer what its fused form leaves out (see dead_weight.DeadWeight.as_dict)
    """

    name: str
    kind: str
    layers: int
    chosen: str
    reason: str
    speedup: float | None = None
    times: dict[str, Times] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    dead_weight: tuple[dict[str, Any], ...] = ()

    @property
    def fused(self) -> bool:
        return self.chosen != SEPARATE

    def as_dict(self) -> dict[str, Any]:
        """JSON data; times in seconds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "layers": self.layers,
            "chosen": self.chosen,
            "reason": self.reason,
            "speedup": self.speedup,
            "seconds": {option: _times_dict(times) for option, times in self.times.items()},
            "cosines": self.cosines,
            "dead_weight": list(self.dead_weight),
        }

    def __str__(self) -> str:
        text = f"{self.name or 'encoder'} ({self.kind}, {self.layers} layers): {self.chosen}, {self.reason}"
        lines = ["\n  ".join([text, *_option_lines(self.times, self.cosines)])]
        if any(
            counts["removed"] for layer in self.dead_weight for counts in layer.values() if isinstance(counts, dict)
        ):
            lines.append(f"  dead weight left out: {_dead_weight_text(self.dead_weight)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class OutputChange:
    """How far the output of the converted model is from the one before, on the inputs that were given.

    cosine         least cosine similarity over the last dimension
    max_error      largest difference / largest magnitude before
    before, after  what the evaluation function gave; None without one
    """

    cosine: float | None = None
    max_error: float | None = None
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.cosine is not None:
            parts.append(
                f"output on the given inputs: cosine {self.cosine:.6f}, largest relative error {self.max_error:.1e}"
            )
        if self.before is not None:
            parts.append(f"evaluated: {self.before:.4f} before, {self.after:.4f} after")
        return "; ".join(parts)


@dataclass(frozen=True)
class Plan:
    """What `sparsify_` did. `str(plan)` is a table, `as_dict` the same as JSON data.

    machine       as `measure.machine()`
    threads       torch threads during the measuring
    measure       what decided, one of MEASURES
    measurements  how many distinct ones were made
    model_errors  of the cost model, by kind of layer: 90th percentile of its relative error on calls it had not seen
    encoders      one row for each encoder of a known family
    composites    one row for each recurrent layer and convolution
    change        of the model's output, where inputs or an evaluation were given
    skipped       weights that were not considered
    """

    rows: tuple[PlanRow, ...]
    machine: dict[str, Any]
    threads: int
    token_counts: tuple[int, ...]
    measure: str
    measurements: int
    model_errors: dict[str, float] = field(default_factory=dict)
    encoders: tuple[EncoderPlanRow, ...] = ()
    change: OutputChange | None = None
    composites: tuple[CompositePlanRow, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()

    @property
    def layers(self) -> tuple[PlanRow | CompositePlanRow, ...]:
        """Rows of all layers that were considered."""
        return (*self.rows, *self.composites)

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers that are sparse now."""
        return tuple(row.name for row in self.layers if row.block is not None)

    @property
    def spread(self) -> float | None:
        """Largest (p80 - p20) / median among the times; None without any."""
        tables = [times for row in self.rows for times in (row.dense, *row.sparse.values())]
        tables += [times for row in self.composites for times in row.times.values()]
        return max((timing.spread for times in tables for timing in times.values()), default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "threads": self.threads,
            "token_counts": list(self.token_counts),
            "measure": self.measure,
            "measurements": self.measurements,
            "model_errors": self.model_errors,
            "spread": self.spread,
            "rows": [row.as_dict() for row in self.rows],
            "composites": [row.as_dict() for row in self.composites],
            "skipped": [asdict(row) for row in self.skipped],
            "encoders": [row.as_dict() for row in self.encoders],
            "change": None if self.change is None else asdict(self.change),
        }

    def __str__(self) -> str:
        return "\n".join([*([_align(self._cells())] if self.rows else []), *self._footer()])

    def _cells(self) -> list[list[str]]:
        counts = self.token_counts if self.measure != "off" else ()
        predicts = self.measure == "model"
        columns = [f"{kind} ms @{m}" for m in counts for kind in _column_kinds(predicts)]
        cells = [["layer", "shape", "dtype", "zeros", "chosen", *columns, "why"]]
        for row in self.rows:
            times = []
            for m in counts:
                for timed, predicted in ((row.dense, row.predicted_dense), (row.best, row.predicted_best)):
                    times += [_ms(timed[m].median if m in timed else None)]
                    times += [_ms(predicted.get(m))] if predicts else []
            shape = "x".join(map(str, row.shape))
            dtype = str(row.dtype).removeprefix("torch.")
            cells.append([row.name, shape, dtype, f"{row.sparsity:.1%}", row.chosen, *times, row.reason])
        return cells

    def _footer(self) -> list[str]:
        lines = [*map(str, self.composites), f"{len(self.converted)} of {len(self.layers)} layers are sparse now"]
        if self.spread is not None:
            lines.append(
                f"{self.measurements} measurements on {self.threads} threads, medians, weights warm; "
                f"largest spread (p80 - p20) {self.spread:.0%}; sparse = the block chosen, or the best if dense won"
            )
        if self.model_errors:
            errors = ", ".join(f"{kind} {error:.0%}" for kind, error in self.model_errors.items())
            lines.append(f"predicted by the cost model, whose error is below (p90, on calls it had not seen) {errors}")
        lines += map(str, (*self.skipped, *self.encoders))
        if self.change is not None:
            lines.append(str(self.change))
        return [*lines, machine_line({**self.machine, "threads": self.threads})]


def geometric_mean(times: Times) -> float:
    """Of the medians over the token counts, seconds."""
    return exp(sum(log(timing.median) for timing in times.values()) / len(times))


def mean_seconds(seconds: Seconds) -> float:
    """Geometric mean of predictions over the token counts, seconds."""
    return exp(sum(map(log, seconds.values())) / len(seconds))


def block_name(block: BlockShape) -> str:
    """(8, 1) -> "8x1"."""
    return f"{block[0]}x{block[1]}"


def option_name(block: BlockShape, precision: str | None) -> str:
    """((8, 1), "int8") -> "8x1 int8"."""
    return block_name(block) + (f" {precision}" if precision else "")


def _option_lines(times: dict[str, Times], cosines: dict[str, float]) -> list[str]:
    """A line for each option that was timed."""
    lines = []
    for option, own in times.items():
        ms = ", ".join(f"{_ms(timing.median)} ms @{tokens}" for tokens, timing in own.items())
        lines.append(f"{option} {ms}" + (f", cosine {cosines[option]:.6f}" if option in cosines else ""))
    return lines


def _dead_weight_text(layers: tuple[dict[str, Any], ...]) -> str:
    """Sums over the layers: "12 of 72 heads, ..."."""
    parts = []
    for name in ("heads", "query_dims", "value_channels", "neurons", "blocks"):
        removed, of = (sum(layer[name][key] for layer in layers) for key in ("removed", "of"))
        if removed:
            parts.append(f"{removed} of {of} {name.replace('_', ' ')}")
    return ", ".join(parts)


def _times_dict(times: Times) -> dict[str, Any]:
    return {str(tokens): timing.as_dict() for tokens, timing in times.items()}


def _seconds_dict(seconds: Seconds) -> dict[str, float]:
    return {str(tokens): value for tokens, value in seconds.items()}


def _column_kinds(predicts: bool) -> tuple[str, ...]:
    return ("dense", "predicted", "sparse", "predicted") if predicts else ("dense", "sparse")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


def _align(cells: list[list[str]]) -> str:
    """A plain-text table: the first column and the last to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for first, *middle, last in cells:
        padded = [text.rjust(width) for text, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return "\n".join(lines)
