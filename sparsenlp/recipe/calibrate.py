"""What a few batches of the training texts tell of a model: statistics for criteria, and a sparsity for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..allocation import Allocation, allocate_to_target
from ..classifiers import max_positions
from ..data import TokenizedDataset, shuffled_batches
from ..layers.composite import splitting
from ..modes import evaluating
from ..prune import CRITERIA, GradientStatistics, collector, prunable
from ..prune.layers import FilterFn
from ..prune.statistics import Collector
from ..train import kl_divergence
from ..train.forward import device_of, forward
from ..train.sequences import token_logits
from .config import Recipe

BATCHES, BATCH_SIZE = 16, 32


def collect(
    model: nn.Module, data: TokenizedDataset, layers: Mapping[str, nn.Linear], criterion: str, seed: int = 0
) -> Collector | None:
    """The statistics that a criterion needs of `layers`, from the cross-entropy of BATCHES batches; None for none.

    layers  of `model` itself, so recurrent layers must have been split

    The model, a classifier or one that predicts tokens, stays as it is; gradients that it had are lost.
    """
    statistics = collector(layers, CRITERIA[criterion].needs, decay=None)
    if statistics is None:
        return None
    backward = isinstance(statistics, GradientStatistics)
    with evaluating(model), torch.set_grad_enabled(backward):
        for indices in shuffled_batches(data.lengths, BATCH_SIZE, seed, 0)[:BATCHES]:
            inputs = data.batch(indices)
            tokens = "labels" in inputs
            mask = None if tokens and model.config.is_encoder_decoder else inputs["attention_mask"]  # type: ignore[union-attr]
            with statistics.observing(mask):
                if tokens:
                    logits, labels = token_logits(model, inputs)
                else:
                    logits, labels = forward(model, inputs).logits, data.labels[indices]
            if backward:
                F.cross_entropy(logits, labels.to(logits.device)).backward()
                statistics.update()
                model.zero_grad(set_to_none=True)
    return statistics


def allocate_layers(
    recipe: Recipe, model: nn.Module, data: TokenizedDataset, filter_fn: FilterFn | None = None
) -> Allocation:
    """A sparsity for each layer, so that the model meets the recipe's target. Raises as `allocate_to_target`.

    What a layer loses are the scores that go, for a criterion whose scores compare across layers, else the KL
    divergence from the dense model on a batch.
    """
    with splitting(model):
        layers = prunable(model, filter_fn)
        statistics = collect(model, data, layers, recipe.criterion, recipe.seed)
    comparable = CRITERIA[recipe.criterion].scope == "global"
    inputs = data.batch(range(min(BATCH_SIZE, len(data))))
    with torch.no_grad():
        reference = forward(model, inputs).logits

    def divergence(candidate: nn.Module) -> float:
        return kl_divergence(forward(candidate, inputs).logits, reference)

    assert recipe.wanted is not None
    return allocate_to_target(
        model,
        recipe.wanted,
        inputs_of(model, recipe.convert.token_counts[0]),
        recipe.criterion,
        statistics,
        None if comparable else divergence,
        (recipe.prune.pattern,),
        filter_fn=filter_fn,
    )


def inputs_of(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """Arguments of a transformers model with as many tokens in all, in as few texts as its positions allow."""
    longest = max_positions(model) or tokens
    texts = math.ceil(tokens / longest)
    ids = torch.ones((texts, max(tokens // texts, 1)), dtype=torch.int64, device=device_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
