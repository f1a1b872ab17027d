"""Training that makes zeros by itself: L1 and group Lasso, as a step after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..formats.block import split_blocks
from .layers import trainable_weight
from .patterns import Block, Pattern, Unstructured


@torch.no_grad()
def proximal_step_(layers: Mapping[str, nn.Linear], pattern: Pattern, strength: float) -> None:
    """Shrink every unit of the weights towards zero, in place; those whose norm is small become zero.

    layers    name -> nn.Linear, as `prunable` returns them
    pattern   Unstructured(): w -> sign(w) · max(|w| - strength, 0), the step of the L1 norm (Lasso);
              Block(n, k): each block b -> b · max(1 - strength · sqrt(n k) / ||b||, 0), that of group
              Lasso, in which a weight of a block shrinks as much as one that is alone
    strength  >= 0, in units of the weights: learning rate times the penalty's factor

    With a gradient step on the loss it makes proximal gradient descent on loss + factor · Σ norms:

        layers = prunable(model)
        finetune(model, data, on_step=lambda info: proximal_step_(layers, Block(8, 1), 2e-5))
        prune_(model, Block(8, 1), 0.8, "relative", scope="global")

    Raises ValueError, with nothing changed, for a strength below zero or not finite, a pattern other
    than these two, a shape that it does not divide, and a weight that takes no gradient, as `prunable` returns for an
    nn.Conv1d, whose weight is in another order (`layers.composite.split_composites_` first).

    Source: Parikh & Boyd 2014, "Proximal Algorithms", 6.5; groups and their sqrt(size): Yuan & Lin 2006; blocks: Wen et
    al. 2016, arXiv:1608.03665.
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"proximal_step_: expected a finite strength >= 0, got {strength}")
    if isinstance(pattern, Unstructured):
        block = (1, 1)
    elif isinstance(pattern, Block):
        block = (pattern.n, pattern.k)
    else:
        raise ValueError(f"proximal_step_: expected single weights or blocks, got pattern {pattern}")
    weights = {id(weight): (name, weight) for name, weight in ((n, trainable_weight(m)) for n, m in layers.items())}
    for name, weight in weights.values():
        if not weight.requires_grad:
            raise ValueError(
                f"proximal_step_: expected weights that are trained, got {name}, which takes no gradient (of "
                "an nn.Conv1d this is a copy: call split_composites_ of sparsenlp.layers.composite first)"
            )
        try:
            pattern.check(tuple(weight.shape))
        except ValueError as error:
            raise ValueError(f"proximal_step_: {name}: {error}") from None
    for _, weight in weights.values():
        blocks = split_blocks(weight.data, block)
        norms = blocks.float().square().sum(dim=(2, 3), keepdim=True).sqrt()
        lost = strength * math.sqrt(block[0] * block[1]) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        blocks.mul_((1 - lost).clamp_min(0))
