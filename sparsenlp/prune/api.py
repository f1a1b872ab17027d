"""Prune a model in place, read its sparsity, make the zeros permanent."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..layers.composite import join_composites_, on_split
from ..obstacles import skipped_weights
from ..report import torch_pruned
from .criteria import Criterion, find_criterion
from .layers import (
    FilterFn,
    Mask,
    mask_of,
    masked_layers,
    prunable,
    say_left_alone,
    torch_mask_of,
    trainable_weight,
)
from .masked import put_mask_, take_mask_
from .masks import MASKS, Threshold, check_sparsity
from .movement import harden_
from .patterns import Pattern
from .scores import score_layers
from .statistics import LayerStatistics

WORTH_WARNING = 0.1
"""Share of a model's weights that `prune_` does not leave alone without a word."""


@torch.no_grad()
@on_split
def prune_(
    model: nn.Module,
    pattern: Pattern,
    sparsity: float | Threshold,
    criterion: str | Criterion = "magnitude",
    scope: str = "local",
    filter_fn: FilterFn | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    aggregation: str | None = None,
) -> dict[str, float]:
    """Mask the least important weights of a model's linear layers, in place.

    pattern      what is removed together: Unstructured(), Block(n, k), NM(n, m)
    sparsity     fraction of zeros over the selected layers, in [0, 1), or a Threshold
    criterion    "magnitude", "taylor", ...: a name in CRITERIA, or a Criterion
    scope        "local": the same sparsity in each layer; "row": in each row (of blocks) of each
                 layer; "global": one ranking for all, every layer keeps at least 1 %
    filter_fn    (module, name) -> bool selects layers; by default all but heads, embeddings, routers and adapters, see
                 `prunable`; what it cannot prune although it holds matrices is said in a warning
    statistics   what the criterion needs to know of each selected layer, by name: a collector
                 such as GradientStatistics, or `fisher_from_adam`
    aggregation  of the scores in a unit: "sum", "l2" or "mean"; by default the criterion's
    returns      layer name -> sparsity

    A mask is a parametrization of the weight (weight = original * mask): it holds through optimizer
    steps, state_dict, deepcopy and `to`. The state dict also has the masked `weight` itself, so that what is saved
    with masks on loads into a model without them. Nothing can be written into a masked weight (RuntimeError), as
    merging an adapter would: call `finalize_` before. A second call tightens the masks: what is pruned stays
    pruned, so a lower sparsity changes nothing. `finalize_` makes the zeros permanent. Masks of
    torch.nn.utils.prune are taken over. Selected layers that share one weight share its mask, which
    the statistics of the first of them decide. An nn.LSTM or nn.GRU becomes a SparseLSTM or SparseGRU
    with nn.Linear matrices, `lstm.ih_l0` and so on, until `finalize_`; so does an nn.Conv1d, whose weight
    becomes a new Parameter, `conv.filters.weight`: make optimizers afterwards.

    Scores are made layer by layer; beside the statistics this takes 4 bytes for each unit of the
    pattern and 1 byte for each weight.

    Warns where weights that are no nn.Linear, such as the three dimensions of experts, are a tenth of the model, unless
    `filter_fn` is given.

    Raises ValueError, with the model untouched, for a sparsity out of range, an unknown criterion,
    scope or aggregation, missing statistics, no selected layer, a shape that the pattern does not
    divide (naming the layer), masks of another pattern, or a weight that is parametrized otherwise
    or shared with something that is not selected.
    """
    check_sparsity(pattern, sparsity)
    rule = find_criterion(criterion)
    if scope not in MASKS:
        raise ValueError(f"scope: expected one of {', '.join(MASKS)}, got {scope}")
    layers = prunable(model, filter_fn)
    say_left_alone(model, filter_fn)
    if filter_fn is None:
        _say_what_is_left(model)
    owners = owners_of(model, layers)
    previous = present_masks(layers, pattern, owners)
    scores = score_layers({name: layers[name] for name in dict.fromkeys(owners.values())}, criterion, statistics)
    masks = MASKS[scope](scores, pattern, sparsity, previous, aggregation or rule.aggregation)
    for name, layer in layers.items():
        mask = masks[owners[name]]
        set_mask(layer, mask if owners[name] == name else mask.clone(), pattern)
    return {name: 1 - masks[owner].sum().item() / masks[owner].numel() for name, owner in owners.items()}


def _say_what_is_left(model: nn.Module) -> None:
    """Warn of weights that no pattern reaches, where they are much of the model."""
    left = [row for row in skipped_weights(model, WORTH_WARNING) if not row.prunable]
    if left:
        warnings.warn(f"prune_: {'; '.join(map(str, left))}", stacklevel=4)


@torch.no_grad()
def mask_zeros_(model: nn.Module, pattern: Pattern, filter_fn: FilterFn | None = None) -> dict[str, float]:
    """Turn the zeros that a model's linear layers have into masks, in place; returns layer name -> sparsity.

    For models pruned by other tools: what is zero stays zero in training, and `prune_` goes on from
    there. Units of the pattern that are zero whole become masked; other zeros stay weights. The
    arguments, and what is raised, are those of `prune_`.
    """
    present = Criterion(lambda weight, statistics: (weight != 0).float())
    return prune_(model, pattern, Threshold(absolute=0.5), present, "local", filter_fn)


@torch.no_grad()
def finalize_(model: nn.Module) -> nn.Module:
    """Write the zeros of every mask, and int8 rounding, into its weight and remove the masks; returns `model`.

    Movement masks are hardened first; masks of torch.nn.utils.prune are removed in the same way, on any module.
    What remains are ordinary modules with the same Parameters as before, in their order; recurrent layers and
    convolutions are torch's own again (these with a new weight). A model without masks is returned as it is.
    """
    harden_(model)
    for layer in masked_layers(model).values():
        take_mask_(layer, keep_zeros=True)
    for module in model.modules():
        for name in torch_pruned(module):
            torch_prune.remove(module, name)
    return join_composites_(model)


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


def owners_of(model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Layer name -> the first layer that has the same Parameter, usually itself."""
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(trainable_weight(layer)), name) for name, layer in layers.items()}
    selected = {id(module) for layer in layers.values() for module in layer.modules()}
    for path, module in model.named_modules():
        shared = [first[id(p)] for p in module._parameters.values() if id(p) in first]
        if shared and id(module) not in selected:
            raise ValueError(
                f"prune_: expected {shared[0]} to have a weight of its own, got one that {path} uses too; "
                "select both or neither with filter_fn"
            )
    return owners


def present_masks(layers: Mapping[str, nn.Linear], pattern: Pattern, owners: Mapping[str, str]) -> dict[str, Tensor]:
    """The masks that the layers carry, by owner; checks each layer against the pattern."""
    masks: dict[str, Tensor] = {}
    for name, layer in layers.items():
        try:
            pattern.check((layer.out_features, layer.in_features))
            mask = _present_mask(layer, pattern)
        except ValueError as error:
            raise ValueError(f"prune_: {name or type(layer).__name__}: {error}") from None
        if mask is not None:
            owner = owners[name]
            masks[owner] = masks[owner] & mask if owner in masks else mask
    return masks


def _present_mask(layer: nn.Linear, pattern: Pattern) -> Tensor | None:
    present, foreign = mask_of(layer), torch_mask_of(layer)
    if foreign is not None:
        mask = foreign.bool()
        whole = pattern.expand(pattern.scores(mask.float()) > 0, (layer.out_features, layer.in_features))
        if not torch.equal(mask, whole):
            raise ValueError(
                f"expected a mask of torch.nn.utils.prune in whole units of {pattern}, got others; "
                "torch.nn.utils.prune.remove makes its zeros plain weights"
            )
        return mask
    if present is None:
        return None
    if present.pattern != str(pattern):
        raise ValueError(
            f"expected pattern {present.pattern}, to which it has been pruned, got {pattern}; call finalize_ first"
        )
    return present.mask


def set_mask(layer: nn.Linear, mask: Tensor, pattern: Pattern) -> None:
    """Put a mask (N, K) on a layer, in the place of one that it has."""
    present = mask_of(layer)
    if present is not None:
        present.mask.copy_(mask)
        return
    if torch_mask_of(layer) is not None:
        torch_prune.remove(layer, "weight")
    put_mask_(layer, Mask(mask, str(pattern)))
