"""A pattern and a sparsity for each layer of its own."""

from __future__ import annotations

from dataclasses import dataclass

from .masks import check_sparsity
from .patterns import Pattern


@dataclass(frozen=True)
class LayerTarget:
    """What a layer is pruned to. Raises ValueError for a sparsity that the pattern cannot have."""

    pattern: Pattern
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.pattern, self.sparsity)

    def __str__(self) -> str:
        return f"{self.pattern} {self.sparsity:.1%}"
