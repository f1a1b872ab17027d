"""What each layer costs at each target, as the cost model predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..cost import CostModel, Kind, Work
from ..plan import BlockShape
from ..prune import Block, LayerTarget, Pattern
from .knapsack import Option


class LayerCosts:
    """Predicted cost of a layer: its share of the time of all dense layers, averaged over token counts.

    model         of this machine, calibrated for what `kinds` names; KeyError otherwise
    shapes        name -> (N, K)
    dtype         of the weights: float32 or bfloat16
    token_counts  rows of the input
    blocks        block shapes in which a pruned layer may run
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
        """Layers of which a prediction is needed: dense, and in each block shape."""
        return [Kind.of(dtype), *(Kind.of(dtype, block) for block in blocks)]

    def dense(self, name: str) -> float:
        """Cost of a layer that is not pruned."""
        return self._share(None, self.shapes[name], 1.0)

    def pruned(self, name: str, target: LayerTarget) -> float:
        """Cost of a layer at a target: the fastest of dense and the blocks that hold the pattern without zeros."""
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
