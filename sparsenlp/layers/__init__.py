"""nn.Modules: buffers plus one call of an op."""

from .attention import SparseAttention
from .embeddings import FusedEmbeddings
from .encoder import SparseEncoder, SparseEncoderLayer
from .linear import SparseLinear
from .nm_linear import NMLinear
from .sparse_conv1d import SparseConv1d
from .sparse_gru import SparseGRU
from .sparse_lstm import SparseLSTM

__all__ = [
    "FusedEmbeddings",
    "NMLinear",
    "SparseAttention",
    "SparseConv1d",
    "SparseEncoder",
    "SparseEncoderLayer",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
]
