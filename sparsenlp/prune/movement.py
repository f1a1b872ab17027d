"""Masks that are trained with the weights: movement pruning, hard and soft (Sanh et al. 2020, arXiv:2005.07683)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers.composite import on_split
from .layers import FilterFn, Mask, mask_of, prunable, say_left_alone
from .masked import computed, put_mask_, take_mask_
from .masks import Threshold, check_sparsity, local_masks
from .patterns import Block, Pattern, Unstructured


class MovementMask(nn.Module):
    """Parametrization weight (N, K) -> weight * mask, where trained scores decide the mask in each forward pass.

    scores    Parameter, float32, one for each unit of the pattern, at first zero
    sparsity  a fraction: that many units, the lowest of the layer, are masked (hard movement);
              Threshold(absolute=τ): those that score below τ are (soft movement, to be trained with
              `movement_penalty`). May be set anew at any time, as a schedule does; not in state_dict

    The gradient goes straight through the choice: dL/dscore is the sum over the unit of w · dL/d(w · mask),
    for masked units too, which may come back.
    """

    def __init__(self, weight: Tensor, pattern: Pattern, sparsity: float | Threshold = 0.0) -> None:
        super().__init__()
        self.pattern, self.sparsity = pattern, sparsity
        self.shape = (weight.shape[0], weight.shape[1])
        units = pattern.scores(torch.zeros(self.shape)).shape
        self.scores = nn.Parameter(torch.zeros(units, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        scores: Tensor = self.scores
        if isinstance(self.pattern, Block):
            scores = scores.repeat_interleave(self.pattern.n, dim=0).repeat_interleave(self.pattern.k, dim=1)
        straight_through = self.mask() + (scores - scores.detach())
        return computed(weight * straight_through.to(weight.dtype))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to a masked weight stores the new values as they are; the scores stay."""
        return weight

    @torch.no_grad()
    def mask(self) -> Tensor:
        """(N, K) bool, what the scores and the sparsity say now. Raises ValueError as `local_masks`."""
        of_units = Unstructured() if isinstance(self.pattern, Block) else self.pattern
        units = local_masks({"scores": self.scores}, of_units, self.sparsity, aggregation="mean")["scores"]
        return self.pattern.expand(units, self.shape)

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, sparsity={self.sparsity}"


@on_split
def movement_(
    model: nn.Module, pattern: Pattern, sparsity: float | Threshold = 0.0, filter_fn: FilterFn | None = None
) -> dict[str, MovementMask]:
    """Put a MovementMask on a model's linear layers, in place; returns them by layer name.

    The scores are parameters of the model: make the optimizer afterwards, and give them a rate of
    their own (the paper's: 1e-2). `harden_` ends the training of masks. In a loop:

        masks = movement_(model, Block(8, 1))
        ...
            for mask in masks.values():
                mask.sparsity = cubic_sparsity(step, 0, 1000, 0.9)
            loss(model).backward()
        harden_(model)

    Raises ValueError, with the model untouched, for what `prunable` refuses, a sparsity out of range,
    a shape that the pattern does not divide, a weight that two layers share, or one that carries a
    mask or another parametrization already.
    """
    check_sparsity(pattern, sparsity)
    if isinstance(sparsity, Threshold) and sparsity.absolute is None:
        raise ValueError(f"movement_: expected an absolute threshold, as scores are signed, got {sparsity}")
    layers = prunable(model, filter_fn)
    say_left_alone(model, filter_fn)
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        try:
            if mask_of(layer) is not None or "weight" not in layer._parameters:
                raise ValueError("expected a weight without a mask, got a masked one; call finalize_ first")
            pattern.check(tuple(layer.weight.shape))
        except ValueError as error:
            raise ValueError(f"movement_: {name or type(layer).__name__}: {error}") from None
        owner = owners.setdefault(id(layer.weight), name)
        if owner != name:
            raise ValueError(f"movement_: expected each layer to have its own weight, got one of {owner} and {name}")
    masks = {name: MovementMask(layer.weight, pattern, sparsity) for name, layer in layers.items()}
    for name, layer in layers.items():
        put_mask_(layer, masks[name])
    return masks


def movement_penalty(masks: Mapping[str, MovementMask]) -> Tensor:
    """Mean of sigmoid(score) over all units, 0-d: what soft movement adds to the loss, times a factor."""
    total = torch.stack([mask.scores.sigmoid().sum() for mask in masks.values()]).sum()
    return total / sum(mask.scores.numel() for mask in masks.values())


@torch.no_grad()
def harden_(model: nn.Module) -> nn.Module:
    """Make the masks that the scores say the masks of `prune_`, and drop the scores, in place; returns `model`.

    The weights stay the same Parameters. Afterwards `prune_` may go on and `finalize_` ends.
    """
    for layer in model.modules():
        movement = movement_of(layer)
        if movement is not None and isinstance(layer, nn.Linear):
            mask = movement.mask()
            take_mask_(layer, keep_zeros=False)
            put_mask_(layer, Mask(mask, str(movement.pattern)))
    return model


def movement_of(layer: nn.Module) -> MovementMask | None:
    if not isinstance(layer, nn.Linear) or not parametrize.is_parametrized(layer, "weight"):
        return None
    chain = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    first = next(iter(cast(parametrize.ParametrizationList, chain)))
    return first if isinstance(first, MovementMask) else None
