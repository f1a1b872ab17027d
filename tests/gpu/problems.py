"""What a row of the kernel cases is: a kernel to execute, to compile, and to break."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PACKAGE = "sparsenlp_kernels"
IN_REGISTERS = dict.fromkeys(
    ("sm_80", "sm_90", "sm_100"), "few tokens multiply in registers, and Triton copies asynchronously only for dots"
)


@dataclass(frozen=True)
class Problem:
    """Launches that run in order on CPU tensors, and what must come out."""

    launches: list[Any]  # as launches.py describes them
    outputs: list[Tensor]  # NaN before
    expected: list[Tensor]  # float64, of outputs, then of what is updated
    tolerance: dict[str, float]
    updated: tuple[Tensor, ...] = ()  # read, then written

    def check(self) -> None:
        for output, expected in zip([*self.outputs, *self.updated], self.expected, strict=True):
            torch.testing.assert_close(output.double(), expected, **self.tolerance)


@dataclass(frozen=True)
class Mutation:
    """A bug on purpose: `old`, wherever it stands in a file of the kernels' package, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Row:
    """`small` and `large` get the name of the package to take the kernels from, the real one or a mutant of it,
    and the target to plan for.

    name         unique; the key of its budgets
    small        tiny sizes with ragged edges, to execute
    large        sizes that get the tiles of real work, to compile
    math         instructions that `large` must have: "tensor core", "fma" (and none that rounds float32), or "" for any
    synchronous  NVIDIA targets for which loops of `large` do not load all tiles by asynchronous copies, and why
    aside        kernels of `large` that multiply nothing, of which neither is asked
    targets      those of gates.py that it compiles for
    mutations    bugs, each of which some check must catch on this row
    """

    name: str
    small: Callable[[str, str], Problem]
    large: Callable[[str, str], Problem]
    math: str = "tensor core"
    synchronous: Mapping[str, str] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    mutations: tuple[Mutation, ...] = ()

    def __str__(self) -> str:
        return self.name
