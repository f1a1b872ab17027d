"""nn.LSTM with block-sparse weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..formats.recurrent import RecurrentTensors
from ..ops.sparse_lstm import call
from ..reference.sparse_lstm import GATES
from .recurrent import SparseRecurrent, States


class SparseLSTM(SparseRecurrent):
    """nn.LSTM that stores and multiplies only the nonzero blocks of its weights: its arguments, inputs and outputs.

    `from_dense` makes one from an nn.LSTM; `matrices` are described in SparseRecurrent. x may be batched, unbatched or
    a PackedSequence, and must have the dtype of the weights (any with int8 ones); under autocast it is cast.

    Raises ValueError where torch raises RuntimeError: sizes and dtypes that disagree, no steps.
    """

    dense = nn.LSTM
    gates = GATES

    def forward(
        self, x: Tensor | PackedSequence, states: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        y, (h, c) = self._forward(x, states)
        return y, (h, c)

    def _state_sizes(self) -> tuple[int, ...]:
        return self._output_size, self.hidden_size

    def _run(self, x: Tensor, batch_sizes: Tensor | None, tensors: RecurrentTensors, states: States) -> States:
        h, c = states
        return call(x, batch_sizes, tensors, h, c)
