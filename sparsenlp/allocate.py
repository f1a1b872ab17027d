"""Which pattern and sparsity each layer gets, so that a model meets a target and loses as little as possible.

Every layer has options: dense, or a pattern at a sparsity. An option loses something (its sensitivity) and costs
something (predicted time, or the share of weights kept). One option for each layer, least loss, cost within a budget:
the multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, "Knapsack Problems", chapter 11), solved
exactly up to the rounding of costs. Frantar & Alistarh 2022 (SPDY, arXiv:2201.13096) choose sparsities by such a
program, with measured latencies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .cost import CostModel, Kind, Work
from .plan import BlockShape
from .prune import Block, LayerTarget, Pattern
from .prune.masks import local_masks

BINS = 27720
"""Costs are rounded up to this fraction of the budget. Halves to twelfths of it need no rounding."""
SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
"""Offered to each layer, beside none."""

LossFn = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Target:
    """What a pruned model has to reach.

    kind   "speedup" (times the dense model's), "latency" (seconds), "sparsity" (fraction of zeros) or "drop"
           (of the metric, in its own units)
    """

    kind: str
    value: float

    FORMS = '"2x faster", "latency <= 8 ms", "sparsity 0.85" or "accuracy drop <= 1 point"'

    @classmethod
    def parse(cls, text: str) -> Target:
        """One of FORMS; "points" are hundredths. Raises ValueError for anything else, and for values out of range."""
        number = r"(\d+(?:\.\d+)?)"
        rules = {
            "speedup": (rf"{number}\s*x(?: faster)?", {"": 1.0}),
            "latency": (rf"latency\s*<=\s*{number}\s*(us|ms|s)", {"us": 1e-6, "ms": 1e-3, "s": 1.0}),
            "sparsity": (rf"sparsity\s*(?:>=)?\s*{number}\s*(%?)", {"": 1.0, "%": 0.01}),
            "drop": (
                rf"(?:accuracy )?drop\s*<=\s*{number}\s*(points?|%)",
                dict.fromkeys(("point", "points", "%"), 0.01),
            ),
        }
        for kind, (rule, units) in rules.items():
            if found := re.fullmatch(rule, text.strip().lower()):
                unit = found[2] if found.re.groups > 1 else ""
                target = cls(kind, float(found[1]) * units[unit])
                break
        else:
            raise ValueError(f"target: expected {cls.FORMS}, got {text!r}")
        least = {"speedup": target.value > 1, "latency": target.value > 0, "sparsity": 0 < target.value < 1}
        if not least.get(kind, True):
            raise ValueError(
                f"target: expected a speed-up above 1, a latency above 0, a sparsity in (0, 1), got {text!r}"
            )
        return target


@dataclass(frozen=True)
class Option:
    """What a layer may become, and what that loses and costs; `target` None leaves it dense."""

    target: LayerTarget | None
    loss: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """The option chosen for each layer.

    cost  total, in the unit of the options
    loss  total
    """

    options: Mapping[str, Option]

    @property
    def cost(self) -> float:
        return sum(option.cost for option in self.options.values())

    @property
    def loss(self) -> float:
        return sum(option.loss for option in self.options.values())

    @property
    def targets(self) -> dict[str, LayerTarget]:
        """Of the layers that are pruned, as `prune_layers_` takes them."""
        return {name: option.target for name, option in self.options.items() if option.target is not None}

    def __str__(self) -> str:
        width = max(map(len, self.options))
        return "\n".join(
            f"{name:<{width}}  "
            + ("dense" if option.target is None else f"{option.target.pattern} {option.target.sparsity:.1%}")
            for name, option in self.options.items()
        )


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """One option for each layer, with the least total loss whose total cost is at most `budget`.

    Costs are rounded up to budget / BINS, so the budget is kept and the loss is the least for costs larger by that
    much a layer. Raises ValueError, saying the least cost there is, if the budget is below it.
    """
    if not options or not all(options.values()):
        raise ValueError("allocate: expected an option for every layer, got none")
    least = sum(min(option.cost for option in choices) for choices in options.values())
    if not budget > 0 or least > budget:
        raise ValueError(
            f"allocate: expected a budget of at least {least:.4g}, the least that can be, got {budget:.4g}"
        )
    safest = Allocation({name: min(choices, key=lambda option: option.loss) for name, choices in options.items()})
    if safest.cost <= budget:
        return safest
    best = np.zeros(BINS + 1)  # least loss of the layers so far, by bins of cost used up
    chosen: list[np.ndarray] = []
    for choices in options.values():
        total = np.full(BINS + 1, np.inf)
        which = np.zeros(BINS + 1, dtype=np.int32)
        for index, option in enumerate(choices):
            used = math.ceil(option.cost / budget * BINS - 1e-9)
            if used > BINS:
                continue
            candidate = np.full(BINS + 1, np.inf)
            candidate[used:] = best[: BINS + 1 - used] + option.loss
            better = candidate < total
            total[better], which[better] = candidate[better], index
        best = total
        chosen.append(which)
    if not np.isfinite(best[BINS]):  # only rounding stands in the way
        return Allocation({name: min(choices, key=lambda option: option.cost) for name, choices in options.items()})
    picked: dict[str, Option] = {}
    left = BINS
    for (name, choices), which in zip(reversed([*options.items()]), reversed(chosen), strict=True):
        option = choices[which[left]]
        picked[name] = option
        left -= math.ceil(option.cost / budget * BINS - 1e-9)
    return Allocation({name: picked[name] for name in options})


def layer_targets(
    shape: tuple[int, int], patterns: Sequence[Pattern], sparsities: Sequence[float]
) -> list[LayerTarget]:
    """What a layer with a weight of this shape may be pruned to: every pattern that divides it, at what it can have."""
    fitting = []
    for pattern in patterns:
        try:
            pattern.check(shape)
        except ValueError:
            continue
        at = [s for s in sparsities if 0 < s <= pattern.max_sparsity] or [pattern.max_sparsity]
        fitting += [LayerTarget(pattern, sparsity) for sparsity in at]
    return fitting


def removed_scores(
    scores: Mapping[str, Tensor], targets: Mapping[str, Sequence[LayerTarget]]
) -> dict[str, list[float]]:
    """Sensitivity without running the model: the sum of the scores that each target removes, for each layer.

    scores  name -> (N, K), in a unit that compares across layers, such as Taylor's change of the loss
    """
    losses = {}
    for name, layer_scores in scores.items():
        total = layer_scores.double().sum()
        kept = (_mask(name, layer_scores, target) for target in targets[name])
        losses[name] = [float(total - layer_scores.double()[mask].sum()) for mask in kept]
    return losses


@torch.no_grad()
def measured_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    scores: Mapping[str, Tensor],
    targets: Mapping[str, Sequence[LayerTarget]],
    loss: LossFn,
) -> dict[str, list[float]]:
    """Sensitivity by trial: how much `loss(model)` grows when one layer alone is pruned to each of its targets.

    Weights are put back after each trial, on errors too. Raises FloatingPointError for a loss that is not finite.
    """
    before = _finite(loss(model), "the dense model")
    losses: dict[str, list[float]] = {}
    for name, layer in layers.items():
        losses[name] = []
        for target in targets[name]:
            with _pruned(layer, _mask(name, scores[name], target)):
                losses[name].append(max(_finite(loss(model), f"{name} at {target}") - before, 0.0))
    return losses


class LayerCosts:
    """Predicted cost of a layer: its share of the time of all dense layers, averaged over token counts.

    model         of this machine, calibrated for the kinds of `kinds`
    shapes        name -> (N, K)
    """

    def __init__(
        self,
        model: CostModel,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        token_counts: Sequence[int],
        blocks: Sequence[BlockShape],
    ) -> None:
        self.model, self.shapes, self.dtype = model, dict(shapes), dtype
        self.token_counts, self.blocks = tuple(token_counts), tuple(blocks)
        self.dense_seconds = {
            tokens: sum(self._seconds(None, shape, 1.0, tokens) for shape in self.shapes.values())
            for tokens in self.token_counts
        }

    @staticmethod
    def kinds(dtype: torch.dtype, blocks: Sequence[BlockShape]) -> list[Kind]:
        return [Kind.of(dtype), *(Kind.of(dtype, block) for block in blocks)]

    def dense(self, name: str) -> float:
        """Of a layer that is not pruned."""
        return self._share(None, self.shapes[name], 1.0)

    def pruned(self, name: str, target: LayerTarget) -> float:
        """As the fastest of dense and the block shapes that hold the pattern without storing zeros."""
        shape = self.shapes[name]
        density = 1 - target.sparsity
        fitting = [block for block in self.blocks if _holds(target.pattern, block)]
        sparse = [self._share(block, shape, density) for block in fitting]
        return min([self.dense(name), *sparse])

    def _share(self, block: BlockShape | None, shape: tuple[int, int], density: float) -> float:
        shares = (self._seconds(block, shape, density, t) / self.dense_seconds[t] for t in self.token_counts)
        return sum(shares) / len(self.token_counts)

    def _seconds(self, block: BlockShape | None, shape: tuple[int, int], density: float, tokens: int) -> float:
        stored = round(density * shape[0] * shape[1])
        return self.model.predict(Kind.of(self.dtype, block), Work(tokens, *shape, stored))


def meet(
    build: Callable[[float], Allocation],
    measure: Callable[[Allocation], float],
    wanted: float,
    first: float,
    trials: int = 5,
) -> tuple[Allocation, float]:
    """(an allocation whose measured cost is at most `wanted`, that cost), with as large a budget as a few trials find.

    build    budget -> the best allocation within it; may raise ValueError for one that is too small
    measure  what it costs in fact, e.g. the seconds of a model pruned and converted like that
    first    budget to begin with: what the prediction says

    Predictions sum over linear layers, and a model is more than these; each trial moves the budget by what the last
    one was off. Raises ValueError, saying the best there was, if none of them met the target.
    """
    budget, best, fastest = first, None, math.inf
    for _ in range(trials):
        try:
            allocation = build(budget)
        except ValueError as error:
            if best is not None:
                break
            raise ValueError(f"target: expected one that can be met; {error}") from None
        cost = measure(allocation)
        fastest = min(fastest, cost)
        if cost <= wanted and (best is None or allocation.loss < best[0].loss):
            best = (allocation, cost)
        if wanted * 0.97 <= cost <= wanted:
            break
        budget *= min(max(wanted / cost, 0.5), 2.0) * (0.98 if cost > wanted else 0.995)
    if best is None:
        raise ValueError(f"target: expected at most {wanted:.4g}, the best in {trials} trials was {fastest:.4g}")
    return best


def options_for(
    targets: Mapping[str, Sequence[LayerTarget]],
    losses: Mapping[str, Sequence[float]],
    dense_cost: Callable[[str], float],
    pruned_cost: Callable[[str, LayerTarget], float],
) -> dict[str, list[Option]]:
    """The options of each layer; those that cost as much as staying dense are left out."""
    options: dict[str, list[Option]] = {}
    for name, choices in targets.items():
        dense = Option(None, 0.0, dense_cost(name))
        pruned = (Option(t, loss, pruned_cost(name, t)) for t, loss in zip(choices, losses[name], strict=True))
        options[name] = [dense, *(option for option in pruned if option.cost < dense.cost)]
    return options


def _holds(pattern: Pattern, block: BlockShape) -> bool:
    """Whether blocks of this shape cover units of the pattern exactly."""
    if isinstance(pattern, Block):
        return pattern.n % block[0] == 0 and pattern.k % block[1] == 0
    return block == (1, 1)


def _mask(name: str, scores: Tensor, target: LayerTarget) -> Tensor:
    return local_masks({name: scores}, target.pattern, target.sparsity)[name]


def _finite(value: float, of: str) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"sensitivity: expected a finite loss of {of}, got {value}")
    return value


@contextmanager
def _pruned(layer: nn.Linear, mask: Tensor) -> Iterator[None]:
    weight = layer.weight.detach()
    before = weight.clone()
    weight.mul_(mask)
    try:
        yield
    finally:
        weight.copy_(before)
