"""The weights of a stack of transformer decoder layers. Plain data: no compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .block import INDEX_DTYPE, BlockSparse


@dataclass(frozen=True, eq=False, slots=True)
class DecoderProjection:
    """x Wᵀ + b.

    weight  N x K, sparse in the dtype of x or int8, or a dense contiguous (N, K) tensor in the dtype of x
    bias    (N,) in the dtype of x, or None
    """

    weight: BlockSparse | Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class DecoderLayerWeights:
    """One pre-norm layer of hidden size H: causal self-attention, then a feed-forward network of F neurons.

    inputs        (query, key, value), each (its heads * head dimension, H), or one projection with the rows of
                  all three one after the other; key and value may have fewer heads, each for a group of query heads
    output        (H, heads * head dimension)
    up, down      (F, H) and (H, F): down(act(up(x)))
    gate          (F, H) for down(act(gate(x)) * up(x)), or None
    norm1, norm2  (weight, bias) before attention and before the feed-forward network, (H,) in the dtype of x;
                  bias None makes it an RMSNorm, else it is a LayerNorm
    """

    inputs: tuple[DecoderProjection, ...]
    output: DecoderProjection
    up: DecoderProjection
    down: DecoderProjection
    norm1: tuple[Tensor, Tensor | None]
    norm2: tuple[Tensor, Tensor | None]
    gate: DecoderProjection | None = None

    @property
    def projections(self) -> tuple[DecoderProjection, ...]:
        """In the order of the op: inputs, output, gate if there is one, up, down."""
        gate = () if self.gate is None else (self.gate,)
        return (*self.inputs, self.output, *gate, self.up, self.down)


@dataclass(frozen=True, eq=False, slots=True)
class DecoderWeights:
    """A stack of layers and the norm after the last.

    norm        as in the layers: all are RMSNorms or all are LayerNorms
    heads       of the query
    scale       of the scores, as a rule 1 / sqrt(head dimension)
    activation  "silu", "relu", "gelu" (exact, by erf) or "gelu_tanh"
    eps         of the norms
    """

    layers: tuple[DecoderLayerWeights, ...]
    norm: tuple[Tensor, Tensor | None]
    heads: int
    scale: float
    activation: str
    eps: float

    def lists(self) -> DecoderTensors:
        """The tensors as the op takes them; nothing is copied."""
        projections = [p for layer in self.layers for p in layer.projections]
        norms = [*(norm for layer in self.layers for norm in (layer.norm1, layer.norm2)), self.norm]
        device = self.norm[0].device
        none, no_index = torch.empty(0, device=device), torch.empty(0, dtype=INDEX_DTYPE, device=device)
        weights = [p.weight for p in projections]
        sparse = [w if isinstance(w, BlockSparse) else None for w in weights]
        biased = any(p.bias is not None for p in projections)
        quantized = any(w is not None and w.scales is not None for w in sparse)
        return DecoderTensors(
            crow_indices=[no_index if w is None else w.crow_indices for w in sparse],
            col_indices=[no_index if w is None else w.col_indices for w in sparse],
            values=[w.values if isinstance(w, BlockSparse) else w for w in weights],
            biases=[none if p.bias is None else p.bias for p in projections] if biased else [],
            scales=[none if w is None or w.scales is None else w.scales for w in sparse] if quantized else [],
            norm_weights=[weight for weight, _ in norms],
            norm_biases=[bias for _, bias in norms if bias is not None],
        )


class DecoderTensors(NamedTuple):
    """Lists with an entry for each projection (values of two dimensions are dense, and have no indices), and for
    each norm; biases, scales and norm_biases are empty where there are none, or have empty entries."""

    crow_indices: list[Tensor]
    col_indices: list[Tensor]
    values: list[Tensor]
    biases: list[Tensor]
    scales: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
