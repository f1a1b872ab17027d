"""The weights of a transformer encoder layer, with sparse projections. Plain data: no compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block import BlockSparse


@dataclass(frozen=True, eq=False, slots=True)
class SparseProjection:
    """x Wᵀ + b.

    weight  N x K, float32, bfloat16 or int8
    bias    (N,)   float32
    """

    weight: BlockSparse
    bias: Tensor

    def tensors(self, row_sums: bool = False) -> list[Tensor]:
        """[crow_indices, col_indices, values, bias], and scales where the weights are int8: as ops take them.

        row_sums   also, for int8, 128 times the sum of each row's values, (N,) int32
        """
        w = self.weight
        tensors = [w.crow_indices, w.col_indices, w.values, self.bias]
        if w.scales is None:
            return tensors
        if not row_sums:
            return [*tensors, w.scales]
        n = w.block[0]
        sums = torch.zeros(w.shape[0] // n, n, dtype=torch.int32, device=self.bias.device)
        sums.index_add_(0, w.row_indices(), w.values.sum(dim=2, dtype=torch.int32))
        return [*tensors, w.scales, 128 * sums.flatten()]


@dataclass(frozen=True, eq=False, slots=True)
class EncoderWeights:
    """One encoder layer of hidden size H: multi-head self-attention and a feed-forward network of F neurons.

    query, key   (sum of the heads' query dimensions, H)
    value        (sum of the heads' value dimensions, H)
    output       (H, sum of the heads' value dimensions)
    fc1, fc2     (F, H) and (H, F)
    norm1, norm2 (weight, bias) of the LayerNorms, each (H,) float32: after attention and after the FFN, or before
                 them if `pre_norm`
    query_rows, value_rows  heads + 1 offsets: head h owns rows query_rows[h] .. query_rows[h + 1] of query and key,
                 and value_rows[h] .. value_rows[h + 1] of value; heads may differ, and none may be left
    scale        of the scores, 1 / sqrt(head dimension) of the original model
    activation   as in `bsr_linear`
    """

    query: SparseProjection
    key: SparseProjection
    value: SparseProjection
    output: SparseProjection
    fc1: SparseProjection
    fc2: SparseProjection
    norm1: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    query_rows: tuple[int, ...]
    value_rows: tuple[int, ...]
    scale: float
    activation: str = "gelu"
    eps: float = 1e-12
    pre_norm: bool = False

    @property
    def hidden_size(self) -> int:
        return self.output.weight.shape[0]

    @property
    def heads(self) -> int:
        return len(self.query_rows) - 1
