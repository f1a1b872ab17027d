"""The sparse layers that are timed: dtype, block, sparsity, and the inputs from tests/cases.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from harness import Step, cold_copies, rotating

from sparsenlp import BlockSparse, native
from sparsenlp.ops import bsr_linear

from cases import BsrLinearCase  # isort: skip  (found through harness)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""dtype of the weight -> dtype of x and the bias."""

DEFAULT_BLOCKS = {"f32": (8, 1), "bf16": (8, 2), "int8": (8, 4)}
"""Eight outputs times one 32-bit unit of inputs: the block that each dtype runs best with."""


@dataclass(frozen=True)
class Candidate:
    """One sparse layer; isa_cap names an instruction set to stay below, "" for the best."""

    dtype: str
    block: tuple[int, int]
    sparsity: float
    isa_cap: str = ""

    @property
    def block_name(self) -> str:
        return f"{self.block[0]}x{self.block[1]}"

    def __str__(self) -> str:
        return f"{self.dtype} {self.block_name} {self.sparsity:.0%} {self.isa_cap}".strip()

    def prepare(self, shape: tuple[int, int], tokens: int, cold: bool = False) -> tuple[Step, BlockSparse]:
        """(the call for a weight of shape (N, K) and x (M, K), the weight), checked against the float64 reference.

        cold  rotates among copies of the weight that together exceed the caches
        Raises AssertionError if the result is wrong.
        """
        dtype, int8 = DTYPES[self.dtype], self.dtype == "int8"
        case = BsrLinearCase((tokens,), *shape, self.block, 1 - self.sparsity, dtype=dtype, int8=int8, seed=7)
        x, weight, bias = case.x(), case.weight(), case.bias_vector()
        step = rotating([call(x, copy, bias, self.isa_cap) for copy in cold_copies(weight, cold)])
        torch.testing.assert_close(step().double(), case.expected(), **self._tolerance(case))
        return step, weight

    def _tolerance(self, case: BsrLinearCase) -> dict[str, Any]:
        """That of the tests, which is for sums of up to 512 products; errors of longer ones grow as the square root."""
        products = case.columns * case.density
        return case.tolerance | {"atol": case.tolerance["atol"] * max(1.0, (products / 512) ** 0.5)}


def call(x: torch.Tensor, weight: BlockSparse, bias: torch.Tensor | None, isa_cap: str = "") -> Step:
    """bsr_linear as a step, on no better an instruction set than `isa_cap`."""
    if not isa_cap:
        return lambda: bsr_linear(x, weight, bias)

    def run() -> torch.Tensor:
        with native.isa_cap(isa_cap):
            return bsr_linear(x, weight, bias)

    return run


def in_default_blocks(sparsities: tuple[float, ...]) -> list[Candidate]:
    """Each dtype in its best block at each sparsity."""
    return [Candidate(dtype, block, s) for dtype, block in DEFAULT_BLOCKS.items() for s in sparsities]


def in_every_block(sparsities: tuple[float, ...]) -> list[Candidate]:
    """The same, the other blocks, and AVX2 where there is better (at the highest sparsity)."""
    others = [("f32", block) for block in ((1, 1), (4, 1), (16, 1), (8, 8), (16, 16), (32, 32))] + [("bf16", (8, 1))]
    capped = [Candidate("f32", (8, 1), max(sparsities), "avx2")] if "avx2" in native.isas()[1:] else []
    return [*in_default_blocks(sparsities), *(Candidate(*other, s) for other in others for s in sparsities), *capped]
