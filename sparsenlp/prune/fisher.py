"""Block optimal brain surgeon on a model: the inverse empirical Fisher from gradients, and `block_obs_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.composite import on_split
from ..modes import evaluating
from .layers import FilterFn, apply_solution_, mask_of, solvable, trainable_weight
from .masks import check_sparsity
from .patterns import Pattern
from .reconstruct import Solution, arrange, block_obs, unit_size

Loss = Callable[[nn.Module, Any], Tensor]


class EmpiricalFisher:
    """Inverse of the block-diagonal empirical Fisher of one weight, F = dampening I + 1/S Σ g gᵀ over S gradients.

    shape       (N, K) of the weight
    pattern     decides the order of the weights (see `arrange`): a unit lies within one group
    samples     S, the number of updates to come
    group_size  most weights B of a group, the next smaller one that divides; one unit if that is larger
    dampening   absolute, above 0

    `inverse` is (G, B, B) float32 with G * B = N * K, so it takes B times the weight's memory. Source: Kurtic et al.
    2022, arXiv:2203.07259. Raises ValueError for parameters out of range.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        pattern: Pattern,
        samples: int,
        group_size: int = 32,
        dampening: float = 1e-7,
        device: torch.device | str = "cpu",
    ) -> None:
        pattern.check(shape)
        if samples < 1:
            raise ValueError(f"EmpiricalFisher: expected at least one gradient, got {samples}")
        if group_size < 1 or not dampening > 0:
            raise ValueError(
                "EmpiricalFisher: expected a group_size of at least 1 and a dampening above 0, "
                f"got {group_size} and {dampening}"
            )
        self.shape, self.pattern, self.samples = shape, pattern, samples
        size, weights = group_width(shape, pattern, group_size), shape[0] * shape[1]
        self.inverse = (torch.eye(size, device=device) / dampening).expand(weights // size, size, size).clone()

    @torch.no_grad()
    def update(self, gradient: Tensor) -> None:
        """Fold in one gradient (N, K) of a sample, or of a batch's mean loss.

        By the Woodbury identity F⁻¹ loses F⁻¹g (F⁻¹g)ᵀ / (S + gᵀF⁻¹g). Raises ValueError for another shape or a
        gradient that is not finite.
        """
        if tuple(gradient.shape) != tuple(self.shape) or not gradient.isfinite().all():
            raise ValueError(
                f"EmpiricalFisher: expected a finite gradient of shape {tuple(self.shape)}, got shape "
                f"{tuple(gradient.shape)}" + ("" if gradient.isfinite().all() else " with NaN or infinite values")
            )
        size = self.inverse.shape[-1]
        groups = arrange(gradient.float(), self.pattern).view(-1, size, 1)
        product = self.inverse @ groups
        scale = self.samples + groups.mT @ product
        self.inverse.baddbmm_(product, product.mT / scale, alpha=-1)


def group_width(shape: tuple[int, int], pattern: Pattern, group_size: int) -> int:
    """The most weights up to `group_size` that hold whole units and divide the weight; at least a unit."""
    unit, weights = unit_size(pattern), shape[0] * shape[1]
    units = weights // unit
    return unit * next(count for count in range(max(group_size // unit, 1), 0, -1) if units % count == 0)


@on_split
def block_obs_(
    model: nn.Module,
    batches: Sequence[Any],
    pattern: Pattern,
    sparsity: float,
    loss: Loss | None = None,
    group_size: int = 32,
    dampening: float = 1e-7,
    filter_fn: FilterFn | None = None,
    memory: int = 2 << 30,
) -> dict[str, float]:
    """Prune the linear layers of a model by block optimal brain surgeon, in place; see `block_obs`.

    batches     each gives one gradient, so many small ones say more than few large ones: several hundred
    loss        (model, batch) -> scalar; by default `model(**batch).loss`, as transformers give with labels
    group_size  weights of a group within which correlations count
    dampening   of the Fisher, see `EmpiricalFisher`
    filter_fn   (module, name) -> bool selects layers; by default all but heads, poolers and embeddings
    memory      bytes that inverse Fishers may take at once; where all layers take more, the batches are run again
                for the next layers. One layer's is always held
    returns     layer name -> sparsity, the same in each layer; masks are those of `prune_`

    All layers are solved before any is changed; their new weights take as much memory as the old ones. Dropout is off.

    Raises ValueError, with the model untouched, for a sparsity out of range, no batch, no selected layer, a shape that
    the pattern does not divide, masks of another pattern, tied or computed weights, a layer without a gradient, or
    gradients that are not finite.
    """
    check_sparsity(pattern, sparsity)
    layers = solvable("block_obs_", model, pattern, filter_fn)
    if not len(batches):
        raise ValueError("block_obs_: expected at least one batch, got none")
    solutions: dict[str, Solution] = {}
    with evaluating(model), _trainable(layers):
        for part in _parts(layers, pattern, group_size, memory):
            fishers = {
                name: EmpiricalFisher(
                    (layer.out_features, layer.in_features),
                    pattern,
                    len(batches),
                    group_size,
                    dampening,
                    trainable_weight(layer).device,
                )
                for name, layer in part.items()
            }
            for batch in batches:
                value = model(**batch).loss if loss is None else loss(model, batch)
                weights = [trainable_weight(layer) for layer in part.values()]
                gradients = torch.autograd.grad(value, weights, allow_unused=True)
                for name, gradient in zip(part, gradients, strict=True):
                    if gradient is None:
                        raise ValueError(f"block_obs_: expected a gradient in {name}, got none")
                    fishers[name].update(gradient)
            for name, layer in part.items():
                present = mask_of(layer)
                previous = None if present is None else present.mask
                inverse = fishers.pop(name).inverse
                solutions[name] = block_obs(layer.weight, inverse, pattern, sparsity, previous)
    for name, (mask, weight) in solutions.items():
        apply_solution_(layers[name], mask, weight, pattern)
    return {name: 1 - mask.sum().item() / mask.numel() for name, (mask, _) in solutions.items()}


def _parts(
    layers: Mapping[str, nn.Linear], pattern: Pattern, group_size: int, memory: int
) -> Iterator[dict[str, nn.Linear]]:
    """Layers in turn, as many at once as fit into the memory, at least one."""
    part: dict[str, nn.Linear] = {}
    held = 0
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        size = 4 * shape[0] * shape[1] * group_width(shape, pattern, group_size)
        if part and held + size > memory:
            yield part
            part, held = {}, 0
        part[name] = layer
        held += size
    yield part


@contextmanager
def _trainable(layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Gradients are enabled, also of weights that are frozen otherwise."""
    frozen = [weight for layer in layers.values() if not (weight := trainable_weight(layer)).requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
