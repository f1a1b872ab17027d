"""Rows of the table: mov, cvt and conversions of addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .bits import UNSIGNED, integer, is_float, width
from .memory import SHARED_WINDOW
from .parse import Instruction, Vector
from .table import Execute, Pure, effect, pure

if TYPE_CHECKING:
    from .machine import Machine

ROUND: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
SCALAR = r"[us](?:8|16|32|64)|f16|bf16|f32|f64"


@effect(r"mov\.(?P<t>[busf](?:16|32|64)|pred)", "9.7.9.3 mov, 9.7.9.4 mov")
def mov(machine: Machine, instruction: Instruction, t: str) -> Execute:
    """Copies; packs a vector into one register or takes it apart, first element lowest."""
    destination, source = instruction.operands
    kind = "pred" if t == "pred" else f"b{width(t)}"
    if isinstance(source, Vector):
        part = f"b{width(t) // len(source.items)}"
        reads = [machine.reader(item, part) for item in source.items]
        write = machine.writer(destination, kind)
        return lambda mask: write(_join([read() for read in reads], UNSIGNED[width(t)]), mask)
    read = machine.reader(source, kind)
    if isinstance(destination, Vector):
        part = f"b{width(t) // len(destination.items)}"
        writes = [machine.writer(item, part) for item in destination.items]

        def take_apart(mask: np.ndarray) -> None:
            parts = np.ascontiguousarray(read()).view(UNSIGNED[width(part)]).reshape(machine.threads, -1)
            for i, write in enumerate(writes):
                write(parts[:, i], mask)

        return take_apart
    write = machine.writer(destination, kind)
    return lambda mask: write(read(), mask)


def _join(parts: list[np.ndarray], dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(parts, 1)).view(dtype)[:, 0]


def to_integer(rounding: Callable, t: str) -> Callable[[np.ndarray], np.ndarray]:
    """Floats to integers of type t, clamped; NaN gives 0."""
    limits = np.iinfo(integer(t))

    def compute(a: np.ndarray) -> np.ndarray:
        value = rounding(np.nan_to_num(a.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        inside = np.clip(value, float(limits.min), np.nextafter(float(limits.max), 0) if width(t) == 64 else limits.max)
        result = inside.astype(integer(t))
        return np.where(value >= float(limits.max), limits.max, result).astype(integer(t))

    return compute


def converted(rounding: str | None, sat: str | None, relu: str | None, d: str, s: str) -> Callable:
    if is_float(s) and not is_float(d):
        return to_integer(ROUND[rounding or "rzi"], d)
    if not is_float(d):
        if not sat:
            return lambda a: a
        low, high = np.iinfo(integer(d)).min, np.iinfo(integer(d)).max
        return lambda a: np.array([min(max(int(x), low), high) for x in a], np.int64 if low else np.uint64)
    steps: list[Callable] = []
    if rounding in ROUND:
        steps.append(ROUND[rounding])
    if sat:
        steps.append(lambda a: np.where(np.isnan(a), 0, np.clip(a, 0, 1)))
    if relu:
        steps.append(lambda a: np.maximum(a, 0))

    def compute(a: np.ndarray) -> np.ndarray:
        for step in steps:
            a = step(a)
        return a

    return compute


pure(
    rf"cvt(?:\.(?P<r>rn|rni|rzi|rmi|rpi))?(?:\.ftz)?(?P<sat>\.sat)?(?P<relu>\.relu)?\.(?P<d>{SCALAR})\.(?P<s>{SCALAR})",
    "9.7.9.21 cvt",
    lambda r, sat, relu, d, s: Pure(d, (s,), converted(r, sat, relu, d, s), wider=True),
)
pure(r"cvt\.rna\.tf32\.f32", "9.7.9.21 cvt", lambda: Pure("tf32", ("f32",), lambda a: a))


def packed_integers(d: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """d = {c's lower half, sat(a), sat(b)}: b becomes the lowest byte."""
    limits = np.iinfo(integer(d))

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        x, y = (np.clip(v, limits.min, limits.max).astype(np.int64) & 0xFF for v in (a, b))
        return ((c.astype(np.int64) & 0xFFFF) << 16 | x << 8 | y).astype(np.uint32)

    return compute


def packed(relu: str | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda a, b: np.maximum(np.stack([b, a], 1), 0 if relu else -np.inf)


pure(
    r"cvt\.rn(?P<relu>\.relu)?\.(?P<d>f16x2|bf16x2)\.f32",
    "9.7.9.21 cvt (the first source becomes the upper half)",
    lambda relu, d: Pure(d, ("f32", "f32"), packed(relu)),
)
pure(
    r"cvt\.pack\.sat\.(?P<d>[us]8)\.s32\.b32",
    "9.7.9.22 cvt.pack",
    lambda d: Pure("b32", ("s32", "s32", "b32"), packed_integers(d)),
)
pure(r"cvta(?:\.to)?\.global\.(?P<t>u64|u32)", "9.7.9.20 cvta", lambda t: Pure(t, (t,), lambda a: a))
pure(r"cvta\.shared\.u64", "9.7.9.20 cvta", lambda: Pure("u64", ("u64",), lambda a: a + np.uint64(SHARED_WINDOW)))
pure(
    r"cvta\.to\.shared\.u64",
    "9.7.9.20 cvta",
    lambda: Pure("u64", ("u64",), lambda a: a - np.uint64(SHARED_WINDOW)),
)
