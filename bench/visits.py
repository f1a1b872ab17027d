"""Latency of engines that may live in other processes: each is visited in turn, for several calls at a time.

`sparsenlp.measure.interleave` takes one sample of each step per round. That suits layers in one process. A whole
model in a server runs again and again, with its weights in the caches as far as they fit; another engine's
process has its own clock; and a 99th percentile needs more calls than the slowest engine allows rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from peer_server import call_for

from sparsenlp.measure import Timing

ROUNDS = 8

Visit = Callable[[float], list[float]]
"""Call an engine once untimed, then until so many seconds are over, at least once; returns seconds for each call."""


@dataclass(frozen=True)
class Latency:
    """What an engine took.

    visits  median of each visit; visit i of all engines belongs to one round, so `measure.ratio` may pair them
    calls   every timed call
    """

    visits: Timing
    calls: Timing

    @property
    def median(self) -> float:
        """Seconds for a call."""
        return self.calls.median

    @property
    def p99(self) -> float:
        """99th percentile of all calls."""
        return self.calls.percentile(99)

    def as_dict(self) -> dict[str, Any]:
        """JSON data, seconds; `calls` is the number of timed calls, `rounds` of visits."""
        statistics = self.calls.as_dict()
        calls = statistics.pop("rounds")
        return statistics | {"p99": self.p99, "calls": calls, "rounds": len(self.visits.samples)}


def local(step: Callable[[], object], pause: float = 0.0) -> Visit:
    """Visits to a function of this process.

    pause  seconds to wait first, for the threads of the engine before to stop spinning
    """

    def visit(seconds: float) -> list[float]:
        time.sleep(pause)
        return call_for(step, seconds)

    return visit


def in_turn(visits: Mapping[str, Visit], seconds: float, min_rounds: int = 3) -> dict[str, Latency]:
    """Visit all engines, A B A B ..., until `seconds` are over; each gets as much of them, in about ROUNDS visits.

    min_rounds  rounds that are made even if that takes longer

    Raises ValueError if there is no engine or min_rounds is below 1.
    """
    if not visits or min_rounds < 1:
        raise ValueError(f"in_turn: expected an engine and a round, got {len(visits)} and {min_rounds}")
    slice_seconds = seconds / max(ROUNDS, min_rounds) / len(visits)
    rounds: dict[str, list[list[float]]] = {name: [] for name in visits}
    end, count = time.perf_counter() + seconds, 0
    while count < min_rounds or time.perf_counter() < end:
        for name, visit in visits.items():
            rounds[name].append(visit(slice_seconds))
        count += 1
    return {
        name: Latency(Timing.of([float(np.median(s)) for s in samples]), Timing.of([t for s in samples for t in s]))
        for name, samples in rounds.items()
    }
