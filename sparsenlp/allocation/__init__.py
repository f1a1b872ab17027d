"""Adaptive allocation: which pattern and sparsity each layer gets, so that the model meets a target."""

from .costs import LayerCosts, options_for
from .knapsack import Allocation, Option, allocate, meet
from .model import allocate_to_target
from .sensitivity import layer_targets, measured_losses, removed_scores
from .target import Target

__all__ = [
    "Allocation",
    "LayerCosts",
    "Option",
    "Target",
    "allocate",
    "allocate_to_target",
    "layer_targets",
    "measured_losses",
    "meet",
    "options_for",
    "removed_scores",
]
