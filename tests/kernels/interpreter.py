"""Triton's interpreter, mended where it is wrong, and checked where it is lenient. Import it before kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import triton.language as tl
from sparsenlp_kernels.launch import Launch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """10 bits of fraction, nearest, ties away from zero, as cvt.rna.tf32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@contextmanager
def mended() -> Iterator[None]:
    """tl.dot of bfloat16 by value (the interpreter multiplies its bit patterns), of int8 in int32, of TF32 rounded."""

    def dot(builder, a, b, accumulator, input_precision, max_imprecise):
        def values(handle):
            if handle.dtype.scalar == tl.bfloat16:
                return from_bfloat16(handle.data)
            if handle.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
                return to_tf32(handle.data)
            return handle.data

        total = np.matmul(values(a), values(b), dtype=accumulator.data.dtype) + accumulator.data
        return TensorHandle(total, accumulator.dtype.scalar)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@contextmanager
def bounds_checked() -> Iterator[None]:
    """Refuse loads and stores outside the tensors of the launch, which might go unnoticed."""
    extents: list[tuple[int, int]] = []
    run, load, store = Launch.run, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_run(launch) -> None:
        extents[:] = [extent(argument) for argument in launch.arguments if isinstance(argument, Tensor)]
        run(launch)

    def check(pointers: np.ndarray, mask: np.ndarray) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape)]
        inside = [(start <= used) & (used < end) for start, end in extents]
        assert np.logical_or.reduce(inside).all(), "access outside the tensors"

    def checked_load(builder, pointers, mask, *rest):
        check(pointers.data, mask.data)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder, pointers, value, mask, *rest):
        check(pointers.data, mask.data)
        return store(builder, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Launch, "run", checked_run)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        yield


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)
