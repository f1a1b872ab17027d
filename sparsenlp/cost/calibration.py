"""Timing a designed set of small layers, interleaved, and fitting a law to each kind of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import BlockSparse
from ..layers import SparseLinear
from ..measure import interleave, use_threads
from .law import DenseLaw, Law, Setup, SparseLaw, Work
from .model import INPUT_BYTES, WEIGHT_BYTES, Fitted, Kind

SECONDS = 2.0
"""Of timing for each kind."""

# (N, K), density and tokens of the fitted calls: every feature of a law is large in some of them and small in
# others. Sides that a block does not divide are cut to those that it does.
_SPARSE_FITTED = (
    ((256, 320), 0.5, (1, 2, 4, 8, 16, 32, 48, 128)),
    ((512, 512), 0.05, (1, 4, 8, 12, 24, 64, 96)),
    ((384, 1280), 0.1, (1, 3, 8, 16, 40, 64, 128)),
    ((512, 3072), 0.1, (1, 8, 16, 64, 256)),
    ((1280, 512), 0.2, (1, 2, 5, 8, 16, 32, 96, 192)),
    ((640, 1152), 0.4, (1, 8, 10, 32, 64)),
    ((1024, 2048), 0.05, (1, 8, 16, 32, 64, 256)),
    ((1920, 640), 0.08, (1, 4, 8, 16, 48, 64, 320)),
    ((1280, 2560), 0.5, (1, 4, 8, 16, 32, 64)),
    ((1536, 768), 0.02, (1, 8, 16, 64, 128, 256)),
    ((768, 2304), 0.03, (1, 8, 32, 128, 512)),
)
_SPARSE_HELD_OUT = (
    ((448, 704), 0.3, (1, 6, 20, 64, 128)),
    ((896, 960), 0.15, (1, 8, 16, 48, 160)),
    ((1152, 448), 0.08, (2, 8, 32, 80, 128)),
    ((704, 1792), 0.02, (1, 16, 96, 384)),
)
_DENSE_SHAPES = ((256, 384), (640, 512), (512, 1280), (1024, 1024), (1280, 2560), (2560, 960))
_DENSE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DENSE_FITTED = tuple((shape, 1.0, _DENSE_TOKENS) for shape in _DENSE_SHAPES)
_DENSE_HELD_OUT = tuple((shape, 1.0, (1, 6, 20, 96, 192)) for shape in ((896, 704), (448, 1920), (1920, 768)))

UNEVEN = 0.7
"""Standard deviation of the logarithm of a block row's density, as in globally pruned encoders."""

Timer = Callable[[dict[str, Callable[[], object]], float], dict[str, float]]
"""(calls by name, seconds to spend) -> seconds of each"""


@dataclass(frozen=True)
class _Sample:
    kind: Kind
    work: Work
    held_out: bool
    call: Callable[[], object]


def calibrate(
    kinds: Iterable[Kind], threads: int | None = None, seconds: float = SECONDS, timer: Timer | None = None
) -> dict[Kind, Fitted]:
    """Time small layers of each kind on the CPU, all kinds interleaved, and fit their laws.

    threads  torch threads, None for the present number
    seconds  budget for each kind; every call is timed in five rounds at least
    timer    what times the calls; None is `undisturbed`
    """
    wanted = sorted(set(kinds), key=str)
    with use_threads(threads) as count, torch.inference_mode():
        samples = [sample for kind in wanted for sample in _samples(kind)]
        if not samples:
            return {}
        times = (timer or undisturbed)({str(i): sample.call for i, sample in enumerate(samples)}, seconds * len(wanted))
    return {
        kind: _fit(kind, count, [(s, times[str(i)]) for i, s in enumerate(samples) if s.kind == kind])
        for kind in wanted
    }


def undisturbed(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds of each call with warm weights: the median of the rounds, as measurements are judged by it."""
    timings = interleave(calls, seconds, warm=True)
    return {name: timing.median for name, timing in timings.items()}


def _samples(kind: Kind) -> list[_Sample]:
    generator = torch.Generator().manual_seed(0)
    sets = (_DENSE_FITTED, _DENSE_HELD_OUT) if kind.block is None else (_SPARSE_FITTED, _SPARSE_HELD_OUT)
    samples = []
    for held_out, designs in enumerate(sets):
        for (rows, columns), density, counts in designs:
            n, k = kind.block or (1, 1)
            rows, columns = max(rows // n, 1) * n, max(columns // k, 1) * k
            run, stored = _layer(kind, rows, columns, density, generator)
            for tokens in counts:
                x = torch.randn(tokens, columns, generator=generator).to(_io_dtype(kind))
                samples.append(_Sample(kind, Work(tokens, rows, columns, stored), bool(held_out), partial(run, x)))
    return samples


def _layer(
    kind: Kind, rows: int, columns: int, density: float, generator: torch.Generator
) -> tuple[Callable[[Tensor], object], int]:
    """(layer with `density` of its blocks at random, in rows as uneven as those of pruned weights, its weights)."""
    dtype = _io_dtype(kind)
    bias = torch.randn(rows, generator=generator).to(dtype)
    if kind.block is None:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        return partial(F.linear, weight=weight, bias=bias), weight.numel()
    n, k = kind.block
    grid = (rows // n, columns // k)
    share = torch.randn(grid[0], 1, generator=generator).mul(UNEVEN).exp()
    kept = torch.rand(grid, generator=generator) < density * share / share.mean()
    mask = kept.repeat_interleave(n, 0).repeat_interleave(k, 1)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    layer = SparseLinear.from_weight(BlockSparse.from_dense(weight, kind.block, mask), bias)
    layer = layer.quantize() if kind.dtype == "int8" else layer
    return layer, layer.values.numel()


def _fit(kind: Kind, threads: int, timed: list[tuple[_Sample, float]]) -> Fitted:
    setup = Setup(threads, INPUT_BYTES[kind.dtype], WEIGHT_BYTES[kind.dtype], core_cache_bytes())
    fitted = [(sample.work, seconds) for sample, seconds in timed if not sample.held_out]
    works, times = [work for work, _ in fitted], [seconds for _, seconds in fitted]
    law: Law = DenseLaw.fit(setup, works, times) if kind.block is None else SparseLaw.fit(setup, works, times)
    errors = tuple(law.predict(sample.work) / seconds - 1 for sample, seconds in timed if sample.held_out)
    return Fitted(law, errors)


def core_cache_bytes() -> int:
    """Second-level cache of a core, 1 MiB where the system does not tell."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        text = size.read_text().strip()
    except OSError:
        return 1 << 20
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdecimal() else 1 << 20


def _io_dtype(kind: Kind) -> torch.dtype:
    return torch.bfloat16 if kind.dtype == "bfloat16" else torch.float32
