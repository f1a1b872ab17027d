"""What the launchers share: the GPU they plan for, and a launch as data."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors


COUNTABLE = 2**30
"""Sizes below this, and their sums, are counted in 32 bits; addresses have 64."""


def check_countable(op: str, sizes: dict[str, int], remedy: str) -> None:
    """Raise ValueError unless all sizes, by what they count, are below COUNTABLE."""
    for what, size in sizes.items():
        if size >= COUNTABLE:
            raise ValueError(f"{op}: expected fewer than {COUNTABLE} {what}, got {size}; {remedy}")


@dataclass(frozen=True)
class Device:
    """The GPU that a launch is planned for."""

    arch: str  # "sm_80", "sm_90", "gfx942", ...
    processors: int  # multiprocessors, AMD's compute units

    @classmethod
    def of(cls, tensor: Tensor) -> Device:
        """The GPU that holds `tensor`; a small A100 where Triton interprets."""
        if INTERPRETED:
            return cls("sm_80", 8)
        return _device(tensor.device.index)

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")


@functools.cache
def _device(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


@dataclass(frozen=True)
class Launch:
    """One launch: `kernel[(programs,)](*arguments, **constants, **options)`."""

    kernel: Any
    programs: int
    arguments: tuple[Tensor | int | float | None, ...]
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.options)

    def record(self) -> None:
        """Put the launch into the graph that torch is tracing; there options are those that Inductor knows."""
        options = {name: self.options[name] for name in ("num_warps", "num_stages")}
        torch.library.wrap_triton(self.kernel)[(self.programs,)](*self.arguments, **self.constants, **options)


def run(launches: list[Launch], x: Tensor) -> None:
    """Run launches in order on the GPU that holds x, or record them where torch traces, and x is no plain tensor."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        for launch in launches:
            launch.record()
        return
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.run()


def tuned(op: str, arch: str, shape_class: str) -> dict[str, int]:
    """The row of tuned/<op>.json for a shape class on `arch`, of "sm" or "gfx" where `arch` has none of its own.

    A table is {arch: {shape class: {name: number}}}; what the classes and names mean, the op's planner says.
    Rows of "sm" and "gfx" are the defaults: chosen to fit registers and shared memory, not measured.
    """
    table = _table(op)
    default = table["gfx" if arch.startswith("gfx") else "sm"]
    return table.get(arch, {}).get(shape_class) or default[shape_class]


@functools.cache
def _table(op: str) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads((Path(__file__).parent / "tuned" / f"{op}.json").read_text())
