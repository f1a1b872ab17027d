"""nn.Conv1d with block-sparse weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.sparse_conv1d import call, check_window, windows
from .linear import SparseLinear


class SparseConv1d(nn.Module):
    """nn.Conv1d that stores and multiplies only the nonzero blocks of its weight: its arguments, inputs and outputs.

    filters  SparseLinear, out_channels x (kernel_size in_channels), the inputs of a tap next to each other (see
             `filter_matrix`), with bias and activation. A submodule, which the state dict names

    filters may also be an nn.Linear (see `split`), which is called with the windows of x: what prunes, trains, converts
    or stores nn.Linear then works on the convolution, and putting a SparseLinear in makes the layer sparse.

    `from_dense` makes one from an nn.Conv1d. x (B, C, L) or (C, L) has the dtype of the weights (any with int8 ones);
    under autocast it is cast. In memory channels are last in x and y, as an embedding leaves them: transposing such
    a tensor is free, and a contiguous x (B, C, L) is copied. groups other than 1 are not supported.

    Raises ValueError where torch raises RuntimeError: sizes that disagree, a sequence shorter than the kernel.
    """

    dense = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] | str = 0,
        dilation: int | tuple[int] = 1,
        padding_mode: str = "zeros",
        *,
        filters: SparseLinear | nn.Linear,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size, self.stride, self.dilation = _single(kernel_size), _single(stride), _single(dilation)
        self.padding = padding if isinstance(padding, str) else _single(padding)
        self.padding_mode = padding_mode
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"SparseConv1d: expected a padding_mode among {', '.join(PADDING_MODES)}, got {padding_mode!r}"
            )
        self._paddings = self._both_paddings()
        check_window(*self._window())
        shape = (out_channels, self.kernel_size[0] * in_channels)
        if (filters.out_features, filters.in_features) != shape:
            raise ValueError(
                f"SparseConv1d: expected filters of {shape[0]} x {shape[1]}, "
                f"got {filters.out_features} x {filters.in_features}"
            )
        self.filters = filters

    @classmethod
    def from_dense(
        cls, conv: nn.Conv1d, block: tuple[int, int], mask: Tensor | None = None, activation: str = "none"
    ) -> SparseConv1d:
        """Store the blocks of `conv` that hold a nonzero, or those that `mask` (N, C, T) touches.

        The bias is shared with `conv`; training mode and requires_grad carry over.

        Raises TypeError unless `conv` is an nn.Conv1d, ValueError for groups and a weight that blocks do not divide.
        """
        linear = cls.split(conv).filters
        assert isinstance(linear, nn.Linear)
        if mask is not None and mask.shape != conv.weight.shape:
            raise ValueError(
                f"SparseConv1d: expected a mask of shape {tuple(conv.weight.shape)}, got {tuple(mask.shape)}"
            )
        filters = SparseLinear.from_dense(linear, block, None if mask is None else filter_matrix(mask), activation)
        return cls(**_arguments(conv), filters=filters).train(conv.training)

    @classmethod
    def split(cls, conv: nn.Conv1d) -> SparseConv1d:
        """A layer with the same function whose filters are an nn.Linear: a copy of the weight, and the bias itself.

        Raises TypeError unless `conv` is an nn.Conv1d, ValueError for groups.
        """
        if not isinstance(conv, nn.Conv1d):
            raise TypeError(f"SparseConv1d: expected an nn.Conv1d, got {type(conv).__name__}")
        if conv.groups != 1:
            raise ValueError(f"SparseConv1d: expected groups = 1, got {conv.groups}")
        matrix = filter_matrix(conv.weight.detach()).clone(memory_format=torch.contiguous_format)
        linear: Any = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix, requires_grad=conv.weight.requires_grad)
        linear.bias = conv.bias
        return cls(**_arguments(conv), filters=linear).train(conv.training)

    def to_dense(self) -> nn.Conv1d:
        """An nn.Conv1d with the same function (activation apart)."""
        linear = self.filters if isinstance(self.filters, nn.Linear) else self.filters.to_dense()
        conv = nn.Conv1d(**_arguments(self), bias=linear.bias is not None, device="meta")
        taps = linear.weight.detach().view(self.out_channels, self.kernel_size[0], self.in_channels)
        conv.weight = nn.Parameter(taps.transpose(1, 2).contiguous())
        conv.bias = linear.bias
        return conv.train(self.training)

    def quantize(self, input_scale: float | None = None) -> SparseConv1d:
        """This layer with int8 weights (BlockSparse.quantize), for inference; the bias is shared.

        input_scale  rounds x to int8, as a constant; None finds a scale for each sequence as it comes
        """
        if not isinstance(self.filters, SparseLinear):
            raise TypeError(f"SparseConv1d: expected sparse filters to quantize, got {type(self.filters).__name__}")
        return type(self)(**_arguments(self), filters=self.filters.quantize(input_scale)).train(self.training)

    @property
    def weight(self) -> Tensor:
        """What nn.Conv1d has under this name (N, C, T): a view of an nn.Linear's, a copy of a SparseLinear's."""
        linear = self.filters if isinstance(self.filters, nn.Linear) else self.filters.to_dense()
        return linear.weight.view(self.out_channels, self.kernel_size[0], self.in_channels).transpose(1, 2)

    @property
    def matrices(self) -> dict[str, SparseLinear | nn.Linear]:
        """The submodules, by name."""
        return {"filters": self.filters}

    def with_matrices(self, matrices: Mapping[str, SparseLinear | nn.Linear]) -> SparseConv1d:
        """A layer with the same arguments and other filters."""
        return type(self)(**_arguments(self), filters=matrices["filters"]).train(self.training)

    def sample(self, batch: int, steps: int, generator: torch.Generator) -> Tensor:
        """A random input of so many sequences and positions, at least as many as the kernel covers."""
        covered = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        x = torch.randn(batch, max(steps, covered), self.in_channels, generator=generator)
        return x.to(next(self.filters.parameters())).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 3) or x.shape[-2] != self.in_channels:
            raise ValueError(
                f"SparseConv1d: expected x (B, {self.in_channels}, L) or ({self.in_channels}, L), got {tuple(x.shape)}"
            )
        if x.dim() == 2:
            return self.forward(x[None])[0]
        front, behind = self._paddings
        if self.padding_mode != "zeros" and front + behind:
            x = F.pad(x, (front, behind), mode=PADDING_MODES[self.padding_mode])
        filters: Any = self._modules["filters"]  # nn.Module.__getattr__ costs as much as a small kernel
        if not isinstance(filters, SparseLinear):
            return filters(windows(x.transpose(1, 2), *self._window()).flatten(2)).transpose(1, 2)
        buffers: dict[str, Any] = filters._buffers
        parameters: dict[str, Any] = filters._parameters
        y = call(
            x.transpose(1, 2),
            buffers["crow_indices"],
            buffers["col_indices"],
            parameters["values"],
            filters.in_features,
            parameters["bias"],
            filters.activation,
            *self._window(),
            buffers["scales"],
            filters.input_scale,
        )
        return y.transpose(1, 2)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        defaults = {"stride": (1,), "padding": (0,), "dilation": (1,), "padding_mode": "zeros"}
        shown = {name: getattr(self, name) for name in defaults}
        return text + "".join(f", {name}={value}" for name, value in shown.items() if value != defaults[name])

    def _window(self) -> tuple[int, int, tuple[int, int], int]:
        """kernel_size, stride, padding and dilation as the op takes them; other modes than zeros pad beforehand."""
        padding = self._paddings if self.padding_mode == "zeros" else (0, 0)
        return self.kernel_size[0], self.stride[0], padding, self.dilation[0]

    def _both_paddings(self) -> tuple[int, int]:
        if not isinstance(self.padding, str):
            return self.padding[0], self.padding[0]
        if self.padding not in ("same", "valid"):
            raise ValueError(f"SparseConv1d: expected a padding of same, valid or a number, got {self.padding!r}")
        if self.padding == "valid":
            return 0, 0
        if self.stride != (1,):
            raise ValueError(f"SparseConv1d: expected stride 1 with padding='same', got {self.stride[0]}")
        total = self.dilation[0] * (self.kernel_size[0] - 1)
        return total // 2, total - total // 2


PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""nn.Conv1d's name of a padding_mode -> F.pad's."""


def filter_matrix(weight: Tensor) -> Tensor:
    """A convolution's weight (N, C, T) as a matrix (N, T C): the inputs of a tap next to each other."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1)


def _single(value: int | tuple[int]) -> tuple[int]:
    return (value,) if isinstance(value, int) else (value[0],)


def _arguments(conv: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(conv, name) for name in names}
