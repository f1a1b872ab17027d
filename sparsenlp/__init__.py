"""Prune NLP models into patterns the hardware likes, and really run them faster."""

from .formats import BlockSparse
from .layers import SparseLinear
from .version import __version__

__all__ = ["BlockSparse", "SparseLinear", "__version__"]
