"""The C++ extension: whether it is there, which instruction set it runs, and why not."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ISA_VARIABLE = "SPARSENLP_CPU_ISA"


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("sparsenlp._C"), ""
    except ImportError as error:
        if error.name == "sparsenlp._C":
            return None, "the extension sparsenlp._C was not built (SPARSENLP_NATIVE=0, or no C++ compiler)"
        return None, f"the extension sparsenlp._C does not load: {error}"


_C, why_unavailable = _load()
available = _C is not None


def isas() -> list[str]:
    """Instruction sets that were compiled in and that this CPU and OS support, best first."""
    return list(_C.isas()) if _C is not None else []


def kernels() -> dict[str, list[str]]:
    """{"op.dtype": instruction sets with a kernel of their own that this CPU runs, best first}."""
    return dict(_C.kernels()) if _C is not None else {}


def isa() -> str | None:
    """The instruction set the kernels run on now, None without the extension."""
    return _C.isa() if _C is not None else None


@functools.cache
def fingerprint() -> str | None:
    """16 hexadecimal digits of the extension's file, which a rebuilt kernel changes; None without the extension."""
    if _C is None or _C.__file__ is None:
        return None
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16]


def set_isa_cap(name: str | None) -> None:
    """Use the best supported instruction set that is no better than `name`; None lifts the cap.

    Raises ValueError for a name that is unknown, whatever this machine supports.
    """
    if _C is not None:
        _C.set_isa_cap(name)


def fma_peak(rounds: int) -> int:
    """Run `rounds` rounds of independent float32 FMAs on this thread, and return the operations done.

    Timed by the caller, it gives the peak that kernels are judged by. Raises RuntimeError without the extension.
    """
    if _C is None:
        raise RuntimeError(f"fma_peak: {why_unavailable}")
    return int(_C.fma_peak(rounds))


@contextmanager
def isa_cap(name: str | None) -> Iterator[None]:
    """`set_isa_cap` for the length of a `with` block; for tests and benchmarks, the cap is per process."""
    before = isa()
    set_isa_cap(name)
    try:
        yield
    finally:
        set_isa_cap(before)


set_isa_cap(os.environ.get(ISA_VARIABLE) or None)
