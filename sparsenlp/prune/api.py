"""Prune a model in place, read its sparsity, make the zeros permanent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .criteria import CRITERIA, GradientStatistics
from .layers import FilterFn, Mask, mask_of, masked_layers, prunable
from .masks import SCOPES, check_sparsity, global_masks, local_masks
from .patterns import Pattern


@torch.no_grad()
def prune_(
    model: nn.Module,
    pattern: Pattern,
    sparsity: float,
    criterion: str = "magnitude",
    scope: str = "local",
    filter_fn: FilterFn | None = None,
    statistics: GradientStatistics | None = None,
) -> dict[str, float]:
    """Mask the least important weights of a model's linear layers, in place.

    pattern     what is removed together: Unstructured(), Block(n, k), NM(n, m)
    sparsity    fraction of zeros over the selected layers, in [0, 1)
    criterion   "magnitude" or "taylor" (see CRITERIA)
    scope       "local": the same sparsity in each layer; "global": one ranking for all, every layer
                keeps at least 1 %
    filter_fn   (module, name) -> bool selects layers; by default all but heads, poolers and embeddings
    statistics  what "taylor" needs; it must cover the selected layers
    returns     layer name -> sparsity

    A mask is a parametrization of the weight (weight = original * mask): it holds through optimizer
    steps, state_dict, deepcopy and `to`. A second call tightens the masks: what is pruned stays
    pruned, so a lower sparsity changes nothing. `finalize_` makes the zeros permanent.

    Raises ValueError, with the model untouched, for a sparsity out of range, an unknown criterion or
    scope, missing statistics, no selected layer, a shape that the pattern does not divide (naming the
    layer), masks of another pattern, or a weight that is parametrized otherwise.
    """
    check_sparsity(pattern, sparsity)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope}")
    layers = prunable(model, filter_fn)
    previous = _present_masks(layers, pattern)
    scores = _score(layers, criterion, statistics)
    masks = (global_masks if scope == "global" else local_masks)(scores, pattern, sparsity, previous)
    for name, layer in layers.items():
        present = mask_of(layer)
        if present is not None:
            present.mask.copy_(masks[name])
        else:
            parametrize.register_parametrization(layer, "weight", Mask(masks[name], str(pattern)))
    return {name: 1 - mask.sum().item() / mask.numel() for name, mask in masks.items()}


@torch.no_grad()
def finalize_(model: nn.Module) -> nn.Module:
    """Write the zeros of every mask into its weight and remove the masks; returns `model`.

    What remains are ordinary modules whose weights are the same Parameter objects as before. A model
    without masks is returned as it is.
    """
    for layer in masked_layers(model).values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


def layer_sparsity(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, float]:
    """Fraction of zero weights in each prunable layer, masks applied, by name. Raises as `prunable`."""
    return {name: 1 - kept / total for name, (kept, total) in _counts(model, filter_fn).items()}


def sparsity_of(model: nn.Module, filter_fn: FilterFn | None = None) -> float:
    """Fraction of zero weights over all prunable layers, masks applied. Raises as `prunable`."""
    counts = _counts(model, filter_fn).values()
    return 1 - sum(kept for kept, _ in counts) / sum(total for _, total in counts)


@torch.no_grad()
def _counts(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, tuple[int, int]]:
    """Nonzero and all weights of each prunable layer."""
    weights = {name: layer.weight for name, layer in prunable(model, filter_fn).items()}
    return {name: (int(weight.count_nonzero()), weight.numel()) for name, weight in weights.items()}


def _present_masks(layers: Mapping[str, nn.Linear], pattern: Pattern) -> dict[str, Tensor]:
    """The masks that the layers carry; checks each layer against the pattern."""
    masks = {}
    for name, layer in layers.items():
        try:
            present = mask_of(layer)
            pattern.check((layer.out_features, layer.in_features))
        except ValueError as error:
            raise ValueError(f"prune_: {name or type(layer).__name__}: {error}") from None
        if present is None:
            continue
        if present.pattern != str(pattern):
            raise ValueError(
                f"prune_: expected pattern {present.pattern}, which {name} has been pruned to, got {pattern}; "
                "call finalize_ first"
            )
        masks[name] = present.mask
    return masks


def _score(layers: Mapping[str, nn.Linear], criterion: str, statistics: GradientStatistics | None) -> dict[str, Tensor]:
    """Elementwise scores in float32, by layer name."""
    rule = CRITERIA[criterion]
    if not rule.needs_statistics:
        return {name: rule.score(layer.weight.detach().float(), None) for name, layer in layers.items()}
    if statistics is None or statistics.updates == 0:
        got = "None" if statistics is None else "statistics without an update"
        raise ValueError(f"prune_: expected GradientStatistics for {criterion}, got {got}")
    missing = [name for name in layers if name not in statistics.means]
    if missing:
        raise ValueError(f"prune_: expected statistics of every selected layer, got none of {missing[0]}")
    return {
        name: rule.score(layer.weight.detach().float(), statistics.means[name].float())
        for name, layer in layers.items()
    }
