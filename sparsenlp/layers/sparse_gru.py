"""nn.GRU with block-sparse weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..formats.recurrent import RecurrentTensors
from ..ops.sparse_gru import call
from ..reference.sparse_gru import GATES
from .recurrent import SparseRecurrent, States


class SparseGRU(SparseRecurrent):
    """nn.GRU that stores and multiplies only the nonzero blocks of its weights: its arguments, inputs and outputs.

    `from_dense` makes one from an nn.GRU; the rest is as in SparseLSTM.
    """

    dense = nn.GRU
    gates = GATES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 7 or kwargs.get("proj_size"):
            raise ValueError("SparseGRU: expected no proj_size, which only an LSTM has")
        super().__init__(*args, **kwargs)

    def forward(
        self, x: Tensor | PackedSequence, state: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        y, (h,) = self._forward(x, None if state is None else (state,))
        return y, h

    def _run(self, x: Tensor, batch_sizes: Tensor | None, tensors: RecurrentTensors, states: States) -> States:
        return call(x, batch_sizes, tensors, states[0])
