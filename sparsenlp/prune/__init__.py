"""Pruning: patterns, criteria, masks, schedules, and `prune_` which combines them."""

from .api import finalize_, layer_sparsity, prune_, sparsity_of
from .criteria import CRITERIA, GradientStatistics
from .layers import default_filter, masked_layers, prunable
from .masks import global_masks, local_masks
from .patterns import NM, Block, Pattern, Unstructured, parse_pattern
from .schedules import cubic_sparsity
from .targets import LayerTarget

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "GradientStatistics",
    "LayerTarget",
    "Pattern",
    "Unstructured",
    "cubic_sparsity",
    "default_filter",
    "finalize_",
    "global_masks",
    "layer_sparsity",
    "local_masks",
    "masked_layers",
    "parse_pattern",
    "prunable",
    "prune_",
    "sparsity_of",
]
