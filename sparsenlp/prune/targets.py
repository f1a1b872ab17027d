"""A pattern and a sparsity for each layer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.composite import on_split
from .api import owners_of, present_masks, set_mask
from .criteria import Criterion, find_criterion
from .masks import check_sparsity, local_masks
from .patterns import Pattern
from .scores import score_layers
from .statistics import LayerStatistics


@dataclass(frozen=True)
class LayerTarget:
    """What a layer is pruned to. Raises ValueError for a sparsity that the pattern cannot have."""

    pattern: Pattern
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.pattern, self.sparsity)

    def __str__(self) -> str:
        return f"{self.pattern} {self.sparsity:.1%}"


@torch.no_grad()
@on_split
def prune_layers_(
    model: nn.Module,
    targets: Mapping[str, LayerTarget],
    criterion: str | Criterion = "magnitude",
    statistics: Mapping[str, LayerStatistics] | None = None,
    aggregation: str | None = None,
) -> dict[str, float]:
    """Mask the least important weights of each layer in `targets`, as `prune_` does in scope "local"; in place.

    targets  name of an nn.Linear -> pattern and sparsity; other layers stay as they are
    returns  layer name -> sparsity

    Raises ValueError, with the model untouched, as `prune_`, and for no target or a name that is not an nn.Linear.
    """
    if not targets:
        raise ValueError("prune_layers_: expected a target for some layer, got none")
    modules = dict(model.named_modules())
    layers: dict[str, nn.Linear] = {}
    for name in targets:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            got = "no such module" if layer is None else type(layer).__name__
            raise ValueError(f"prune_layers_: expected {name} to be an nn.Linear, got {got}")
        layers[name] = layer
    rule = find_criterion(criterion)
    owners = owners_of(model, layers)
    for name, owner in owners.items():
        if targets[name] != targets[owner]:
            raise ValueError(
                f"prune_layers_: expected one target for {owner} and {name}, which share a weight, "
                f"got {targets[owner]} and {targets[name]}"
            )
    first = [name for name in layers if owners[name] == name]
    previous: dict[str, Tensor] = {}
    for name in layers:
        previous |= present_masks({name: layers[name]}, targets[name].pattern, owners)
    scores = score_layers({name: layers[name] for name in first}, criterion, statistics)
    masks: dict[str, Tensor] = {}
    for name in first:
        pattern, sparsity = targets[name].pattern, targets[name].sparsity
        alone = {name: scores[name]}
        masks |= local_masks(alone, pattern, sparsity, previous, aggregation or rule.aggregation)
    for name, layer in layers.items():
        mask = masks[owners[name]]
        set_mask(layer, mask if owners[name] == name else mask.clone(), targets[name].pattern)
    return {name: 1 - masks[owner].sum().item() / masks[owner].numel() for name, owner in owners.items()}
