"""What SparseLSTM and SparseGRU share: the arguments of torch's nn.LSTM and nn.GRU, a linear layer for each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..formats.recurrent import RecurrentTensors
from ..ops.recurrent import batch_of
from .dense_recurrent import dense_layers
from .linear import SparseLinear

Own = TypeVar("Own", bound="SparseRecurrent")
Matrix = SparseLinear | nn.Linear
States = tuple[Tensor, ...]


class SparseRecurrent(nn.Module):
    """Layers and directions of cells with block-sparse weights; see SparseLSTM and SparseGRU.

    matrices  name -> SparseLinear: "ih_l0" (G hidden_size x input_size), "hh_l0", for an LSTM with proj_size "hr_l0",
              with the biases that torch calls bias_ih_l0 and bias_hh_l0; "_reverse" for the second direction, l1 and
              so on for further layers. They become submodules, which the state dict names

    The matrices may also be nn.Linear, all of them (see `split`): then torch's own kernels compute with their weights
    as they are in each call, masks and other parametrizations applied once. So everything that prunes, trains,
    converts or stores nn.Linear works on a recurrent layer's matrices one by one, and putting a SparseLinear in for
    each is all that makes the layer sparse. Their forward is not called, except for hooks (see dense_recurrent).
    """

    dense: ClassVar[type[nn.RNNBase]]
    gates: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        matrices: Mapping[str, Matrix],
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"{self._kind}: expected a dropout from 0 to 1, got {dropout}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        shapes = dict(self._shapes())
        if shapes.keys() != matrices.keys():
            raise ValueError(f"{self._kind}: expected matrices {', '.join(shapes)}, got {', '.join(matrices)}")
        for name, shape in shapes.items():
            matrix = matrices[name]
            if (matrix.out_features, matrix.in_features) != shape:
                raise ValueError(
                    f"{self._kind}: expected {name} of {shape[0]} x {shape[1]}, "
                    f"got {matrix.out_features} x {matrix.in_features}"
                )
            if (matrix.bias is not None) != (bias and not name.startswith("hr")):
                raise ValueError(f"{self._kind}: expected {name} {'with' if bias else 'without'} a bias")
            own, first = stored(matrix), stored(matrices["ih_l0"])
            if own.dtype != first.dtype or isinstance(matrix, nn.Linear) != isinstance(matrices["ih_l0"], nn.Linear):
                raise TypeError(
                    f"{self._kind}: expected {name} as {type(matrices['ih_l0']).__name__} of {first.dtype}, "
                    f"as ih_l0, got {type(matrix).__name__} of {own.dtype}"
                )
            self.add_module(name, matrix)

    @classmethod
    def from_dense(
        cls: type[Own], rnn: nn.RNNBase, block: tuple[int, int], masks: Mapping[str, Tensor] | None = None
    ) -> Own:
        """Store the n x k blocks of each weight that hold a nonzero, or those that its mask touches.

        masks  torch's name of a weight, "weight_ih_l0" and so on -> (N, K); weights without one keep their nonzeros

        Biases are shared with `rnn`; training mode and requires_grad carry over.

        Raises TypeError unless `rnn` is of torch's class, ValueError for a mask of no weight, or where a weight cannot
        be cut into blocks, which it names.
        """
        masks = dict(masks or {})
        matrices = {}
        for name, linear in cls._linears(rnn).items():
            weight_name = f"weight_{name}"
            try:
                matrices[name] = SparseLinear.from_dense(linear, block, masks.pop(weight_name, None))
            except ValueError as error:
                raise ValueError(f"{cls.__name__}: {weight_name}: {error}") from None
        if masks:
            raise ValueError(f"{cls.__name__}: expected masks of weights, got {', '.join(masks)}")
        return cls(**_arguments(rnn), matrices=matrices).train(rnn.training)

    @classmethod
    def split(cls: type[Own], rnn: nn.RNNBase) -> Own:
        """A layer with the same function whose matrices are nn.Linear, with the Parameters of `rnn` themselves.

        Raises TypeError unless `rnn` is of torch's class.
        """
        return cls(**_arguments(rnn), matrices=cls._linears(rnn)).train(rnn.training)

    @classmethod
    def _linears(cls, rnn: nn.RNNBase) -> dict[str, nn.Linear]:
        """An nn.Linear for each weight of torch's layer, by our name; they share its Parameters."""
        if not isinstance(rnn, cls.dense):
            raise TypeError(f"{cls.__name__}: expected an nn.{cls.dense.__name__}, got {type(rnn).__name__}")
        linears = {}
        for weight_name, weight in rnn.named_parameters():
            if weight_name.startswith("weight_"):
                name = weight_name.removeprefix("weight_")
                linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = weight
                linear.bias = getattr(rnn, f"bias_{name}", None)
                linears[name] = linear.train(rnn.training)
        return linears

    def to_dense(self) -> nn.RNNBase:
        """torch's layer with the same function, which shares the Parameters of matrices that are nn.Linear unmasked."""
        dense: Any = type(self).dense(**_arguments(self), device="meta")
        for name, matrix in self.matrices.items():
            linear = matrix if isinstance(matrix, nn.Linear) else matrix.to_dense()
            own = linear._parameters.get("weight")  # a masked one is computed
            setattr(dense, f"weight_{name}", nn.Parameter(linear.weight.detach()) if own is None else own)
            if linear.bias is not None:
                setattr(dense, f"bias_{name}", linear.bias)
        dense.flatten_parameters()
        return dense.train(self.training)

    def quantize(self: Own) -> Own:
        """This layer with int8 weights (BlockSparse.quantize), for inference; biases are shared."""
        sparse = {name: matrix for name, matrix in self.matrices.items() if isinstance(matrix, SparseLinear)}
        return self.with_matrices({name: matrix.quantize() for name, matrix in sparse.items()})

    def with_matrices(self: Own, matrices: Mapping[str, Matrix]) -> Own:
        """A layer with the same arguments and other matrices."""
        return type(self)(**_arguments(self), matrices=matrices).train(self.training)

    def sample(self, batch: int, steps: int, generator: torch.Generator) -> Tensor:
        """A random input of so many sequences and steps."""
        shape = (batch, steps) if self.batch_first else (steps, batch)
        values = stored(self._modules["ih_l0"])
        return torch.randn(*shape, self.input_size, generator=generator).to(values)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The submodules, by name."""
        return {name: cast(Matrix, self._modules[name]) for name, _ in self._shapes()}

    def flatten_parameters(self) -> None:
        """Nothing to do; torch's layers have it, so models call it."""

    @property
    def _kind(self) -> str:
        return type(self).__name__

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def _shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        rows = self.gates * self.hidden_size
        for layer in range(self.num_layers):
            columns = self._directions * self._output_size if layer else self.input_size
            for direction in ("", "_reverse")[: self._directions]:
                yield f"ih_l{layer}{direction}", (rows, columns)
                yield f"hh_l{layer}{direction}", (rows, self._output_size)
                if self.proj_size:
                    yield f"hr_l{layer}{direction}", (self.proj_size, self.hidden_size)

    def _tensors(self, layer: int) -> RecurrentTensors:
        tensors = RecurrentTensors([], [], [], [], [])
        for direction in ("", "_reverse")[: self._directions]:
            for kind in ("ih", "hh", "hr") if self.proj_size else ("ih", "hh"):
                matrix: Any = self._modules[f"{kind}_l{layer}{direction}"]
                tensors.crow_indices.append(matrix._buffers["crow_indices"])
                tensors.col_indices.append(matrix._buffers["col_indices"])
                tensors.values.append(matrix._parameters["values"])
                if matrix._buffers["scales"] is not None:
                    tensors.scales.append(matrix._buffers["scales"])
                if matrix._parameters["bias"] is not None:
                    tensors.biases.append(matrix._parameters["bias"])
        return tensors

    def _state_sizes(self) -> tuple[int, ...]:
        """Features of each state: h, and for an LSTM c."""
        return (self.hidden_size,)

    def _run(self, x: Tensor, batch_sizes: Tensor | None, tensors: RecurrentTensors, states: States) -> States:
        """(y, then the states after the last step) of one layer; states are (D, B, F)."""
        raise NotImplementedError

    def _forward(self, x: Tensor | PackedSequence, states: States | None) -> tuple[Any, States]:
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, states)
        if x.dim() not in (2, 3):
            raise ValueError(f"{self._kind}: expected x of 2 or 3 dimensions, got shape {tuple(x.shape)}")
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            if states is not None:
                for state in states:
                    if state.dim() != 2:
                        raise ValueError(
                            f"{self._kind}: expected states of 2 dimensions with unbatched x, got {tuple(state.shape)}"
                        )
                states = tuple(state.unsqueeze(1) for state in states)
        if self.batch_first:
            x = x.transpose(0, 1)
        y, states = self._layers(x, None, x.shape[1], states)
        if self.batch_first:
            y = y.transpose(0, 1)
        if batched:
            return y, states
        return y.squeeze(0 if self.batch_first else 1), tuple(state.squeeze(1) for state in states)

    def _forward_packed(self, x: PackedSequence, states: States | None) -> tuple[PackedSequence, States]:
        if states is not None:
            states = permuted(states, x.sorted_indices)
        batch = batch_of(self._kind, x.data, x.batch_sizes)
        y, states = self._layers(x.data, x.batch_sizes, batch, states)
        return (
            PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices),
            permuted(states, x.unsorted_indices),
        )

    def _layers(
        self, x: Tensor, batch_sizes: Tensor | None, batch: int, states: States | None
    ) -> tuple[Tensor, States]:
        if x.shape[-1] != self.input_size:
            raise ValueError(f"{self._kind}: expected input_size = {self.input_size} features, got {x.shape[-1]}")
        if not x.shape[0]:
            raise ValueError(f"{self._kind}: expected at least one step, got x of shape {tuple(x.shape)}")
        matrix = self._modules["ih_l0"]
        dense = isinstance(matrix, nn.Linear)
        first = stored(matrix)
        dtype = first.dtype if first.is_floating_point() else x.dtype
        if dense and torch.is_autocast_enabled(x.device.type):
            dtype = x.dtype  # torch's layer casts what it wants to
        elif x.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
            states = None if states is None else tuple(state.to(dtype) for state in states)
        if x.dtype != dtype or x.device != first.device:
            raise TypeError(f"{self._kind}: expected x of dtype {dtype} on {first.device}, got {x.dtype} on {x.device}")
        cells = self.num_layers * self._directions
        shapes = [(cells, batch, size) for size in self._state_sizes()]
        if states is None:
            zeros = x.new_zeros(shapes[0])  # h and c may be one tensor: neither is written
            states = tuple(zeros if shape == shapes[0] else x.new_zeros(shape) for shape in shapes)
        else:
            for state, shape in zip(states, shapes, strict=True):
                if state.shape != shape or state.dtype != dtype or state.device != x.device:
                    raise ValueError(
                        f"{self._kind}: expected states of shape {shape} and dtype {dtype} on {x.device}, "
                        f"got {tuple(state.shape)} and {state.dtype} on {state.device}"
                    )
        if dense:
            return dense_layers(self, x, batch_sizes, states)
        after: list[States] = []
        for layer in range(self.num_layers):
            own = slice(layer * self._directions, (layer + 1) * self._directions)
            before = states if self.num_layers == 1 else tuple(state[own] for state in states)
            x, *last = self._run(x, batch_sizes, self._tensors(layer), before)
            after.append(tuple(last))
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        return x, after[0] if len(after) == 1 else tuple(torch.cat(parts) for parts in zip(*after, strict=True))

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        shown = {name: getattr(self, name) for name in (*defaults, "proj_size")}
        return text + "".join(f", {n}={v}" for n, v in shown.items() if v != defaults.get(n, 0))


def stored(matrix: Any) -> Tensor:
    """A tensor of the matrix's dtype and device; a mask is not applied for it."""
    return matrix.values if isinstance(matrix, SparseLinear) else next(matrix.parameters())


def _arguments(rnn: Any) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    arguments = {name: getattr(rnn, name) for name in names}
    return arguments | ({"proj_size": rnn.proj_size} if rnn.proj_size else {})


def permuted(states: States, order: Tensor | None) -> States:
    """States (cells, B, F) with their sequences in this order."""
    return states if order is None else tuple(state.index_select(1, order) for state in states)
