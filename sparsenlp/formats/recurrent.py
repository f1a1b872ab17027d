"""The weights of a recurrent layer: one LSTM or GRU cell for each direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .block import BlockSparse


@dataclass(frozen=True, eq=False, slots=True)
class RecurrentWeights:
    """One direction of a layer with H hidden units, its gates one after the other as in torch's nn.LSTM and nn.GRU.

    input           G H x K    G = 4 for an LSTM (input, forget, cell, output), 3 for a GRU (reset, update, new)
    recurrent       G H x P    P = H without a projection
    bias_input      (G H,)     or None; None for one is None for both
    bias_recurrent  (G H,)
    projection      P x H      LSTM only (torch's proj_size), or None
    """

    input: BlockSparse
    recurrent: BlockSparse
    bias_input: Tensor | None = None
    bias_recurrent: Tensor | None = None
    projection: BlockSparse | None = None

    @property
    def matrices(self) -> tuple[BlockSparse, ...]:
        both = (self.input, self.recurrent)
        return both if self.projection is None else (*both, self.projection)


class RecurrentTensors(NamedTuple):
    """The tensors of a layer as ops take them: lists with an entry for each matrix, all of one direction first."""

    crow_indices: list[Tensor]
    col_indices: list[Tensor]
    values: list[Tensor]
    scales: list[Tensor]
    """Empty unless the weights are int8."""
    biases: list[Tensor]
    """Two for each direction, or empty."""

    @classmethod
    def of(cls, weights: Sequence[RecurrentWeights]) -> RecurrentTensors:
        matrices = [matrix for direction in weights for matrix in direction.matrices]
        biases = [(direction.bias_input, direction.bias_recurrent) for direction in weights]
        return cls(
            [matrix.crow_indices for matrix in matrices],
            [matrix.col_indices for matrix in matrices],
            [matrix.values for matrix in matrices],
            [matrix.scales for matrix in matrices if matrix.scales is not None],
            [bias for pair in biases for bias in pair if bias is not None],
        )
