"""Rows of the table: loads, stores, atomics, asynchronous copies, ldmatrix and stmatrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .bits import UNSIGNED, PtxError, decode, encode, width
from .memory import SHARED_WINDOW, Space
from .parse import Address, Instruction, Operand, Register, Symbol, Vector
from .table import Execute, effect

if TYPE_CHECKING:
    from .machine import Machine

ORDER = r"(?P<order>(?:\.(?:weak|volatile|relaxed|acquire|release|acq_rel)(?:\.(?:cta|cluster|gpu|sys))?)?)"
SPACE = r"(?:\.(?P<space>global|shared)(?:::cta)?)?"
CACHE = r"(?:\.nc)?(?:\.(?:ca|cg|cs|lu|cv|wb|wt))?(?:\.L1::\w+)?(?:\.L2::(?!cache_hint)\w+)*"
TYPE = r"(?:\.v(?P<count>[248]))?\.(?P<t>[bus](?:8|16|32|64)|f32|f64)"


def addresses(machine: Machine, operand: Operand) -> Callable[[], np.ndarray]:
    """A function that gives the uint64 addresses of `[base + offset]`."""
    if not isinstance(operand, Address):
        raise PtxError(f"expected an address, got {operand}")
    bits = machine.kernel.registers[operand.base.name] if isinstance(operand.base, Register) else 64
    base, offset = machine.bits_reader(operand.base, bits), np.uint64(operand.offset % (1 << 64))
    if bits == 64:
        return lambda: base() + offset
    return lambda: (base().astype(np.uint64) + offset) & np.uint64(0xFFFFFFFF)


def resolve(machine: Machine, space: str | None, address: np.ndarray, mask: np.ndarray) -> tuple[Space, np.ndarray]:
    """The memory and the addresses within it; without a space, addresses are generic."""
    if space == "shared":
        return machine.shared, address
    if space is None and len(used := address[mask]):
        shared = used >= SHARED_WINDOW
        if shared.all():
            return machine.shared, address - np.uint64(SHARED_WINDOW)
        if shared.any():
            raise PtxError("generic addresses into global and shared memory in one instruction")
    return machine.memory, address


def elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@contextmanager
def strong(machine: Machine, memory: Space, order: str, mask: np.ndarray) -> Iterator[Callable[..., None]]:
    """For the accesses of strong instructions, which race with nothing, and what they pass on between warps.

    In global memory the function that it gives is to be called with their addresses and what they do.
    """

    def pass_on(where: np.ndarray, reads: bool, writes: bool, replaces: bool = False) -> None:
        races = memory.races
        if memory is not machine.memory or races is None or ".cta" in order:
            return
        for thread in np.flatnonzero(mask):
            if reads:
                races.observe(int(where[thread]), thread // 32, order.startswith((".acquire", ".acq_rel")))
            if writes:
                release = order.startswith((".release", ".acq_rel"))
                races.publish(int(where[thread]), thread // 32, release, replaces)

    memory.ordered = True
    yield pass_on
    memory.ordered = False


@effect(rf"ld{ORDER}{SPACE}{CACHE}{TYPE}", "9.7.9.8 ld, 9.7.9.9 ld.global.nc")
def ld(machine: Machine, instruction: Instruction, order: str, space: str | None, count: str | None, t: str) -> Execute:
    destination, source = instruction.operands
    size = width(t) // 8
    address = addresses(machine, source)
    writes = [machine.bits_writer(item, t, wider=True) for item in elements(destination)]

    def execute(mask: np.ndarray) -> None:
        memory, where = resolve(machine, space, address(), mask)
        if order in ("", ".weak") or memory is machine.shared:
            data = memory.load(where, size, len(writes), mask)
        else:
            with strong(machine, memory, order, mask) as pass_on:
                data = memory.load(where, size, len(writes), mask)
                pass_on(where, reads=True, writes=False)
        if order not in ("", ".weak"):
            machine.polling |= mask.reshape(-1, 32).any(1)
        for i, write in enumerate(writes):
            write(data[:, i], mask)

    return execute


@effect(rf"ld\.param(?:::\w+)?{TYPE}", "9.7.9.8 ld (a kernel's parameters)")
def ld_param(machine: Machine, instruction: Instruction, count: str | None, t: str) -> Execute:
    destination, source = instruction.operands
    if not isinstance(source, Address) or not isinstance(source.base, Symbol):
        raise PtxError("expected the name of a parameter")
    by_name = {parameter.name: parameter for parameter in machine.kernel.parameters}
    if source.base.name not in by_name:
        raise PtxError(f"unknown parameter {source.base.name}")
    parameter, size = by_name[source.base.name], width(t) // 8
    writes = [machine.bits_writer(item, t, wider=True) for item in elements(destination)]
    if source.offset + size * len(writes) > parameter.size:
        raise PtxError(f"read past the {parameter.size} bytes of {parameter.name}")
    first = parameter.offset + source.offset
    values = machine.parameters[first : first + size * len(writes)].view(UNSIGNED[8 * size])

    def execute(mask: np.ndarray) -> None:
        for value, write in zip(values, writes, strict=True):
            write(np.full(machine.threads, value), mask)

    return execute


@effect(rf"st{ORDER}{SPACE}{CACHE}{TYPE}", "9.7.9.11 st")
def st(machine: Machine, instruction: Instruction, order: str, space: str | None, count: str | None, t: str) -> Execute:
    destination, source = instruction.operands
    address = addresses(machine, destination)
    reads = [machine.bits_reader(item, width(t), wider=True) for item in elements(source)]

    def execute(mask: np.ndarray) -> None:
        memory, where = resolve(machine, space, address(), mask)
        data = np.stack([read() for read in reads], 1)
        if order in ("", ".weak") or memory is machine.shared:
            memory.store(where, data, mask)
            return
        with strong(machine, memory, order, mask) as pass_on:
            memory.store(where, data, mask)
            pass_on(where, reads=False, writes=True, replaces=True)

    return execute


def _wrap_increment(old: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.where(old >= limit, 0, old + 1)


def _wrap_decrement(old: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.where((old == 0) | (old > limit), limit, old - 1)


ATOMIC: dict[str, Callable] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": _wrap_increment,
    "dec": _wrap_decrement,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}


@effect(
    rf"(?P<name>atom|red){ORDER}{SPACE}\.(?P<op>{'|'.join(ATOMIC)})(?:\.noftz)?"
    r"\.(?P<t>[bus](?:16|32|64)|f16x2|bf16x2|f16|bf16|f32|f64)",
    "9.7.13.5 atom, 9.7.13.6 red",
)
def atom(
    machine: Machine, instruction: Instruction, name: str, order: str, space: str | None, op: str, t: str
) -> Execute:
    """Threads with the same address go one after the other, lowest first."""
    operands = (None, *instruction.operands) if name == "red" else instruction.operands
    address = addresses(machine, operands[1])
    reads = [machine.reader(operand, t) for operand in operands[2:]]
    write = machine.bits_writer(operands[0], t)
    size = width(t) // 8

    def execute(mask: np.ndarray) -> None:
        memory, where = resolve(machine, space, address(), mask)
        machine.polling |= mask.reshape(-1, 32).any(1)
        old = np.zeros(machine.threads, UNSIGNED[8 * size])
        sources = [read() for read in reads]
        left = mask.copy()
        while left.any():
            threads = np.flatnonzero(left)
            turn = np.zeros_like(left)
            turn[threads[np.unique(where[threads], return_index=True)[1]]] = True
            with strong(machine, memory, order, turn) as pass_on:
                before = memory.load(where, size, 1, turn)[:, 0]
                after = encode(t, ATOMIC[op](decode(t, before), *sources))
                memory.store(where, after[:, None], turn)
                pass_on(where, reads=True, writes=True)
            old = np.where(turn, before, old)
            left &= ~turn
        write(old, mask)

    return execute


@effect(
    r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::(?!cache_hint)\w+)*",
    "9.7.9.25.3.1 cp.async",
)
def cp_async(machine: Machine, instruction: Instruction) -> Execute:
    """Copies `size` bytes, of which only the first src-size are read and the rest become zero."""
    target, source, size_operand, *rest = instruction.operands
    size = getattr(size_operand, "bits", 0)
    if size not in (4, 8, 16) or (".cg." in instruction.opcode and size != 16):
        raise PtxError(f"cp-size: expected 4, 8 or 16 (16 for .cg), got {size_operand}")
    to, origin = addresses(machine, target), addresses(machine, source)
    source_size = machine.reader(rest[0], "u32") if rest else None

    def execute(mask: np.ndarray) -> None:
        taken = source_size() if source_size else np.full(machine.threads, size, np.uint32)
        if (taken[mask] > size).any():
            raise PtxError(f"src-size: expected at most {size}")
        whole, partly = mask & (taken == size), mask & (taken > 0) & (taken < size)
        data = machine.memory.load(origin(), 4, size // 4, whole)
        for byte in range(size) if partly.any() else ():
            wanted = partly & (taken > byte)
            data.view(np.uint8)[:, byte] |= machine.memory.load(origin() + np.uint64(byte), 1, 1, wanted)[:, 0]
        machine.copies.issue(to(), data, mask)

    return execute


@effect(r"cp\.async\.(?P<what>commit_group|wait_group|wait_all)", "9.7.9.25.3.2 cp.async.commit_group, ...")
def cp_async_group(machine: Machine, instruction: Instruction, what: str) -> Execute:
    in_flight = getattr(instruction.operands[0], "bits", 0) if instruction.operands else 0

    def execute(mask: np.ndarray) -> None:
        warps = machine.whole_warps(mask)
        if what != "wait_group":
            machine.copies.commit(warps)
        if what != "commit_group":
            machine.copies.wait(warps, in_flight)

    return execute


@effect(
    r"(?P<name>ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16",
    "9.7.14.5.15 ldmatrix, 9.7.14.5.16 stmatrix",
)
def matrix(machine: Machine, instruction: Instruction, name: str, count: str, trans: str | None) -> Execute:
    """8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.

    Lane l has the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or with .trans of column l / 4.
    """
    loads = name == "ldmatrix"
    vector, address_operand = instruction.operands if loads else instruction.operands[::-1]
    address = addresses(machine, address_operand)
    items = elements(vector)
    if len(items) != int(count):
        raise PtxError(f"expected {count} registers, got {len(items)}")
    writes = [machine.writer(item, "b32") for item in items] if loads else []
    reads = [] if loads else [machine.reader(item, "b32") for item in items]

    def execute(mask: np.ndarray) -> None:
        machine.whole_warps(mask)
        where = address()
        for i in range(int(count)):
            rows = mask & (machine.lane // 8 == i)
            if loads:
                data = machine.shared.load(where, 4, 4, rows).reshape(-1, 32, 4)[:, 8 * i : 8 * i + 8]
                writes[i](_fragment(data, trans).reshape(-1), mask)
            else:
                words = np.zeros((machine.warps, 32, 4), np.uint32)
                words[:, 8 * i : 8 * i + 8] = _rows(reads[i]().reshape(-1, 32), trans)
                machine.shared.store(where, words.reshape(-1, 4), rows)

    return execute


def _fragment(rows: np.ndarray, trans: str | None) -> np.ndarray:
    """(warps, 8 rows, 4 words) -> (warps, 32 lanes)"""
    halfwords = np.ascontiguousarray(rows).view(np.uint16)  # (warps, 8, 8)
    if trans:
        halfwords = halfwords.transpose(0, 2, 1)
    return np.ascontiguousarray(halfwords).view(np.uint32).reshape(-1, 32)


def _rows(lanes: np.ndarray, trans: str | None) -> np.ndarray:
    """The inverse of _fragment."""
    halfwords = np.ascontiguousarray(lanes.reshape(-1, 8, 4)).view(np.uint16)
    if trans:
        halfwords = halfwords.transpose(0, 2, 1)
    return np.ascontiguousarray(halfwords).view(np.uint32)
