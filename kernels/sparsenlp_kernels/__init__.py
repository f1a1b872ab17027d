"""Triton kernels: a package of its own, of torch and Triton alone, so that `import sparsenlp` needs no Triton."""

from .bsr_linear import bsr_linear

__all__ = ["bsr_linear"]
