"""Prune NLP models into patterns the hardware likes, and really run them faster."""

from .checkpoint import CheckpointError, from_pretrained, save_pretrained
from .convert import SparsifyConfig, sparsify_
from .formats import BlockSparse
from .layers import NMLinear, SparseGRU, SparseLinear, SparseLSTM
from .models import connect_transformers
from .plan import Plan
from .version import __version__

connect_transformers()

__all__ = [
    "BlockSparse",
    "CheckpointError",
    "NMLinear",
    "Plan",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "SparsifyConfig",
    "__version__",
    "from_pretrained",
    "save_pretrained",
    "sparsify_",
]
