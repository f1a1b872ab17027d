"""Rows of the table: control flow, barriers, fences, and what the lanes of a warp do together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .bits import PtxError, integer
from .parse import Instruction, Pair, Symbol
from .table import Execute, effect

if TYPE_CHECKING:
    from .machine import Machine


# 9.7.12 Control flow


@effect(r"bra(?:\.uni)?", "9.7.12.3 bra")
def bra(machine: Machine, instruction: Instruction) -> Execute:
    (target,) = instruction.operands
    if not isinstance(target, Symbol) or target.name not in machine.kernel.labels:
        raise PtxError(f"unknown label {target}")
    index = machine.kernel.labels[target.name]
    return lambda mask: machine.jump(mask, index)


@effect(r"ret(?:\.uni)?|exit", "9.7.12.6 ret, 9.7.12.7 exit")
def ret(machine: Machine, instruction: Instruction) -> Execute:
    def execute(mask: np.ndarray) -> None:
        machine.exited |= mask
        machine.gathering &= ~np.repeat(mask.reshape(-1, 32).any(1), 32)  # they may have waited for these
        machine.release_full()

    return execute


@effect(r"trap", "9.7.19.4 trap")
def trap(machine: Machine, instruction: Instruction) -> Execute:
    def execute(mask: np.ndarray) -> None:
        raise PtxError(f"trap in thread {np.flatnonzero(mask)[0]} of the launch")

    return execute


# 9.7.13 Synchronisation


@effect(
    r"(?:bar|barrier)(?:\.cta)?\.(?P<what>sync|arrive)(?P<aligned>\.aligned)?",
    "9.7.13.1 bar, barrier",
)
def bar(machine: Machine, instruction: Instruction, what: str, aligned: str | None) -> Execute:
    name = machine.reader(instruction.operands[0], "u32")
    count = machine.reader(instruction.operands[1], "u32") if len(instruction.operands) > 1 else None

    def execute(mask: np.ndarray) -> None:
        machine.whole_warps(mask)
        machine.wait_at_barrier(mask, name(), count() if count else None, blocks=what == "sync")

    return execute


@effect(r"(?:fence|membar)(?:\.(?:sc|acq_rel))?\.(?:gpu|sys|gl)", "9.7.13.4 membar, fence")
def fence(machine: Machine, instruction: Instruction) -> Execute:
    def execute(mask: np.ndarray) -> None:
        if machine.memory.races:
            machine.memory.races.fence(np.flatnonzero(mask.reshape(-1, 32).any(1)))

    return execute


@effect(
    r"bar\.warp\.sync|(?:fence|membar)(?:\.\w+)*|nanosleep\.u32|griddepcontrol\.\w+",
    "9.7.13.2 bar.warp.sync, 9.7.13.4 membar, fence, 9.7.19.2 nanosleep (stores are seen at once here)",
)
def nothing(machine: Machine, instruction: Instruction) -> Execute:
    return lambda mask: None


def _members(machine: Machine, members: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(warps,) those that execute; raises where the lanes of the membermask are not the ones that do."""
    here = mask.reshape(-1, 32)
    named = (members[:, None] if members.ndim == 1 else members).reshape(-1, 32)
    wanted = (named >> np.arange(32, dtype=np.uint32) & 1).astype(bool) & ~machine.exited.reshape(-1, 32)
    if (here.any(1) & (here != wanted).any(1)).any():
        raise PtxError("the lanes that execute it are not those of its membermask")
    return here.any(1)


# 9.7.9 Data exchange within a warp


@effect(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32", "9.7.9.6 shfl.sync")
def shfl(machine: Machine, instruction: Instruction, mode: str) -> Execute:
    destination, a, b, c, members = instruction.operands
    value, shift, clamp = (machine.reader(operand, "b32") for operand in (a, b, c))
    named = machine.reader(members, "b32")
    first = destination.first if isinstance(destination, Pair) else destination
    write = machine.writer(first, "b32")
    write_valid = machine.writer(destination.second if isinstance(destination, Pair) else None, "pred")
    lane = machine.lane

    def execute(mask: np.ndarray) -> None:
        _members(machine, named(), mask)
        offset, segment = shift().astype(np.int64) & 31, clamp().astype(np.int64) >> 8 & 31
        largest = lane & segment | clamp().astype(np.int64) & 31 & ~segment
        source = {
            "up": lane - offset,
            "down": lane + offset,
            "bfly": lane ^ offset,
            "idx": lane & segment | offset & ~segment,
        }[mode]
        valid = source >= largest if mode == "up" else source <= largest
        source = np.arange(machine.threads) - lane + np.where(valid, source, lane)
        if (mask & ~mask[source]).any():
            raise PtxError("a lane reads from one that does not take part")
        write(value()[source], mask)
        write_valid(valid, mask)

    return execute


@effect(r"vote\.sync\.(?P<mode>all|any|uni|ballot)\.(?:pred|b32)", "9.7.13.9 vote.sync")
def vote(machine: Machine, instruction: Instruction, mode: str) -> Execute:
    destination, source, members = instruction.operands
    predicate, named = machine.reader(source, "pred"), machine.reader(members, "b32")
    write = machine.writer(destination, "b32" if mode == "ballot" else "pred")

    def execute(mask: np.ndarray) -> None:
        _members(machine, named(), mask)
        here, true = mask.reshape(-1, 32), (predicate() & mask).reshape(-1, 32)
        ballot = (true.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        everyone = (true == here).all(1)
        result = {"ballot": ballot, "all": everyone, "any": true.any(1), "uni": everyone | ~true.any(1)}[mode]
        write(np.repeat(result, 32), mask)

    return execute


@effect(r"activemask\.b32", "9.7.13.11 activemask")
def activemask(machine: Machine, instruction: Instruction) -> Execute:
    write = machine.writer(instruction.operands[0], "b32")

    def execute(mask: np.ndarray) -> None:
        bits = (mask.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        write(np.repeat(bits.astype(np.uint32), 32), mask)

    return execute


REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


@effect(r"redux\.sync\.(?P<op>add|min|max|and|or)\.(?P<t>[bus]32)", "9.7.13.12 redux.sync")
def redux(machine: Machine, instruction: Instruction, op: str, t: str) -> Execute:
    destination, source, members = instruction.operands
    value, named, write = machine.reader(source, t), machine.reader(members, "b32"), machine.writer(destination, t)

    def execute(mask: np.ndarray) -> None:
        warps = _members(machine, named(), mask)
        values = value().reshape(-1, 32)
        result = np.zeros(machine.warps, integer(t))
        for warp in np.flatnonzero(warps):
            result[warp] = REDUCE[op].reduce(values[warp][mask.reshape(-1, 32)[warp]])
        write(np.repeat(result, 32), mask)

    return execute
