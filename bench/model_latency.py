"""One group of bench/end_to_end.py: every engine on one model, input and number of threads, checked and in turn."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import encoders
import model_peers
import torch
from encoders import BLOCKS, Setting, hidden_states
from model_peers import PeerError, Server
from peers import SETTLE_SECONDS
from torch import Tensor, nn
from visits import Latency, Visit, in_turn, local

from sparsenlp.benchmark import BASELINES, Inputs, compiling
from sparsenlp.measure import ratio, use_threads
from sparsenlp.prune import sparsity_of

Row = dict[str, Any]
Zeros = float | str
"""A fraction of zeros, the same in every layer; "uneven" (see `encoders.unevenly_masked`); or "own", the model's."""


@dataclass(frozen=True)
class Group:
    """What is compared. `model` is a name of encoders.MODELS or the directory of a sparse model."""

    model: str
    setting: Setting
    zeros: tuple[Zeros, ...]
    threads: int
    precisions: tuple[str, ...] = tuple(BLOCKS)
    baselines: tuple[str, ...] = tuple(BASELINES)

    def __str__(self) -> str:
        return f"{self.model}, {self.setting}, {self.threads} threads"


@dataclass
class Engine:
    """A way to run the model, and what is found out about it.

    zeros    None for engines that gain nothing from zeros
    missing  why it is not timed
    """

    name: str
    precision: str
    ours: bool = False
    zeros: Zeros | None = None
    sparsity: float = 0.0
    visit: Visit | None = None
    deviation: dict[str, float] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Reference:
    """A masked model in dense float32, its inputs, and its hidden states, which are what every engine must find."""

    model: nn.Module
    inputs: Inputs
    expected: Tensor
    sparsity: float

    def admit(self, engine: Engine, y: Tensor, visit: Visit) -> Engine:
        """The engine with its visits if its result y is right, else with the reason."""
        engine.deviation = encoders.deviation(y, self.expected, self.inputs["attention_mask"])
        engine.sparsity = self.sparsity
        wrong = encoders.fault(engine.deviation, engine.precision, engine.ours)
        engine.missing, engine.visit = (f"wrong result: {wrong}", None) if wrong else (None, visit)
        return engine

    def admit_local(self, engine: Engine, model: Any) -> Engine:
        step = partial(model, **self.inputs)
        return self.admit(engine, hidden_states(step()), local(step, SETTLE_SECONDS))


def describe(zeros: Zeros) -> str:
    return zeros if isinstance(zeros, str) else f"{zeros:.0%}"


def say(text: str) -> None:
    """What is being done, for those who wait."""
    print(text, file=sys.stderr, flush=True)


def measure(group: Group, seconds: float, peers: Mapping[str, str | None]) -> list[Row]:
    """Build, check and time every engine: a row for each.

    seconds  of timing, in all, unless 3 rounds take longer
    peers    other engines and their versions, as `model_peers.versions`; empty for none
    """
    with ExitStack() as stack:
        stack.enter_context(use_threads(group.threads))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(compiling(len(group.baselines)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        present = [name for name, version in peers.items() if version is not None]
        servers = {name: stack.enter_context(Server(group.threads)) for name in present}
        engines = list(prepare(group, servers, folder))
        say(f"{group}: timing {sum(engine.visit is not None for engine in engines)} engines")
        visits = {engine.name: engine.visit for engine in engines if engine.visit is not None}
        return rows(group, engines, in_turn(visits, seconds))


def prepare(group: Group, servers: Mapping[str, Server], folder: Path) -> Iterator[Engine]:
    """Every engine, built and checked; the dense ones run the model with the last of the zeros."""
    dense = encoders.load(group.model)
    inputs = encoders.make_inputs(dense, group.setting)
    for zeros in group.zeros:
        for precision in group.precisions:
            engine = Engine(f"sparsenlp {precision} {describe(zeros)}", precision, True, zeros)
            say(f"{group}: {engine.name}")
            reference = masked(dense, zeros, precision, inputs)
            yield reference.admit_local(engine, ours(group.model, zeros, precision))
        last = zeros == group.zeros[-1]
        if last or "deepsparse" in servers:
            reference = masked(dense, zeros, "fp32", inputs)
            yield from rivals(group, reference, zeros, last, servers, folder / describe(zeros))


def with_zeros(dense: nn.Module, zeros: Zeros, precision: str) -> nn.Module:
    """A copy of the model with zeros in the blocks of a precision."""
    if zeros == "own":
        return copy.deepcopy(dense)
    if isinstance(zeros, str):
        return encoders.unevenly_masked(dense, BLOCKS[precision])
    return encoders.masked(dense, zeros, BLOCKS[precision])


@lru_cache(maxsize=6)
def ours(name: str, zeros: Zeros, precision: str) -> nn.Module:
    """`encoders.converted` of a model, kept for the next input: conversion takes seconds."""
    return encoders.converted(with_zeros(encoders.load(name), zeros, precision), precision)


def masked(dense: nn.Module, zeros: Zeros, precision: str, inputs: Inputs) -> Reference:
    model = with_zeros(dense, zeros, precision)
    return Reference(model, inputs, hidden_states(model(**inputs)), sparsity_of(model))


def rivals(
    group: Group, reference: Reference, zeros: Zeros, with_dense: bool, servers: Mapping[str, Server], folder: Path
) -> Iterator[Engine]:
    """Engines of others that skip zeros, and if asked the dense ones."""
    for name in group.baselines if with_dense else ():
        say(f"{group}: torch {name}")
        engine = Engine(f"torch {name}", name.split()[-1])
        try:
            yield reference.admit_local(engine, BASELINES[name].build(reference.model))
        except Exception as error:  # whatever the toolchain raises becomes the reason
            engine.missing = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            yield engine
    if servers:
        model_peers.write_folder(reference.model, reference.inputs, folder)
    for name, server in servers.items():
        skips = name in model_peers.SKIPS_ZEROS
        precisions = model_peers.SKIPS_ZEROS[name] if skips else model_peers.DENSE[name] if with_dense else ()
        for precision in precisions:
            built = f"{name} {precision}"
            engine = Engine(
                f"{built} {describe(zeros)}" if skips else built, precision, False, zeros if skips else None
            )
            say(f"{group}: {engine.name}")
            try:
                y = server.build(engine.name, folder)
                yield reference.admit(engine, y, server.visits(engine.name))
            except PeerError as error:
                engine.missing = str(error)
                yield engine


def rows(group: Group, engines: list[Engine], timings: Mapping[str, Latency]) -> list[Row]:
    """JSON data: a row for each engine, with its ratios to all others of the group if it is ours."""
    best = best_dense(engines, timings)
    about = {
        "model": group.model,
        "batch": group.setting.batch,
        "tokens": group.setting.tokens,
        "ragged": group.setting.ragged,
        "threads": group.threads,
        "best_dense": best,
    }
    found = []
    for engine in engines:
        row: Row = {
            "name": engine.name,
            "precision": engine.precision,
            "ours": engine.ours,
            "zeros": engine.zeros,
            "sparsity": engine.sparsity,
            "deviation": engine.deviation,
            "missing": engine.missing,
        }
        if engine.name in timings:
            own = timings[engine.name]
            row |= {"seconds": own.as_dict(), "sequences_per_second": group.setting.batch / own.median}
            if engine.ours:
                others = [e.name for e in engines if e.name in timings and not e.ours]
                row["time_over"] = {name: ratio(own.visits, timings[name].visits).median for name in others}
        found.append(row | about)
    return found


def best_dense(engines: list[Engine], timings: Mapping[str, Latency]) -> dict[str, str]:
    """Precision, or "any" -> the fastest engine that gains nothing from zeros, by its median."""
    timed = [engine for engine in engines if engine.name in timings and engine.zeros is None]
    best = {}
    for engine in sorted(timed, key=lambda engine: timings[engine.name].median):
        best.setdefault(engine.precision, engine.name)
        best.setdefault("any", engine.name)
    return best
