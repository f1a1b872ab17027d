"""Triton's interpreter, mended where it is wrong and strict where it is lenient.

Run as a script with TRITON_INTERPRET=1 in the environment, it prints as JSON which mutations of kernel_cases.py the
interpreter catches. It must be a process of its own: Triton decides at import whether to interpret.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_cases import ROWS
from launches import extent
from mutants import import_mutant
from problems import PACKAGE, Problem, Row
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """10 bits of fraction, nearest, ties away from zero, as cvt.rna.tf32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@contextmanager
def mended() -> Iterator[None]:
    """tl.dot of bfloat16 by value (the interpreter multiplies its bit patterns), of TF32 with rounded operands."""

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
def bounds_checked(tensors: list[Tensor]) -> Iterator[None]:
    """Refuse loads and stores outside the tensors, which might go unnoticed."""
    extents = [extent(tensor) for tensor in tensors]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

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
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        yield


@contextmanager
def strict_launches() -> Iterator[None]:
    """Every Launch is mended and kept inside the tensors that it is given."""
    from sparsenlp_kernels.launch import Launch

    run = Launch.run

    def checked_run(launch: Launch) -> None:
        tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
        with mended(), bounds_checked(tensors):
            run(launch)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Launch, "run", checked_run)
        yield


def interpret(problem: Problem) -> None:
    """Run the launches in Triton's interpreter and check their results."""
    for launch in problem.launches:
        tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
        with mended(), bounds_checked(tensors):
            grid = launch.programs if isinstance(launch.programs, tuple) else (launch.programs,)
            launch.kernel[grid](*launch.arguments, **launch.constants, **launch.options)
    problem.check()


def why_it_fails(row: Row, package: str) -> str | None:
    """The first line of the error, None where the result is right."""
    try:
        interpret(row.small(package, "sm_80"))
    except (AssertionError, interpreter.InterpreterError) as error:
        return str(error).strip().splitlines()[0]
    return None


def main() -> None:
    torch.set_num_threads(1)
    caught: dict[str, dict[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in ROWS:
            caught[row.name] = {"": why_it_fails(row, PACKAGE)}
            for mutation in row.mutations:
                caught[row.name][mutation.name] = why_it_fails(row, import_mutant(mutation, Path(folder)))
    json.dump(caught, sys.stdout)


if __name__ == "__main__":
    main()
