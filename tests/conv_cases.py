"""Random convolutions for the tests and the benchmark of sparse_conv1d, and what float64 gives for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from cases import TOLERANCES
from torch import Tensor

from sparsenlp import BlockSparse
from sparsenlp.reference import sparse_conv1d as reference


@dataclass(frozen=True)
class ConvCase:
    """B sequences of L positions with C channels, N filters of `taps` positions, `density` of their blocks stored."""

    batch: int = 2
    length: int = 20
    channels: int = 12
    filters: int = 16
    taps: int = 3
    block: tuple[int, int] = (8, 1)
    density: float = 0.4
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    activation: str = "none"
    bias: bool = True
    empty_rows: bool = False
    dtype: torch.dtype = torch.float32
    int8: bool = False
    seed: int = 0

    def __str__(self) -> str:
        default = ConvCase()
        parts = [f"{self.batch}x{self.length}x{self.channels}"]
        names = ("filters", "taps", "block", "density", "stride", "padding", "dilation", "activation", "dtype")
        parts += [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        parts += ["nobias"] * (not self.bias) + ["emptyrows"] * self.empty_rows + ["int8"] * self.int8
        return "-".join(parts).replace("torch.", "").replace(" ", "")

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.int8 if self.int8 else self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["bsr_linear", self.dtype]

    @property
    def window(self) -> dict[str, Any]:
        return {
            "kernel_size": self.taps,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }

    def weight(self) -> BlockSparse:
        """Random blocks scaled so that an output has about unit variance."""
        n, k = self.block
        generator = torch.Generator().manual_seed(self.seed)
        columns = self.taps * self.channels
        keep = torch.rand(self.filters // n, columns // k, generator=generator) < self.density
        if self.empty_rows:
            keep[::2] = False
        mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
        dense = torch.randn(self.filters, columns, generator=generator) / math.sqrt(max(columns * self.density, 1))
        weight = BlockSparse.from_dense((dense * mask).to(self.dtype), self.block, mask)
        return weight.quantize() if self.int8 else weight

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.length, self.channels, generator=generator).to(self.dtype)

    def bias_vector(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.filters, generator=generator).to(self.dtype) if self.bias else None

    def arguments(self) -> dict[str, Any]:
        """Of sparse_conv1d, by name."""
        named = {"x": self.x(), "weight": self.weight(), "bias": self.bias_vector(), "activation": self.activation}
        return named | self.window

    def op_arguments(self) -> tuple[Any, ...]:
        """Of the torch.library op."""
        weight, window = self.weight(), (self.taps, self.stride, list(self.padding), self.dilation)
        tensors = (self.x(), weight.crow_indices, weight.col_indices, weight.values, self.bias_vector())
        return (*tensors, self.activation, *window, weight.scales)

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        return _expected(self)


@cache  # each backend asks again
def _expected(case: ConvCase) -> Tensor:
    *others, scales = case.op_arguments()
    double = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in others)
    return reference.sparse_conv1d(*double, scales)


_SMALL = ConvCase()
_DTYPES = (  # block, dtype of x, whether weights are int8
    ((8, 1), torch.float32, False),
    ((8, 1), torch.bfloat16, False),
    ((8, 2), torch.bfloat16, False),
    ((8, 4), torch.float32, True),
    ((8, 4), torch.bfloat16, True),
)
SPARSE_CONV1D = [
    *(  # few and many lanes, runs of one output and of many, filters cut in parts, sequences that end inside a run
        replace(_SMALL, batch=batch, length=length, channels=channels, taps=taps, block=block, dtype=dtype, int8=int8)
        for batch, length, channels, taps in (
            (1, 3, 20, 3),
            (1, 131, 20, 5),
            (7, 11, 12, 4),
            (3, 70, 100, 5),
        )
        for block, dtype, int8 in _DTYPES
    ),
    *(
        replace(
            _SMALL, stride=stride, padding=padding, dilation=dilation, taps=taps, block=block, dtype=dtype, int8=int8
        )
        for stride, padding, dilation, taps in (
            (1, (2, 2), 1, 5),
            (5, (0, 3), 1, 3),
            (4, (9, 2), 6, 3),
            (1, (25, 30), 1, 2),  # outputs that see nothing but padding
        )
        for block, dtype, int8 in (_DTYPES[0], _DTYPES[1], _DTYPES[3])
    ),
    *(
        replace(_SMALL, filters=3 * n, channels=3 * k, block=(n, k), length=40, dtype=dtype)
        for n, k in ((1, 1), (4, 3), (12, 4), (32, 1), (2, 16))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        replace(_SMALL, activation=activation, padding=(1, 1), block=block, dtype=dtype, int8=int8)
        for activation, (block, dtype, int8) in zip(
            ("relu", "gelu", "gelu_tanh"), (_DTYPES[0], _DTYPES[2], _DTYPES[3]), strict=True
        )
    ),
    *(  # blocks that reach into two taps, and taps of no whole number of words
        replace(_SMALL, channels=channels, taps=4, block=block, dtype=dtype, int8=int8)
        for channels, block, dtype, int8 in (
            (6, (8, 8), torch.float32, False),
            (5, (8, 2), torch.bfloat16, False),
            (6, (8, 4), torch.bfloat16, False),
            (12, (8, 8), torch.float32, True),
        )
    ),
    *(replace(_SMALL, density=density) for density in (0.0, 1.0)),
    replace(_SMALL, bias=False, empty_rows=True),
    replace(_SMALL, bias=False, empty_rows=True, block=(8, 4), int8=True),
    replace(_SMALL, batch=0),
    replace(_SMALL, dtype=torch.float16),
    replace(_SMALL, dtype=torch.float64),
]

GRADIENTS = [
    replace(_SMALL, dtype=dtype, **change)
    for dtype in (torch.float32, torch.bfloat16)
    for change in (
        {"padding": (1, 1), "activation": "gelu"},
        {"stride": 2, "padding": (0, 3), "activation": "relu", "bias": False},
        {"dilation": 3, "stride": 2, "block": (16, 4), "taps": 4, "empty_rows": True},
        {"stride": 5, "taps": 2},  # positions that no output reads
    )
]
