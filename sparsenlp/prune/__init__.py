"""Pruning: patterns, criteria, masks, schedules, and `prune_` which combines them."""

from .api import finalize_, layer_sparsity, mask_zeros_, prune_, sparsity_of
from .channels import channel_scores, remove_filters_, remove_units_
from .criteria import CRITERIA, Criterion, find_criterion
from .fisher import EmpiricalFisher, block_obs_
from .layers import default_filter, masked_layers, prunable
from .layerwise import exact_obs_, find_blocks, sparsegpt_, wanda_
from .masks import Threshold, global_masks, local_masks, row_masks
from .movement import MovementMask, harden_, movement_, movement_penalty
from .obs import exact_obs
from .patterns import NM, Block, Pattern, Unstructured, parse_pattern
from .permute import Permutation, permute_
from .proximal import proximal_step_
from .reconstruct import block_obs, sparsegpt, wanda
from .schedules import cubic_sparsity
from .scores import score_layers
from .statistics import (
    GradientStatistics,
    InputStatistics,
    LayerStatistics,
    collector,
    fisher_from_adam,
)
from .structured import (
    Removal,
    prune_structures_,
    remove_heads_,
    remove_layers_,
    remove_neurons_,
    structure_scores,
)
from .targets import LayerTarget, prune_layers_
from .vocabulary import Vocabulary, reduce_vocabulary_

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "Criterion",
    "EmpiricalFisher",
    "GradientStatistics",
    "InputStatistics",
    "LayerStatistics",
    "LayerTarget",
    "MovementMask",
    "Pattern",
    "Permutation",
    "Removal",
    "Threshold",
    "Unstructured",
    "Vocabulary",
    "block_obs",
    "block_obs_",
    "channel_scores",
    "collector",
    "cubic_sparsity",
    "default_filter",
    "exact_obs",
    "exact_obs_",
    "finalize_",
    "find_blocks",
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
    "permute_",
    "proximal_step_",
    "prunable",
    "prune_",
    "prune_layers_",
    "prune_structures_",
    "reduce_vocabulary_",
    "remove_filters_",
    "remove_heads_",
    "remove_layers_",
    "remove_neurons_",
    "remove_units_",
    "row_masks",
    "score_layers",
    "sparsegpt",
    "sparsegpt_",
    "sparsity_of",
    "structure_scores",
    "wanda",
    "wanda_",
]
