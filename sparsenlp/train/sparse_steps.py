"""Masked layers that train on sparse kernels, which are the faster the more is pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .. import native
from ..formats.block import INDEX_DTYPE, split_blocks
from ..ops.bsr_linear import call as bsr_linear
from ..prune import Block, parse_pattern
from ..prune.layers import Mask, mask_of, masked_layers, trainable_weight

MAX_DENSITY = 0.3
"""A layer of which more is kept trains faster dense in bfloat16 (forward and backward, 900 tokens, blocks of 8x1)."""
MAX_DENSITY_BESIDE_AMX = 0.1
"""The same under autocast on a CPU that multiplies bfloat16 in tiles, where at 0.3 sparse steps take up to 2.7 times as
long."""
MIN_ROWS = 8
"""Lower blocks gain less: 4x1 breaks even where a fifth is kept, single weights not even at a tenth."""


@contextmanager
def sparse_steps(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, masked layers compute with `bsr_linear` once their masks leave at most `max_density` of the weights.

    For Block patterns at least MIN_ROWS tall and float32 weights on a CPU with the extension; all others
    stay as they are. Parameters, masks, gradients and optimizers are the same either way: only the blocks
    that are kept are read, in float32 even under autocast, and those that are pruned get zero gradients.
    """
    layers = [layer for layer in masked_layers(model).values() if enabled and _has_kernels(layer)]
    for layer in layers:
        layer.forward = _SparseForward(layer)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def max_density() -> float:
    """Of the weights, the share that a layer may keep for a sparse step to be faster; by the CPU, never by timing.

    So that a run that goes on after a kill takes the same steps.
    """
    tiles = torch.cpu._is_amx_tile_supported() and torch.is_autocast_enabled("cpu")
    return MAX_DENSITY_BESIDE_AMX if tiles else MAX_DENSITY


def _has_kernels(layer: nn.Linear) -> bool:
    mask, weight = mask_of(layer), trainable_weight(layer)
    tall = mask is not None and isinstance(pattern := parse_pattern(mask.pattern), Block) and pattern.n >= MIN_ROWS
    return tall and native.available and weight.is_cpu and weight.dtype == torch.float32


class _SparseForward:
    """`layer.forward`, which looks at the mask again whenever that, or what counts as sparse, changed."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.dense = layer, layer.forward
        self.seen: tuple[int, int, float] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        mask = mask_of(self.layer)
        assert mask is not None
        version = id(mask.mask), mask.mask._version, max_density()
        if version != self.seen:
            self._look_at(mask)
            self.seen = version
        if not self.is_sparse:
            return self.dense(x)
        values = self._weight().flatten().index_select(0, self.places).view(-1, *self.block)
        x = x.to(values.dtype)
        return bsr_linear(
            x, self.crow_indices, self.col_indices, values, self.layer.in_features, self.layer.bias, "none"
        )

    def _look_at(self, mask: Mask) -> None:
        """Find where in the weight the kept blocks are."""
        self.is_sparse = mask.mask.float().mean().item() <= max_density()
        if not self.is_sparse:
            return
        pattern = parse_pattern(mask.pattern)
        assert isinstance(pattern, Block)
        n, k = self.block = pattern.n, pattern.k
        keep = split_blocks(mask.mask, self.block).any(dim=3).any(dim=2)
        rows, columns = keep.nonzero(as_tuple=True)
        self.crow_indices = torch.zeros(len(keep) + 1, dtype=INDEX_DTYPE)
        self.crow_indices[1:] = keep.sum(dim=1).cumsum(0)
        self.col_indices = columns.to(INDEX_DTYPE)
        row = rows[:, None, None] * n + torch.arange(n)[:, None]
        self.places = (row * mask.mask.shape[1] + columns[:, None, None] * k + torch.arange(k)).flatten()

    def _weight(self) -> Tensor:
        """The dense weight, right where the mask keeps it; rounded to int8 if it is parametrized so."""
        chain = self.layer.parametrizations.weight  # type: ignore[union-attr]
        assert isinstance(chain, ParametrizationList)
        return trainable_weight(self.layer) if len(chain) == 1 else self.layer.weight
