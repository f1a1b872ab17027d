"""nn.Modules: buffers plus one call of an op."""

from .linear import SparseLinear

__all__ = ["SparseLinear"]
