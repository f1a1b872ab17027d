"""Pruning: patterns, criteria, masks, schedules, and `prune_` which combines them."""

from .api import finalize_, layer_sparsity, mask_zeros_, prune_, sparsity_of
from .criteria import CRITERIA, Criterion, find_criterion
from .api import finalize_, layer_sparsity, prune_, sparsity_of
from .channels import channel_scores, remove_filters_, remove_units_
from .criteria import CRITERIA, GradientStatistics
from .layers import default_filter, masked_layers, prunable
from .masks import Threshold, global_masks, local_masks, row_masks
from .movement import MovementMask, harden_, movement_, movement_penalty
from .patterns import NM, Block, Pattern, Unstructured, parse_pattern
from .proximal import proximal_step_
from .permute import Permutation, permute_
from .schedules import cubic_sparsity
from .scores import score_layers
from .statistics import (
    GradientStatistics,
    InputStatistics,
    LayerStatistics,
    collector,
    fisher_from_adam,
)
from .targets import LayerTarget, prune_layers_
from .structured import (
    Removal,
    prune_structures_,
    remove_heads_,
    remove_layers_,
    remove_neurons_,
    structure_scores,

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "Criterion",
    "GradientStatistics",
    "InputStatistics",
    "LayerStatistics",
    "LayerTarget",
    "MovementMask",
    "Pattern",
    "Threshold",
    "Permutation",
    "Removal",
    "Unstructured",
    "collector",
    "channel_scores",
    "cubic_sparsity",
    "default_filter",
    "finalize_",
    "find_criterion",
    "fisher_from_adam",
    "global_masks",
    "harden_",
    "layer_sparsity",
    "local_masks",
    "mask_zeros_",
    "masked_layers",
    "movement_",
    "movement_penalty",
    "parse_pattern",
    "proximal_step_",
    "permute_",
    "prunable",
    "prune_",
    "prune_layers_",
    "row_masks",
    "score_layers",
    "prune_structures_",
    "remove_filters_",
    "remove_heads_",
    "remove_layers_",
    "remove_neurons_",
    "remove_units_",
    "sparsity_of",
    "structure_scores",
]
