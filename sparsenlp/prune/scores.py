"""Layers and their statistics -> scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from .criteria import Criterion, find_criterion
from .statistics import LayerStatistics


def score_layers(
    layers: Mapping[str, nn.Module],
    criterion: str | Criterion,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> Mapping[str, Tensor]:
    """Layer name -> float32 scores of the shape of its weight, masks applied.

    They are made when asked for, so that a loop holds one layer's at a time. Raises ValueError for an
    unknown criterion and statistics that lack what it needs; when a score is asked for, for one of
    another shape than the weight.
    """
    rule = find_criterion(criterion)
    if rule.needs:
        _check(layers, str(criterion), rule.needs, statistics)
    return _Scores(layers, rule, statistics or {})


def _check(
    layers: Mapping[str, nn.Module],
    criterion: str,
    needs: tuple[str, ...],
    statistics: Mapping[str, LayerStatistics] | None,
) -> None:
    if not statistics:
        got = "None" if statistics is None else "statistics without an update"
        raise ValueError(f"statistics: expected {', '.join(needs)} for {criterion}, got {got}")
    for name in layers:
        if name not in statistics:
            raise ValueError(f"statistics: expected those of every selected layer, got none of {name}")
        for field in needs:
            try:
                statistics[name].require(field)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


class _Scores(Mapping[str, Tensor]):
    def __init__(
        self, layers: Mapping[str, nn.Module], criterion: Criterion, statistics: Mapping[str, LayerStatistics]
    ) -> None:
        self.layers, self.criterion, self.statistics = layers, criterion, statistics

    def __getitem__(self, name: str) -> Tensor:
        weight = cast(Tensor, self.layers[name].weight).detach().float()
        scores = self.criterion.score(weight, self.statistics.get(name, LayerStatistics()))
        if scores.shape != weight.shape:
            raise ValueError(
                f"{name}: expected scores of shape {tuple(weight.shape)}, that of the weight, got {tuple(scores.shape)}"
            )
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
