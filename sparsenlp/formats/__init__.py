"""What a sparse weight is. Plain data: no compute, no modules."""

from .block import BlockSparse
from .block_mask import BlockMask
from .encoder import EncoderWeights, SparseProjection
from .mask_rule import MaskRule
from .nm import NM
from .recurrent import RecurrentWeights

__all__ = ["NM", "BlockMask", "BlockSparse", "EncoderWeights", "MaskRule", "RecurrentWeights", "SparseProjection"]
