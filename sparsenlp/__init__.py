"""Prune NLP models into patterns the hardware likes, and really run them faster."""

from .checkpoint import CheckpointError, from_pretrained, save_pretrained
from .convert import SparsifyConfig, densify_, sparsify_
from .formats import BlockMask, BlockSparse, MaskRule
from .layers import NMLinear, SparseConv1d, SparseGRU, SparseLinear, SparseLSTM
from .models import connect_transformers
from .models.block_sparse_attention import use_block_sparse_attention_, use_dense_attention_
from .plan import Plan
from .version import __version__

connect_transformers()

__all__ = [
    "BlockMask",
    "BlockSparse",
    "CheckpointError",
    "MaskRule",
    "NMLinear",
    "Plan",
    "SparseConv1d",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "SparsifyConfig",
    "__version__",
    "densify_",
    "from_pretrained",
    "save_pretrained",
    "sparsify_",
    "use_block_sparse_attention_",
    "use_dense_attention_",
]
