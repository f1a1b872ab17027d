"""The table of instructions: opcode pattern, section of the PTX ISA, and what it does.

A row's pattern matches the whole opcode; its named groups are the arguments of the row's function.
`pure` rows compute one value from operands, thread by thread; `effect` rows do anything else.
The rows stand in arithmetic.py, convert.py, transfer.py, collective.py and mma.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .bits import PtxError
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Execute = Callable[[np.ndarray], None]  # runs an instruction for the threads of a mask


@dataclass(frozen=True)
class Pure:
    """result = compute(*sources): types of the result and of the sources, and the function on decoded arrays."""

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., np.ndarray]
    wider: bool = False  # registers may have more bits than their type


@dataclass(frozen=True)
class Row:
    pattern: re.Pattern[str]
    section: str
    bind: Callable[..., Execute]


TABLE: list[Row] = []


def pure(pattern: str, section: str, rule: Callable[..., Pure]) -> None:
    """Add a row whose `rule` gets the named groups of the pattern."""

    def bind(machine: Machine, instruction: Instruction, **groups: Any) -> Execute:
        operation = rule(**groups)
        destination, *sources = instruction.operands
        if len(sources) != len(operation.sources):
            raise PtxError(f"expected {len(operation.sources)} sources, got {len(sources)}")
        readers = [machine.reader(o, kind, operation.wider) for o, kind in zip(sources, operation.sources, strict=True)]
        write = machine.writer(destination, operation.result, operation.wider)
        return lambda mask: write(operation.compute(*(read() for read in readers)), mask)

    TABLE.append(Row(re.compile(pattern), section, bind))


def effect(pattern: str, section: str) -> Callable[[Callable[..., Execute]], Callable[..., Execute]]:
    """Decorate `(machine, instruction, **groups) -> Execute` as a row."""

    def add(bind: Callable[..., Execute]) -> Callable[..., Execute]:
        TABLE.append(Row(re.compile(pattern), section, bind))
        return bind

    return add


def bind(machine: Machine, instruction: Instruction) -> Execute:
    """The function that executes `instruction`. Raises PtxError where the table has no row for it."""
    for row in TABLE:
        if match := row.pattern.fullmatch(instruction.opcode):
            return row.bind(machine, instruction, **match.groupdict())
    raise PtxError(f"unknown opcode {instruction.opcode}")
