"""What a sparse weight is. Plain data: no compute, no modules."""

from .block import BlockSparse

__all__ = ["BlockSparse"]
