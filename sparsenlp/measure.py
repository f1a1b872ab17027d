"""Timing on a machine that is shared and drifts: interleaved runs, medians, one ratio per pair."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from . import native
from .version import __version__

SAMPLE_SECONDS = 100e-6  # a sample repeats a call until it lasts about this long, far above the clock's resolution

SWEEP_BYTES = 4 << 20  # beyond most second-level caches

SummaryT = TypeVar("SummaryT", bound="Summary")


@dataclass(frozen=True)
class Summary:
    """Median and 20th / 80th percentile of `samples`; sample i belongs to round i."""

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls: type[SummaryT], samples: Sequence[float]) -> SummaryT:
        """Raises ValueError if there is no sample."""
        if not len(samples):
            raise ValueError(f"{cls.__name__}: expected at least one sample, got none")
        p20, median, p80 = np.percentile(samples, (20, 50, 80))
        return cls(float(median), float(p20), float(p80), tuple(float(s) for s in samples))

    @property
    def spread(self) -> float:
        """(p80 - p20) / median: 0.1 means that the middle 60 % of the samples lie within about ±5 %."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0

    def percentile(self, percent: float) -> float:
        """Of the samples; hardly less than the largest one where they are fewer than 100 / (100 - percent)."""
        return float(np.percentile(self.samples, percent))

    def as_dict(self, samples: bool = False) -> dict[str, Any]:
        """The statistics as JSON data, with the samples themselves where asked."""
        data: dict[str, Any] = {"median": self.median, "p20": self.p20, "p80": self.p80, "rounds": len(self.samples)}
        if samples:
            data["samples"] = list(self.samples)
        return data


class Timing(Summary):
    """Seconds per call."""


class Ratio(Summary):
    """Time of one function over time of another, paired by round; above 1 the second is faster."""


def interleave(
    functions: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    min_rounds: int = 5,
    warmup: int = 2,
    warm: bool = False,
) -> dict[str, Timing]:
    """Time the functions in turn, A B A B ..., until `seconds` are used up in all.

    A round takes one sample of every function, so a drift of the machine hits all of them alike and
    `ratio` may compare round by round. A call shorter than SAMPLE_SECONDS is repeated within its
    sample: its data is then warm; rotate weights inside the function where cold ones are meant.

    seconds     budget of the timed part, s; warm-up comes on top
    min_rounds  rounds that run even if the budget is exceeded
    warmup      untimed calls of every function, at least 1
    warm        before each sample read SWEEP_BYTES of other data and run the sample once untimed, so that every
                function starts from the same state, whatever ran before it: its own data in the caches as after
                one call, as in a model where other layers run in between
    returns     {name: Timing}, seconds per call, the same number of samples for every name

    Gradients are as the caller set them. Raises ValueError if there is no function, or min_rounds or
    warmup is below 1.
    """
    if not functions:
        raise ValueError("interleave: expected at least one function, got none")
    if min_rounds < 1 or warmup < 1:
        raise ValueError(f"interleave: expected min_rounds and warmup of at least 1, got {min_rounds} and {warmup}")
    repeats = {name: _calibrate(function, warmup) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    sweep = torch.ones(SWEEP_BYTES // 4) if warm else torch.ones(0)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for name, function in functions.items():
            if warm:
                sweep.sum()
                _sample(function, repeats[name])
            samples[name].append(_sample(function, repeats[name]))
        rounds += 1
    return {name: Timing.of(values) for name, values in samples.items()}


def _sample(function: Callable[[], object], repeats: int) -> float:
    """Seconds per call over `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _calibrate(function: Callable[[], object], warmup: int) -> int:
    """Warm up, then the number of calls that makes a sample of SAMPLE_SECONDS."""
    for _ in range(warmup - 1):
        function()
    return max(1, ceil(SAMPLE_SECONDS / max(_sample(function, 1), 1e-7)))


def ratio(baseline: Summary, other: Summary) -> Ratio:
    """Speedup of `other` over `baseline`, round by round; both from one call of `interleave`.

    Raises ValueError if they have different numbers of samples.
    """
    if len(baseline.samples) != len(other.samples):
        raise ValueError(f"ratio: expected {len(baseline.samples)} paired samples, got {len(other.samples)}")
    return Ratio.of([a / b for a, b in zip(baseline.samples, other.samples, strict=True)])


@contextmanager
def use_threads(count: int | None) -> Iterator[int]:
    """Run a `with` block on `count` torch threads (None leaves them), then restore; yields the number in use.

    Raises ValueError if count is below 1.
    """
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ValueError(f"use_threads: expected at least 1 thread, got {count}")
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def watch_cpu() -> Callable[[], float]:
    """A function that tells in which share of the time since now this thread had a CPU: below 1 where others had it."""
    wall, own = time.perf_counter(), time.thread_time()
    return lambda: (time.thread_time() - own) / (time.perf_counter() - wall)


def machine() -> dict[str, Any]:
    """What a number was measured on, as JSON data; `threads` is torch's count at the time of the call."""
    return {
        "cpu": cpu_model(),
        "isa": native.isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparsenlp": __version__,
        "os": platform.platform(),
    }


def machine_line(data: Mapping[str, Any] | None = None) -> str:
    """One line for people, from `machine()` or a record of it."""
    m = machine() if data is None else data
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, ISA {m['isa'] or 'none (no native extension)'}, "
        f"torch {m['torch']}, sparsenlp {m['sparsenlp']}, {m['os']}"
    )


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"
