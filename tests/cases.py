"""The inputs that op tests and benchmarks share: op x shape x pattern x activation, with tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenlp.formats import BlockSparse
from sparsenlp.reference import bsr_linear as reference

# Largest accepted error per (op, dtype), as for torch.testing.assert_close. Inputs are scaled so that
# outputs are about 1; never loosened to make a kernel pass.
TOLERANCES = {
    ("bsr_linear", torch.float32): {"rtol": 2e-6, "atol": 4e-6},
    ("bsr_linear", torch.bfloat16): {"rtol": 1.6e-2, "atol": 1e-2},
    ("bsr_linear", torch.float16): {"rtol": 2e-3, "atol": 2e-3},
    ("bsr_linear", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
    ("bsr_linear_wgrad", torch.float32): {"rtol": 2e-6, "atol": 1e-5},
}


@dataclass(frozen=True)
class BsrLinearCase:
    """x (*tokens, K) times an N x K weight in blocks, of which `density` are stored."""

    tokens: tuple[int, ...]
    rows: int
    columns: int
    block: tuple[int, int]
    density: float = 0.3
    activation: str = "none"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    empty_rows: bool = False
    seed: int = 0

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.tokens)) or "vector"
        parts = [tokens, f"{self.rows}x{self.columns}", "b" + "x".join(map(str, self.block)), f"d{self.density:g}"]
        parts += [self.activation] * (self.activation != "none") + ["nobias"] * (not self.bias)
        parts += ["emptyrows"] * self.empty_rows + [str(self.dtype).removeprefix("torch.")] * (
            self.dtype != torch.float32
        )
        return "-".join(parts)

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["bsr_linear", self.dtype]

    def weight(self) -> BlockSparse:
        """Random blocks scaled so that a row's dot product has about unit variance."""
        n, k = self.block
        generator = torch.Generator().manual_seed(self.seed)
        keep = torch.rand(self.rows // n, self.columns // k, generator=generator) < self.density
        if self.empty_rows:
            keep[::2] = False
        mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
        scale = 1 / math.sqrt(max(self.columns * self.density, 1))
        dense = torch.randn(self.rows, self.columns, generator=generator) * scale
        return BlockSparse.from_dense((dense * mask).to(self.dtype), self.block, mask)

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(*self.tokens, self.columns, generator=generator).to(self.dtype)

    def bias_vector(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.rows, generator=generator).to(self.dtype) if self.bias else None

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        weight, bias = self.weight(), self.bias_vector()
        bias = bias.double() if bias is not None else None
        tensors = (weight.crow_indices, weight.col_indices, weight.values.double(), bias, self.activation)
        return reference.bsr_linear(self.x().double(), *tensors)


BLOCKS = [
    (4, 1),
    (8, 1),
    (16, 1),
    (32, 1),
    (1, 1),
    (2, 2),
    (3, 5),
    (12, 4),
    (24, 2),
    (1, 8),
    (8, 8),
    (16, 16),
    (32, 32),
]
TOKENS = [1, 2, 3, 5, 8, 9, 16, 17, 33, 47, 64, 65, 130]

BSR_LINEAR = [
    *(BsrLinearCase((tokens,), 5 * n, 13 * k, (n, k)) for n, k in BLOCKS for tokens in (1, 7, 33)),
    *(BsrLinearCase((tokens,), 72, 77, (8, 1)) for tokens in TOKENS),
    *(
        BsrLinearCase((tokens,), 40, 48, (8, 1), activation=activation)
        for activation in ("relu", "gelu", "gelu_tanh")
        for tokens in (1, 40)
    ),
    *(BsrLinearCase((tokens,), 40, 48, (8, 1), density=d) for d in (0.0, 1.0) for tokens in (1, 40)),
    *(BsrLinearCase((tokens,), 64, 48, (8, 1), empty_rows=True, bias=False) for tokens in (2, 40)),
    BsrLinearCase((2, 3, 5), 32, 24, (4, 1)),
    BsrLinearCase((), 32, 24, (4, 1)),
    BsrLinearCase((0,), 32, 24, (4, 1)),
    BsrLinearCase((3, 0), 32, 24, (8, 1)),
    BsrLinearCase((128,), 256, 512, (8, 1), density=0.1),
    *(
        BsrLinearCase((tokens,), 32, 24, (8, 1), dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
        for tokens in (1, 20)
    ),
]
