"""What each layer loses at each target: by the scores that go, or by trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..prune import LayerTarget, Pattern
from ..prune.masks import local_masks

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
"""Offered to each layer, beside none."""

LossFn = Callable[[nn.Module], float]


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
