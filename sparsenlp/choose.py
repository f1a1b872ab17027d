"""Choosing between a dense layer and its block shapes: by the cost model, by timing, or by the pattern of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .cost import CostModel, Kind, Work, calibrated
from .formats import BlockSparse
from .layers import SparseLinear
from .measure import interleave, ratio
from .plan import BlockShape, PlanRow, Seconds, Times, block_name, geometric_mean, mean_seconds

if TYPE_CHECKING:
    from .convert import SparsifyConfig

SAME_DENSITY = 1.1  # layers whose stored densities differ by less than this factor share a measurement
MUCH_SPARSER = 2.0  # a layer that stores up to this factor fewer values is taken to be no slower
AS_SPARSE = 1.25  # without measuring, a block shape is as good as one that stores up to this factor fewer values
CONFIRMATION = 0.2  # of a measurement's time confirms what the cost model says
RESULT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Candidate:
    """A layer, its weight (N, K) with masks applied, and {block: stored density} of the shapes in question."""

    name: str
    layer: nn.Linear
    weight: Tensor
    densities: dict[BlockShape, float]

    @property
    def like(self) -> tuple:
        """What layers must have in common, beside densities, to share a measurement."""
        return (self.weight.shape, self.weight.dtype, self.weight.device, self.layer.bias is not None)


@dataclass(frozen=True)
class Measurement:
    """Times of one layer, what another must have in common with it to use them, and the time spent on each."""

    like: tuple
    densities: dict[BlockShape, float]
    seconds: float
    dense: Times
    sparse: dict[BlockShape, Times]

    def serves(self, like: tuple, densities: dict[BlockShape, float], sparser: float = SAME_DENSITY) -> bool:
        """Whether it holds for a layer that stores at most 10 % more, or `sparser` times less."""
        return (
            self.like == like
            and self.densities.keys() == densities.keys()
            and all(d / sparser <= densities[b] <= SAME_DENSITY * d for b, d in self.densities.items())
        )


class Chooser:
    """Chooses for the layers of one model; `measurements` are those that it made on the way.

    layers   (dtype, block shapes in question) of every layer to come: what the cost model is calibrated for
    """

    def __init__(
        self, config: SparsifyConfig, threads: int, layers: Iterable[tuple[torch.dtype, Iterable[BlockShape]]]
    ) -> None:
        self.config = config
        self.measurements: list[Measurement] = []
        self.model: CostModel | None = None
        if config.measure == "model":
            kinds = {kind for dtype, blocks in layers for kind in _kinds(dtype, blocks)}
            self.model = config.cost_model or calibrated(kinds if native.available else (), threads)

    @property
    def model_errors(self) -> dict[str, float]:
        """90th percentile of the cost model's error, by kind of layer."""
        model = self.model
        return {} if model is None else {str(kind): model.error(kind) for kind in model.fitted}

    def choose(self, row: PlanRow, candidate: Candidate) -> PlanRow:
        """The row completed. Raises RuntimeError if a sparse layer's result differs from the dense one's."""
        if self.config.measure == "off":
            block = by_pattern(candidate.densities)
            return row.choose(block, candidate.densities[block], "by pattern, not measured")
        kinds = _kinds(row.dtype, candidate.densities)
        if self.model is not None and kinds and all(kind in self.model.fitted for kind in kinds):
            return self._by_model(row, candidate, self.model)
        return self._decide(row, candidate, self._measure(candidate, self.config.seconds))

    def _by_model(self, row: PlanRow, candidate: Candidate, model: CostModel) -> PlanRow:
        """Predict all, time what may win: longer the closer the call."""
        shape, least = row.shape, self.config.min_speedup
        dense = self._predict(model, Kind.of(row.dtype), shape, 1.0)
        sparse = {b: self._predict(model, Kind.of(row.dtype, b), shape, d) for b, d in candidate.densities.items()}
        row = row.with_predictions(dense, sparse)
        ranked = sorted(sparse, key=lambda b: mean_seconds(sparse[b]))
        best = ranked[0]
        doubt = {block: 1 + model.error(Kind.of(row.dtype, block)) for block in ranked}
        speedup = mean_seconds(dense) / mean_seconds(sparse[best])
        dense_doubt = doubt[best] * (1 + model.error(Kind.of(row.dtype)))
        if speedup * dense_doubt < least:
            return row.keep_dense(f"best sparse ({block_name(best)}) only {speedup:.2f}x, as predicted", speedup)
        reach = mean_seconds(sparse[best]) * doubt[best]
        finalists = {b: candidate.densities[b] for b in ranked[:2] if mean_seconds(sparse[b]) / doubt[b] <= reach}
        final = Candidate(candidate.name, candidate.layer, candidate.weight, finalists)
        if len(finalists) == 1 and speedup / dense_doubt >= least:
            short = CONFIRMATION * self.config.seconds
            for found in (m for m in self.measurements if m.serves(final.like, finalists, MUCH_SPARSER)):
                if (chosen := self._decide(row, final, found)).block is not None:
                    return chosen
            if (chosen := self._decide(row, final, self._measure(final, short))).block is not None:
                return chosen
        return self._decide(row, final, self._measure(final, self.config.seconds))

    def _predict(self, model: CostModel, kind: Kind, shape: tuple[int, int], density: float) -> Seconds:
        stored = round(density * shape[0] * shape[1])
        return {tokens: model.predict(kind, Work(tokens, *shape, stored)) for tokens in self.config.token_counts}

    def _decide(self, row: PlanRow, candidate: Candidate, found: Measurement) -> PlanRow:
        """The fastest by its times, if that is certain."""
        row = row.with_times(found.dense, found.sparse)
        block = min(found.sparse, key=lambda b: geometric_mean(found.sparse[b]))
        speedup = geometric_mean(found.dense) / geometric_mean(found.sparse[block])
        best = f"best sparse ({block_name(block)})"
        if speedup < self.config.min_speedup:
            return row.keep_dense(f"{best} only {speedup:.2f}x", speedup)
        if _certain_speedup(found.dense, found.sparse[block]) <= 1:
            return row.keep_dense(f"{best} {speedup:.2f}x, but not beyond the noise", speedup)
        return row.choose(block, candidate.densities[block], f"{speedup:.2f}x faster", speedup)

    def _measure(self, candidate: Candidate, seconds: float) -> Measurement:
        """Times of this layer or of one like it, with at least so many seconds spent on each token count."""
        for found in self.measurements:
            if found.seconds >= seconds and found.serves(candidate.like, candidate.densities):
                return found
        times = _time(candidate, self.config.token_counts, seconds)
        found = Measurement(candidate.like, candidate.densities, seconds, *times)
        self.measurements.append(found)
        return found


def sparse_layer(layer: nn.Linear, weight: Tensor, block: BlockShape) -> SparseLinear:
    """The layer in blocks: bias, training mode and requires_grad carry over."""
    sparse = SparseLinear.from_weight(BlockSparse.from_dense(weight, block), layer.bias)
    sparse.values.requires_grad_(any(p.requires_grad for p in layer.parameters() if p is not layer.bias))
    sparse.bias = layer.bias
    return sparse.train(layer.training)


def _kinds(dtype: torch.dtype, blocks: Iterable[BlockShape]) -> list[Kind]:
    """Dense and in each block shape; none for a dtype without native kernels."""
    if dtype not in (torch.float32, torch.bfloat16):
        return []
    return [Kind.of(dtype), *(Kind.of(dtype, block) for block in blocks)]


def by_pattern(densities: Mapping[BlockShape, float]) -> BlockShape:
    """The first block shape that stores about as little as any."""
    least = min(densities.values())
    return next(block for block, density in densities.items() if density <= AS_SPARSE * least)


def _certain_speedup(dense: Times, sparse: Times) -> float:
    """What 80 % of the rounds reach at least: geometric mean over the token counts of the paired ratio's p20."""
    return exp(sum(log(ratio(dense[tokens], sparse[tokens]).p20) for tokens in dense) / len(dense))


def _time(candidate: Candidate, token_counts: Sequence[int], seconds: float) -> tuple[Times, dict[BlockShape, Times]]:
    """Dense times and sparse times, interleaved, after checking every sparse result."""
    layer, weight = candidate.layer, candidate.weight
    layers = {block: sparse_layer(layer, weight, block) for block in candidate.densities}
    dense: Times = {}
    sparse: dict[BlockShape, Times] = {block: {} for block in layers}
    generator = torch.Generator().manual_seed(0)
    for tokens in token_counts:
        x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight)
        expected = F.linear(x, weight, layer.bias)
        runs: dict[str, Callable[[], object]] = {"dense": partial(F.linear, x, weight, layer.bias)}
        for block, module in layers.items():
            _check_result(candidate.name, block, module(x), expected)
            runs[block_name(block)] = partial(module, x)
        timings = interleave(runs, seconds, warm=True)
        dense[tokens] = timings["dense"]
        for block in layers:
            sparse[block][tokens] = timings[block_name(block)]
    return dense, sparse


def _check_result(name: str, block: BlockShape, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max())
    bound = RESULT_TOLERANCE[expected.dtype] * max(float(expected.abs().max()), 1e-30)
    if not error <= bound:
        raise RuntimeError(
            f"sparsify_: expected {name} as {block_name(block)} to match dense within {bound:.2e}, got {error:.2e}"
        )
