"""Rows of the table: integer, logic, floating-point and comparison instructions, thread by thread.

f32 fma is computed in float64 and rounded once more; approximations (ex2.approx, rcp.approx, ...) are exact here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .bits import UNSIGNED, integer, is_float, width
from .parse import Instruction, Pair
from .table import Execute, Pure, effect, pure

if TYPE_CHECKING:
    from .machine import Machine

INT = r"(?P<t>[us](?:16|32|64))"
BITS = r"(?P<t>b(?:16|32|64)|pred)"
FLOAT = r"(?P<ftz>\.ftz)?\.(?P<t>f16x2|bf16x2|f16|bf16|f32|f64)"
FLUSHED = {"f32": np.finfo(np.float32).tiny, "f16": np.finfo(np.float16).tiny, "f16x2": np.finfo(np.float16).tiny}


# 9.7.1 Integer arithmetic


def wide(t: str) -> str:
    return f"{t[0]}{2 * width(t)}"


def high(t: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The upper half of a product."""
    if width(t) < 64:
        double = integer(wide(t))
        return lambda a, b: (a.astype(double) * b.astype(double)) >> double(width(t))
    return lambda a, b: np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], integer(t))


def low_or_high(half: str, t: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return np.multiply if half == "lo" else high(t)


def saturated(t: str, function: Callable) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    limits = np.iinfo(integer(t))
    return lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max)


def truncated_division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b toward zero; a zero divisor gives all ones."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient.astype(a.dtype))


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - truncated_division(a, b) * b).astype(a.dtype)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    return np.array([a.dtype.itemsize * 8 - int(x).bit_length() for x in a], np.uint32)


def highest_bit(t: str) -> Callable[[np.ndarray], np.ndarray]:
    """Position of the most significant bit that is not the sign, 0xFFFFFFFF for none (bfind)."""
    return lambda a: np.array([(int(x) if x >= 0 else ~int(x)).bit_length() - 1 for x in a], np.int64).astype(np.uint32)


def reversed_bits(a: np.ndarray) -> np.ndarray:
    size = a.dtype.itemsize * 8
    return np.array([int(f"{int(x):0{size}b}"[::-1], 2) for x in a], a.dtype)


def extract(t: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """bfe: c bits of a from position b, sign-extended for signed types."""

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        first, count, size = b & 0xFF, c & 0xFF, width(t)
        bits = a.view(UNSIGNED[size]).astype(np.uint64)
        field = np.where(first < size, bits >> np.minimum(first, 63).astype(np.uint64), 0).astype(np.uint64)
        mask = np.where(count >= size, ~np.uint64(0), (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - 1)
        field = field & mask.astype(np.uint64)
        top = np.minimum(first + count - 1, size - 1).astype(np.uint64)
        negative = (t[0] == "s") & (count > 0) & ((bits >> top) & np.uint64(1) == 1)
        return np.where(negative, field | ~mask, field).astype(UNSIGNED[size]).view(a.dtype)

    return compute


def insert(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """bfi: b with its d bits from position c replaced by the lowest of a."""
    size = a.dtype.itemsize * 8
    first, count = (c & 0xFF).astype(np.uint64), (d & 0xFF).astype(np.uint64)
    ones = np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, 63)) - np.uint64(1))
    mask = np.where(first < size, ones << np.minimum(first, 63), 0).astype(a.dtype)
    return ((a.astype(np.uint64) << np.minimum(first, 63)).astype(a.dtype) & mask) | (b & ~mask)


def dot4(ta: str, tb: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(a).view(integer(ta[0] + "8")).reshape(-1, 4).astype(np.int64)
        y = np.ascontiguousarray(b).view(integer(tb[0] + "8")).reshape(-1, 4).astype(np.int64)
        return (x * y).sum(1) + c

    return compute


BINARY = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "mul": np.multiply}

pure(rf"(?P<op>add|sub|min|max)\.{INT}", "9.7.1.1 add, ...", lambda op, t: Pure(t, (t, t), BINARY[op]))
pure(r"(?P<op>add|sub)\.sat\.s32", "9.7.1.1", lambda op: Pure("s32", ("s32", "s32"), saturated("s32", BINARY[op])))
pure(rf"mul\.(?P<h>lo|hi)\.{INT}", "9.7.1.3 mul", lambda h, t: Pure(t, (t, t), low_or_high(h, t)))
pure(
    r"mul\.wide\.(?P<t>[us](?:16|32))",
    "9.7.1.3 mul",
    lambda t: Pure(wide(t), (t, t), lambda a, b: a.astype(integer(wide(t))) * b.astype(integer(wide(t)))),
)
pure(
    rf"mad\.(?P<h>lo|hi)\.{INT}",
    "9.7.1.4 mad",
    lambda h, t: Pure(t, (t, t, t), lambda a, b, c: low_or_high(h, t)(a, b).astype(integer(t)) + c),
)
pure(
    r"mad\.wide\.(?P<t>[us](?:16|32))",
    "9.7.1.4 mad",
    lambda t: Pure(
        wide(t), (t, t, wide(t)), lambda a, b, c: a.astype(integer(wide(t))) * b.astype(integer(wide(t))) + c
    ),
)
pure(rf"div\.{INT}", "9.7.1.8 div", lambda t: Pure(t, (t, t), truncated_division))
pure(rf"rem\.{INT}", "9.7.1.9 rem", lambda t: Pure(t, (t, t), remainder))
pure(r"abs\.(?P<t>s(?:16|32|64))", "9.7.1.10 abs", lambda t: Pure(t, (t,), np.abs))
pure(r"neg\.(?P<t>s(?:16|32|64))", "9.7.1.11 neg", lambda t: Pure(t, (t,), np.negative))
pure(r"popc\.(?P<t>b32|b64)", "9.7.1.14 popc", lambda t: Pure("u32", (t,), np.bitwise_count))
pure(r"clz\.(?P<t>b32|b64)", "9.7.1.15 clz", lambda t: Pure("u32", (t,), leading_zeros))
pure(r"bfind\.(?P<t>[us](?:32|64))", "9.7.1.16 bfind", lambda t: Pure("u32", (t,), highest_bit(t)))
pure(r"brev\.(?P<t>b32|b64)", "9.7.1.18 brev", lambda t: Pure(t, (t,), reversed_bits))
pure(r"bfe\.(?P<t>[us](?:32|64))", "9.7.1.19 bfe", lambda t: Pure(t, (t, "u32", "u32"), extract(t)))
pure(r"bfi\.(?P<t>b32|b64)", "9.7.1.20 bfi", lambda t: Pure(t, (t, t, "u32", "u32"), insert))
pure(
    r"dp4a\.(?P<ta>[us]32)\.(?P<tb>[us]32)",
    "9.7.1.23 dp4a",
    lambda ta, tb: Pure("s32" if "s" in ta + tb else "u32", (ta, tb, "s32" if "s" in ta + tb else "u32"), dot4(ta, tb)),
)


# 9.7.8 Logic and shift


def shifted(t: str, left: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Shifts by the width or more give 0, or the sign."""
    size = width(t)

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        amount = np.minimum(b, size - 1).astype(a.dtype)
        if left:
            return np.where(b >= size, 0, a << amount).astype(a.dtype)
        return np.where((b >= size) & (t[0] != "s"), 0, a >> amount).astype(a.dtype)

    return compute


def funnel(left: bool, clamp: bool) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        amount = (np.minimum(c, 32) if clamp else c & 31).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)

    return compute


def lookup3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: any function of three bits, given as its truth table."""
    result = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> np.uint32(i) & 1, term, 0).astype(a.dtype)
    return result


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is any of the eight bytes of a and b, or its sign repeated."""
    source = np.stack([a, b], 1).view(np.uint8).reshape(-1, 8)
    result = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & 0xF
        byte = source[np.arange(len(a)), nibble & 7]
        result[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return result.view(np.uint32)[:, 0]


LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

pure(rf"(?P<op>and|or|xor)\.{BITS}", "9.7.8.1 and, ...", lambda op, t: Pure(t, (t, t), LOGIC[op]))
pure(rf"not\.{BITS}", "9.7.8.4 not", lambda t: Pure(t, (t,), np.invert))
pure(r"cnot\.(?P<t>b(?:16|32|64))", "9.7.8.5 cnot", lambda t: Pure(t, (t,), lambda a: (a == 0).astype(a.dtype)))
pure(r"lop3\.b32", "9.7.8.6 lop3", lambda: Pure("b32", ("b32",) * 4, lookup3))
pure(r"shl\.(?P<t>b(?:16|32|64))", "9.7.8.8 shl", lambda t: Pure(t, (t, "u32"), shifted(t, left=True)))
pure(r"shr\.(?P<t>[bus](?:16|32|64))", "9.7.8.9 shr", lambda t: Pure(t, (t, "u32"), shifted(t, left=False)))
pure(
    r"shf\.(?P<d>[lr])\.(?P<m>wrap|clamp)\.b32",
    "9.7.8.7 shf",
    lambda d, m: Pure("b32", ("b32", "b32", "u32"), funnel(d == "l", m == "clamp")),
)
pure(r"prmt\.b32", "9.7.9.7 prmt", lambda: Pure("b32", ("b32",) * 3, permuted))


# 9.7.3, 9.7.4, 9.7.5 Floating point, half precision


def flushing(function: Callable, t: str, ftz: str | None, sat: str | None = None) -> Callable[..., np.ndarray]:
    """The function with subnormal numbers taken for zero (.ftz), or its result clamped to [0, 1] (.sat)."""

    def flush(a: np.ndarray) -> np.ndarray:
        return np.where(np.abs(a) < FLUSHED[t], np.copysign(0, a), a).astype(a.dtype) if ftz else a

    def compute(*sources: np.ndarray) -> np.ndarray:
        result = flush(function(*(flush(a) for a in sources)))
        return np.where(np.isnan(result), 0, np.clip(result, 0, 1)) if sat else result

    return compute


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def rectified(function: Callable) -> Callable[..., np.ndarray]:
    return lambda *sources: np.maximum(function(*sources), 0)


FLOAT_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
MINMAX = {("min", None): np.fmin, ("max", None): np.fmax, ("min", ".NaN"): np.minimum, ("max", ".NaN"): np.maximum}
APPROXIMATE: dict[str, Callable] = {
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def in_double(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: function(a.astype(np.float64))


pure(
    r"(?P<op>add|sub|mul)(?:\.rn)?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<t>f16x2|bf16x2|f16|bf16|f32|f64)",
    "9.7.3.3 add, 9.7.4.1 add, ...",
    lambda op, sat, ftz, t: Pure(t, (t, t), flushing(FLOAT_BINARY[op], t, ftz, sat)),
)
pure(
    r"fma\.rn(?P<ftz>\.ftz)?(?P<sat>\.sat)?(?P<relu>\.relu)?\.(?P<t>f16x2|bf16x2|f16|bf16|f32|f64)",
    "9.7.3.6 fma, 9.7.4.4 fma",
    lambda ftz, sat, relu, t: Pure(t, (t, t, t), flushing(rectified(fused) if relu else fused, t, ftz, sat)),
)
pure(
    r"div(?:\.rn|\.approx|\.full)(?P<ftz>\.ftz)?\.(?P<t>f32|f64)",
    "9.7.3.8 div",
    lambda ftz, t: Pure(t, (t, t), flushing(np.divide, t, ftz)),
)
pure(rf"abs{FLOAT}", "9.7.3.9 abs", lambda ftz, t: Pure(t, (t,), flushing(np.abs, t, ftz)))
pure(rf"neg{FLOAT}", "9.7.3.10 neg", lambda ftz, t: Pure(t, (t,), flushing(np.negative, t, ftz)))
pure(
    r"(?P<op>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.(?P<t>f16x2|bf16x2|f16|bf16|f32|f64)",
    "9.7.3.11 min, ...",
    lambda op, ftz, nan, t: Pure(t, (t, t), flushing(MINMAX[op, nan], t, ftz)),
)
pure(
    r"(?P<op>rcp|sqrt|rsqrt|sin|cos|lg2|ex2|tanh)(?:\.approx|\.rn)?(?P<ftz>\.ftz)?"
    r"\.(?P<t>f16x2|bf16x2|f16|bf16|f32|f64)",
    "9.7.3.13 rcp, ... 9.7.3.22 tanh, 9.7.4.10 ex2",
    lambda op, ftz, t: Pure(t, (t,), flushing(in_double(APPROXIMATE[op]), t, ftz)),
)
pure(r"copysign\.(?P<t>f32|f64)", "9.7.3.2 copysign", lambda t: Pure(t, (t, t), lambda a, b: np.copysign(b, a)))
TESTS: dict[str, Callable] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
}
pure(
    r"testp\.(?P<op>finite|infinite|number|notanumber)\.(?P<t>f32|f64)",
    "9.7.3.1 testp",
    lambda op, t: Pure("pred", (t,), TESTS[op]),
)


# 9.7.6, 9.7.7 Comparison and selection

ORDERED: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMPARE = r"(?P<c>eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"


def comparison(c: str, t: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """With a NaN, xxu is true, num false, nan true and the rest false (even ne)."""

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not is_float(t):
            return ORDERED[c](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if c in ("num", "nan"):
            return unordered if c == "nan" else ~unordered
        if c.endswith("u") and c[:-1] in ORDERED:
            return ORDERED[c[:-1]](a, b) | unordered
        return ORDERED[c](a, b) & ~unordered

    return compute


@effect(
    rf"setp\.{COMPARE}(?:\.(?P<logic>and|or|xor))?(?:\.ftz)?\.(?P<t>[bus](?:16|32|64)|f16x2|bf16x2|f16|bf16|f32|f64)",
    "9.7.6.2 setp",
)
def setp(machine: Machine, instruction: Instruction, c: str, logic: str | None, t: str) -> Execute:
    """p|q = (a c b) logic r: q has the negated comparison; for x2 types, p is the low half's and q the high half's."""
    destination, *sources = instruction.operands
    a, b = (machine.reader(source, t) for source in sources[:2])
    r = machine.reader(sources[2], "pred") if logic else None
    first = destination.first if isinstance(destination, Pair) else destination
    write_first = machine.writer(first, "pred")
    write_second = machine.writer(destination.second if isinstance(destination, Pair) else None, "pred")
    compare = comparison(c, t)

    def execute(mask: np.ndarray) -> None:
        result = compare(a(), b())
        p, q = (result[:, 0], result[:, 1]) if t.endswith("x2") else (result, ~result)
        if logic and r:
            p, q = LOGIC[logic](p, r()), LOGIC[logic](q, r())
        write_first(p, mask)
        write_second(q, mask)

    return execute


pure(
    rf"set\.{COMPARE}(?:\.ftz)?\.(?P<d>[us]32|f32)\.(?P<t>[bus](?:16|32|64)|f16|bf16|f32|f64)",
    "9.7.6.1 set",
    lambda c, d, t: Pure(d, (t, t), lambda a, b: np.where(comparison(c, t)(a, b), 1 if d == "f32" else -1, 0)),
)
pure(
    rf"set\.{COMPARE}\.(?P<t>f16x2|bf16x2)\.(?P=t)",
    "9.7.7.1 set",
    lambda c, t: Pure(t, (t, t), lambda a, b: np.where(comparison(c, t)(a, b), 1.0, 0.0)),
)
pure(
    r"selp\.(?P<t>[bus](?:16|32|64)|f32|f64)",
    "9.7.6.3 selp",
    lambda t: Pure(f"b{width(t)}", (f"b{width(t)}",) * 2 + ("pred",), lambda a, b, p: np.where(p, a, b)),
)
pure(
    r"slct(?:\.ftz)?\.(?P<t>[bus](?:16|32|64)|f32|f64)\.(?P<c>s32|f32)",
    "9.7.6.4 slct",
    lambda t, c: Pure(f"b{width(t)}", (f"b{width(t)}",) * 2 + (c,), lambda a, b, s: np.where(s >= 0, a, b)),
)
