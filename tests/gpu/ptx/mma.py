"""Rows of the table: mma.sync and mma.sp, whose fragments are spread over the 32 lanes of a warp.

Lane l is row g = l / 4 and column group t = l % 4. With e elements in a 32-bit register, element i of register r is
    A  row g + 8 (r % 2), column e t + i + 4 e (r / 2)
    B  column g,          row    e t + i + 4 e r
    C  row g + 8 (j / 2), column 2 t + j % 2            (element j of four)
A of mma.sp is stored compressed in this layout: column c of it belongs to group c / 2 of four columns, and the
metadata say in two bits which of the four it is. Products are added in float64 and rounded once.

Source: PTX ISA 9.7.14.5 (mma), 9.7.14.6 (mma.sp and its metadata).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .bits import PtxError, decode, encode, width
from .parse import Immediate, Instruction
from .table import Execute, effect
from .transfer import elements

if TYPE_CHECKING:
    from .machine import Machine

LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4
DENSE = {"f16": ("m16n8k8", "m16n8k16"), "bf16": ("m16n8k8", "m16n8k16"), "tf32": ("m16n8k4", "m16n8k8")}
DENSE |= {"s8": ("m16n8k16", "m16n8k32"), "u8": ("m16n8k16", "m16n8k32")}
SPARSE = {"f16": ("m16n8k16", "m16n8k32"), "bf16": ("m16n8k16", "m16n8k32")}
SPARSE |= {"s8": ("m16n8k32", "m16n8k64"), "u8": ("m16n8k32", "m16n8k64")}


def a_layout(kind: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), each (32 lanes, elements), of a 16 x `columns` A."""
    per_register = 32 // width(kind)
    element = np.arange(16 * columns // 32)
    register, i = element // per_register, element % per_register
    rows = GROUP[:, None] + 8 * (register % 2)
    return rows, per_register * THREAD[:, None] + i + 4 * per_register * (register // 2)


def b_layout(kind: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), each (32 lanes, elements), of a `rows` x 8 B."""
    per_register = 32 // width(kind)
    element = np.arange(rows * 8 // 32)
    register, i = element // per_register, element % per_register
    return per_register * THREAD[:, None] + i + 4 * per_register * register, np.broadcast_to(
        GROUP[:, None], (32, len(element))
    )


def c_layout() -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), each (32 lanes, 4), of the 16 x 8 C and D."""
    j = np.arange(4)
    return GROUP[:, None] + 8 * (j // 2), 2 * THREAD[:, None] + j % 2


def metadata_place(kind: str, compressed: int, selector: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the 2-bit indices of A (16 x `compressed` stored columns) are: (lane, bit), each (16, compressed).

    16-bit types: 16 bits of a lane are 4 groups of a row, rows g and g + 8 in the lower and upper half.
    8-bit types: the 32 bits of a lane are 8 groups of a row, rows g and g + 8 in neighbouring lanes.
    The selector says which lanes of each four hold them, where not all do.
    """
    row, column = np.arange(16)[:, None], np.arange(compressed)[None, :]
    group, inner = column // 2, column % 2
    if width(kind) == 16:
        lanes_used = compressed // 8  # per row
        lane = 4 * (row % 8) + lanes_used * selector + group // 4
        bit = 16 * (row // 8) + 4 * (group % 4) + 2 * inner
    else:
        lanes_used = 2 * compressed // 16
        lane = 4 * (row % 8) + lanes_used * selector + 2 * (group // 8) + row // 8
        bit = 4 * (group % 8) + 2 * inner + 0 * row
    if selector * lanes_used >= 4:
        raise PtxError(f"sparsity selector: expected less than {4 // lanes_used}, got {selector}")
    return lane, bit


def expand(a: np.ndarray, metadata: np.ndarray, kind: str, selector: int) -> np.ndarray:
    """A (warps, 16, 2 compressed) with zeros from its compressed form (warps, 16, compressed).

    metadata: (warps, 32) of every lane
    """
    warps, _, compressed = a.shape
    lane, bit = metadata_place(kind, compressed, selector)
    index = metadata[:, lane] >> bit.astype(np.uint32) & 3  # (warps, 16, compressed)
    if (index[..., 0::2] >= index[..., 1::2]).any():
        raise PtxError("metadata: expected the two indices of each group in ascending order")
    dense = np.zeros((warps, 16, 2 * compressed), a.dtype)
    column = np.arange(compressed) // 2 * 4 + index
    np.put_along_axis(dense, column.astype(np.int64), a, axis=2)
    return dense


@effect(
    r"mma\.(?P<sparse>sp(?:::ordered_metadata)?\.)?sync\.aligned\.(?P<shape>m16n8k\d+)\.row\.col(?P<sat>\.satfinite)?"
    r"\.(?P<d>f32|f16|s32)\.(?P<a>f16|bf16|tf32|s8|u8)\.(?P<b>f16|bf16|tf32|s8|u8)\.(?P<c>f32|f16|s32)",
    "9.7.14.5.14 mma, 9.7.14.6.3 mma.sp",
)
def mma(
    machine: Machine, instruction: Instruction, sparse: str | None, shape: str, sat: str | None,
    d: str, a: str, b: str, c: str,
) -> Execute:  # fmt: skip
    """D = A B + C"""
    if shape not in (SPARSE if sparse else DENSE).get(a, ()) or width(a) != width(b):
        raise PtxError(f"unknown opcode {instruction.opcode}")
    depth = int(re.sub("m16n8k", "", shape))
    stored = depth // 2 if sparse else depth
    destination, *sources = instruction.operands
    fragments = [[machine.bits_reader(item, 32) for item in elements(operand)] for operand in sources[:3]]
    results = elements(destination)
    writes = [machine.writer(item, "b32") for item in results]
    metadata = machine.reader(sources[3], "b32") if sparse else None
    selector = sources[4].bits if sparse and isinstance(sources[4], Immediate) else 0

    a_rows, a_columns = a_layout(a, stored)
    b_rows, b_columns = b_layout(b, depth)
    c_rows, c_columns = c_layout()

    def gather(readers: list, kind: str, warps: np.ndarray) -> np.ndarray:
        """(warps, 32 lanes, elements) decoded, as float64"""
        words = np.stack([read().reshape(-1, 32)[warps] for read in readers], 2)
        if kind == "tf32":
            words = words & np.uint32(0xFFFFE000)  # the hardware reads the upper 19 bits
        parts = words if width(kind) == 32 else words.view(f"u{width(kind) // 8}")
        return decode(kind, parts).astype(np.float64)

    def execute(mask: np.ndarray) -> None:
        warps = np.flatnonzero(machine.whole_warps(mask))
        matrix_a = np.zeros((len(warps), 16, stored))
        matrix_b = np.zeros((len(warps), depth, 8))
        matrix_a[:, a_rows, a_columns] = gather(fragments[0], a, warps)
        matrix_b[:, b_rows, b_columns] = gather(fragments[1], b, warps)
        if metadata:
            matrix_a = expand(matrix_a, metadata().reshape(-1, 32)[warps], a, selector)
        product = matrix_a @ matrix_b
        total = gather(fragments[2], c, warps) + product[:, c_rows, c_columns]
        if d == "s32":
            limits = np.iinfo(np.int32)
            total = np.clip(total, limits.min, limits.max) if sat else total.astype(np.int64)
        words = np.zeros((machine.warps, 32, len(writes)), np.uint32)
        words[warps] = np.ascontiguousarray(encode(d, total)).view(np.uint32)
        for i, write in enumerate(writes):
            write(words[..., i].reshape(-1), mask)

    return execute
