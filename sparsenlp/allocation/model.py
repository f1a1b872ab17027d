"""An allocation for a whole model, checked by measuring the model that it makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..convert import DEFAULT_BLOCKS, SparsifyConfig, sparsify_
from ..cost import calibrated
from ..layers.composite import on_split
from ..measure import interleave, use_threads
from ..prune import Block, LayerStatistics, LayerTarget, Pattern, finalize_, prune_layers_
from ..prune.layers import FilterFn, prunable
from ..prune.scores import score_layers
from .costs import LayerCosts, options_for
from .knapsack import Allocation, Option, allocate, meet
from .sensitivity import SPARSITIES, LossFn, layer_targets, measured_losses, removed_scores
from .target import Target

PATTERNS: tuple[Pattern, ...] = (Block(8, 1),)
SECONDS = 1.0
"""Of timing the pruned model and the dense one in turn, for each trial."""


@on_split
def allocate_to_target(
    model: nn.Module,
    target: Target | str,
    inputs: Mapping[str, Any],
    criterion: str = "magnitude",
    statistics: Mapping[str, LayerStatistics] | None = None,
    loss: LossFn | None = None,
    patterns: Sequence[Pattern] = PATTERNS,
    sparsities: Sequence[float] = SPARSITIES,
    filter_fn: FilterFn | None = None,
    threads: int | None = None,
) -> Allocation:
    """Pattern and sparsity of each layer, so that the model meets `target` and loses as little as possible.

    model       dense, on the CPU, in eval mode; it stays as it is
    target      a speed-up or latency of `model(**inputs)`, or a sparsity; see Target
    inputs      keyword arguments of the model, of the size that it is to be fast for
    criterion, statistics   as in `prune_layers_`; they choose what goes within a layer
    loss        model -> a number, e.g. KL to the dense model on calibration texts: sensitivity is how much it grows
                when one layer alone is pruned; None takes the scores that go, which must compare across layers
                ("taylor", "fisher")
    patterns, sparsities    offered to each layer, beside staying dense
    threads     torch threads, None for the present number

    For a time the cost model proposes, and a pruned and converted copy of the model decides: `model` and the copy are
    timed in turn, in a few trials. Times are those before training, which does not change them.

    Raises ValueError for a target that cannot be met, saying the best that was found, for one that only training can
    tell ("drop": see prune_incrementally), no layer that a pattern fits, and as `prune_layers_`.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    if target.kind == "drop":
        raise ValueError("target: expected a speed-up, latency or sparsity, got a drop; prune_incrementally takes one")
    layers = prunable(model, filter_fn)
    scores = score_layers(layers, criterion, statistics)
    choices = {name: layer_targets(_shape(layer), patterns, sparsities) for name, layer in layers.items()}
    if not any(choices.values()):
        raise ValueError(f"target: expected a layer that {', '.join(map(str, patterns))} divides, got none")
    losses = removed_scores(scores, choices) if loss is None else measured_losses(model, layers, scores, choices, loss)
    if target.kind == "sparsity":
        return allocate(_by_weights(layers, choices, losses), 1 - target.value)
    with use_threads(threads) as count, torch.no_grad():
        dtype = next(iter(layers.values())).weight.dtype
        tokens = _tokens(inputs)
        blocks = [block for block in DEFAULT_BLOCKS if _useful(block, patterns)]
        costs = LayerCosts(
            calibrated(LayerCosts.kinds(dtype, blocks), count),
            {name: _shape(layer) for name, layer in layers.items()},
            dtype,
            (tokens,),
            blocks,
        )
        options = options_for(choices, losses, costs.dense, costs.pruned)

        def time_over_dense(allocation: Allocation) -> tuple[float, float]:
            twin = copy.deepcopy(model)
            if allocation.targets:
                prune_layers_(twin, allocation.targets, criterion, statistics)
                finalize_(twin)
                sparsify_(twin, SparsifyConfig(token_counts=(tokens,), min_sparsity=0.1))
            runs: dict[str, Callable[[], object]] = {
                "dense": lambda: model(**inputs),
                "pruned": lambda: twin(**inputs),
            }
            times = interleave(runs, SECONDS)
            return times["pruned"].median, times["pruned"].median / times["dense"].median

        latency = target.kind == "latency"
        wanted = target.value if latency else 1 / target.value
        first = wanted
        if latency:
            first = wanted / interleave({"dense": lambda: model(**inputs)}, SECONDS)["dense"].median
        best, _ = meet(
            lambda budget: allocate(options, budget),
            lambda allocation: time_over_dense(allocation)[0 if latency else 1],
            wanted,
            min(first, 1.0),
        )
        return best


def _by_weights(
    layers: Mapping[str, nn.Linear], choices: Mapping[str, Sequence[LayerTarget]], losses: Mapping[str, Sequence[float]]
) -> dict[str, list[Option]]:
    """Options that cost the share of all weights that they keep."""
    total = sum(layer.weight.numel() for layer in layers.values())
    shares = {name: layer.weight.numel() / total for name, layer in layers.items()}
    return options_for(choices, losses, shares.__getitem__, lambda name, t: shares[name] * (1 - t.sparsity))


def _useful(block: tuple[int, int], patterns: Sequence[Pattern]) -> bool:
    blocks = [(pattern.n, pattern.k) if isinstance(pattern, Block) else (1, 1) for pattern in patterns]
    return any(n % block[0] == 0 and k % block[1] == 0 for n, k in blocks)


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Rows that linear layers see."""
    first = next((value for value in inputs.values() if isinstance(value, torch.Tensor)), None)
    if first is None or first.dim() < 2:
        raise ValueError("inputs: expected a tensor (batch, tokens, ...) among the model's arguments, got none")
    return first.shape[0] * first.shape[1]
