"""nn.Modules: buffers plus one call of an op."""

from .linear import SparseLinear
from .nm_linear import NMLinear

__all__ = ["NMLinear", "SparseLinear"]
