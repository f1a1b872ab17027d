"""Which pattern and sparsity each layer gets, so that a model meets a target and loses as little as possible.

Every layer has options: dense, or a pattern at a sparsity. An option loses something (its sensitivity) and costs
something (predicted time, or the share of weights kept). One option for each layer, least loss, cost within a budget:
the multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, "Knapsack Problems", chapter 11), solved
exactly up to the rounding of costs. Frantar & Alistarh 2022 (SPDY, arXiv:2201.13096) choose sparsities by such a
program, with measured latencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..prune import LayerTarget

BINS = 27720
"""Costs are rounded up to this fraction of the budget. Halves to twelfths of it need no rounding."""


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
