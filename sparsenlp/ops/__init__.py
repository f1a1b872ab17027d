"""One file per op: schema, argument checks, fake, autograd, and which backend runs."""

from .add_layer_norm import add_layer_norm
from .block_sparse_attention import block_sparse_attention
from .bsr_linear import bsr_linear, bsr_linear_add_
from .decoder_layers import decoder_layers
from .dense_attention import dense_attention
from .embed_layer_norm import embed_layer_norm
from .encoder_layer import encoder_layer, encoder_pack, encoder_unpack
from .nm_linear import nm_linear
from .sparse_conv1d import sparse_conv1d
from .sparse_ffn import sparse_ffn
from .sparse_gru import sparse_gru
from .sparse_lstm import sparse_lstm

__all__ = [
    "add_layer_norm",
    "block_sparse_attention",
    "bsr_linear",
    "bsr_linear_add_",
    "decoder_layers",
    "dense_attention",
    "embed_layer_norm",
    "encoder_layer",
    "encoder_pack",
    "encoder_unpack",
    "nm_linear",
    "sparse_conv1d",
    "sparse_ffn",
    "sparse_gru",
    "sparse_lstm",
]
