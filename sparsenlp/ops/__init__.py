"""One file per op: schema, argument checks, fake, autograd, and which backend runs."""

from .bsr_linear import bsr_linear, bsr_linear_add_
from .nm_linear import nm_linear

__all__ = ["bsr_linear", "bsr_linear_add_", "nm_linear"]
