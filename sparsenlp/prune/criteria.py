"""How much each weight matters: (weight, statistics) -> scores of the same shape, lowest pruned first.

A weight (N, K) comes as float32 with its mask applied; scores are finite float32. What a criterion
needs of LayerStatistics stands in its row of CRITERIA, so that nothing else is collected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import LayerStatistics


@dataclass(frozen=True)
class Criterion:
    """A score, and how it is meant to be used.

    score        (weight, statistics) -> (N, K)
    needs        fields of LayerStatistics that `score` reads, all of gradients or all of inputs
    aggregation  of the scores in a unit of the pattern: "sum", "l2" or "mean"
    scope        in which it ranks best: "global" where scores of different layers compare
    """

    score: Callable[[Tensor, LayerStatistics], Tensor]
    needs: tuple[str, ...] = ()
    aggregation: str = "sum"
    scope: str = "local"


def magnitude(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """|w| (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


def relative(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """|w| / Σ|w| of the layer, a weight's share in its layer: magnitudes that compare across layers.

    LAMP (Lee et al. 2021, arXiv:2010.07611) divides by the larger weights' total instead. Training
    with `proximal_step_` first drives the small shares to zero.
    """
    magnitudes = weight.abs()
    return magnitudes / magnitudes.sum().clamp_min(torch.finfo(torch.float32).tiny)


def random(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Uniform in [0, 1) from torch's default generator, which torch.manual_seed seeds: the honest baseline.

    Blalock et al. 2020, arXiv:2003.03033.
    """
    return torch.rand(weight.shape).to(weight.device)


def gradient(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Σ|dL/dw|: weights that training leaves alone go first, as with `Threshold(alpha=...)` on gradients.

    The magnitude of the loss's slope, one factor of Mozer & Smolensky 1989 (NeurIPS, "Skeletonization").
    """
    return statistics.require("gradient_sum")


def taylor(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Running mean of |w · dL/dw|: the first-order change of the loss when w becomes zero.

    Molchanov et al. 2017 (arXiv:1611.06440) and 2019 (arXiv:1906.10771), per weight.
    """
    return statistics.require("taylor")


def fisher(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """w² · E[(dL/dw)²], twice the second-order change of the loss when w becomes zero.

    Optimal brain damage (LeCun et al. 1990, NeurIPS) with the diagonal of the empirical Fisher for
    the Hessian, as in Theis et al. 2018 (arXiv:1801.05787). `fisher_from_adam` has it for free.
    """
    return weight.square() * statistics.require("gradient_square")


def snip(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """|w · Σ dL/dw| = |dL/dm| for a mask m = 1 on w, at one point (Lee et al. 2019, arXiv:1810.02340).

    Not divided by its total, which changes no ranking.
    """
    return statistics.require("connection")


def movement(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """-Σ w · dL/dw over training, signed: weights that move towards zero go first (hard movement).

    The score that Sanh et al. 2020 (arXiv:2005.07683) train by a straight-through gradient, divided by
    its learning rate.
    """
    return statistics.require("movement")


def wanda(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """|w| · sqrt(E[x²]) with x the weight's input (Sun et al. 2023, arXiv:2306.11695).

    The root mean square replaces the paper's norm, which differs by one factor per model. The paper
    ranks within each output row: scope "row", which with blocks is each row of blocks. Scope "local"
    ranks a whole matrix.
    """
    return weight.abs() * statistics.require("input_square").sqrt()


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, aggregation="l2"),
    "relative": Criterion(relative, scope="global"),
    "random": Criterion(random),
    "gradient": Criterion(gradient, ("gradient_sum",), scope="global"),
    "taylor": Criterion(taylor, ("taylor",), scope="global"),
    "fisher": Criterion(fisher, ("gradient_square",), scope="global"),
    "snip": Criterion(snip, ("connection",), scope="global"),
    "movement": Criterion(movement, ("movement",), scope="global"),
    "wanda": Criterion(wanda, ("input_square",), aggregation="l2", scope="row"),
}


def find_criterion(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; ValueError if CRITERIA has none."""
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion}")
    return CRITERIA[criterion]
