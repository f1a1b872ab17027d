"""What a sparse weight is. Plain data: no compute, no modules."""

from .block import BlockSparse
from .nm import NM

__all__ = ["NM", "BlockSparse"]
