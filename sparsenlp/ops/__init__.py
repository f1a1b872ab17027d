"""One file per op: schema, argument checks, fake, autograd, and which backend runs."""

from .bsr_linear import bsr_linear, bsr_linear_add_
from .encoder_layer import encoder_layer, encoder_pack, encoder_unpack
from .nm_linear import nm_linear

__all__ = ["bsr_linear", "bsr_linear_add_", "encoder_layer", "encoder_pack", "encoder_unpack", "nm_linear"]
