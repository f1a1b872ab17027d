"""PTX types as numpy arrays.

A register holds unsigned integers of its width. `decode` turns them into numbers that numpy computes with:
integers of the type, float32 for f16, bf16, tf32 and f32, float64 for f64; the two halves of f16x2 and bf16x2
become a last axis, low half first. `encode` goes back and rounds to nearest even.
"""

from __future__ import annotations

import re

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


class PtxError(RuntimeError):
    """PTX that cannot be parsed, or a run that broke a rule of the PTX ISA."""


def width(kind: str) -> int:
    """Bits of a type: "f16x2" -> 32."""
    if kind == "pred":
        return 1
    if kind == "tf32":
        return 32
    match = re.fullmatch(r"(?:[usbf]|bf)(\d+)(x2)?", kind)
    if match is None:
        raise PtxError(f"type: expected one of PTX, got {kind}")
    return int(match[1]) * (2 if match[2] else 1)


def is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf", "tf"))


def integer(kind: str) -> type[np.integer]:
    """The numpy type of u8 to u64, s8 to s64, b8 to b64."""
    return (SIGNED if kind[0] == "s" else UNSIGNED)[width(kind)]


def decode(kind: str, bits: np.ndarray) -> np.ndarray:
    """Numbers of type `kind` from an array of the unsigned integers of its width."""
    if kind == "pred":
        return bits
    if kind in ("f32", "tf32"):
        return bits.view(np.float32)
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind.endswith("x2"):
        return decode(kind[:-2], halves(bits))
    return bits.view(integer(kind))


def encode(kind: str, values: np.ndarray) -> np.ndarray:
    """The inverse of decode."""
    if kind == "pred":
        return values.astype(bool, copy=False)
    if kind == "f32":
        return values.astype(np.float32, copy=False).view(np.uint32)
    if kind == "tf32":
        return round_tf32(values)
    if kind == "f64":
        return values.astype(np.float64, copy=False).view(np.uint64)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return round_bf16(values)
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(kind[:-2], values)).view(np.uint32)[..., 0]
    return values.astype(integer(kind), copy=False).view(UNSIGNED[width(kind)])


def halves(bits: np.ndarray) -> np.ndarray:
    """(..., 2) the 16-bit halves of 32-bit words, low half first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 nearest to each value, ties to even; NaN becomes 0x7FFF as on the GPU."""
    single = _round_to_odd(values)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """float64 -> float32 that later rounds as the float64 would: inexact results get an odd last bit."""
    single = values.astype(np.float32)
    if values.dtype != np.float64:
        return single
    inexact = np.isfinite(single) & (single != values)
    toward_zero = np.where(np.abs(single) > np.abs(values), np.nextafter(single, np.float32(0)), single)
    odd = (toward_zero.view(np.uint32) | np.uint32(1)).view(np.float32)
    return np.where(inexact, odd, single).astype(np.float32)


def round_tf32(values: np.ndarray) -> np.ndarray:
    """Bits of each value rounded to TF32 (10 bits of fraction), ties away from zero (cvt.rna)."""
    single = values.astype(np.float32, copy=False)
    rounded = (single.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(single), rounded, single.view(np.uint32) & np.uint32(0xFFFFE000)).astype(np.uint32)
