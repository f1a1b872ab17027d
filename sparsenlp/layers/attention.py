"""Multi-head self-attention that computes only what a block mask keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..formats import BlockMask
from ..ops.block_sparse_attention import block_sparse_attention

MaskOf = Callable[[int, int], BlockMask]
"""(number of queries, number of keys) -> their mask; queries are the last of the keys."""


class SparseAttention(nn.Module):
    """x (B, L, features) -> (B, L, features): projections, block-sparse attention of each head, output projection.

    heads     of queries; features are divided among them
    mask_of   makes the mask for a length, such as MaskRule(window=128, causal=True); called once for each pair of
              lengths in a row
    kv_heads  of keys and values, which divide heads; None: as many as heads

    The state dict holds query, key, value and output, each an nn.Linear.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        mask_of: MaskOf,
        kv_heads: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or features % heads or heads % kv_heads:
            raise ValueError(
                f"SparseAttention: expected heads that divide features and kv_heads that divide heads, "
                f"got {features} features, {heads} heads, {kv_heads} kv_heads"
            )
        self.heads = heads
        self.kv_heads = kv_heads
        self.mask_of = mask_of
        width = features // heads
        self.query = nn.Linear(features, features, bias, device, dtype)
        self.key = nn.Linear(features, kv_heads * width, bias, device, dtype)
        self.value = nn.Linear(features, kv_heads * width, bias, device, dtype)
        self.output = nn.Linear(features, features, bias, device, dtype)
        self._mask: BlockMask | None = None

    @classmethod
    def from_dense(cls, attention: nn.MultiheadAttention, mask_of: MaskOf) -> SparseAttention:
        """Take the weights of self-attention, copied; training mode carries over.

        Raises ValueError for key or value features of their own, added keys, or dropout.
        """
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("SparseAttention: expected self-attention without added keys or features of their own")
        if attention.dropout:
            raise ValueError(f"SparseAttention: expected no dropout of probabilities, got {attention.dropout}")
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        layer = cls(
            attention.embed_dim,
            attention.num_heads,
            mask_of,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for index, linear in enumerate((layer.query, layer.key, layer.value)):
                linear.weight.copy_(weight.chunk(3)[index])
                if bias is not None:
                    linear.bias.copy_(bias.chunk(3)[index])
            layer.output.load_state_dict(attention.out_proj.state_dict())
        return layer.train(attention.training)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(y (B, L, features), keys and values so far).

        key_mask  (B, past + L) bool, False for padding
        past      keys and values (B, kv_heads, past, width) that an earlier call returned, for decoding
        """
        query, key, value = (
            linear(x).unflatten(2, (heads, -1)).transpose(1, 2)
            for linear, heads in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        key, value = key.to(query.dtype), value.to(query.dtype)  # autocast leaves what sparse kernels compute alone
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        mask = self.mask(query.shape[2], key.shape[2], x.device)
        y = block_sparse_attention(query, key, value, mask, key_mask)
        assert isinstance(y, Tensor)  # no log-sum-exp was asked for
        return self.output(y.transpose(1, 2).flatten(2)), (key, value)

    def mask(self, queries: int, keys: int, device: torch.device) -> BlockMask:
        """The mask for these lengths; the last one is kept."""
        kept = self._mask
        if kept is None or tuple(kept.shape) != (queries, keys) or kept.col_indices.device != device:
            kept = self._mask = self.mask_of(queries, keys).to(device)
        return kept

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}"
