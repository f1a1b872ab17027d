"""What bsr_linear is meant to reach, checked against the rows that bench/bsr_linear.py measured.

The speed targets are for x86-64 with AVX-512, VNNI and BF16, for 768 -> 3072, 3072 -> 768 and 768 -> 768. A
target is reached if the worst cell that it covers reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from candidates import DEFAULT_BLOCKS
from harness import OWN_DENSE

Row = dict[str, Any]
Value = Callable[[Row], float | None]

SPARSITIES = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Target:
    """`value` of every row that `covers` selects is at least (or at most) `bound`."""

    title: str
    sparsity: float
    covers: Callable[[Row], bool]
    value: Value
    bound: float
    at_least: bool = True
    form: str = "{:.1f}"

    def reached(self, values: list[float]) -> bool:
        return min(values) >= self.bound if self.at_least else max(values) <= self.bound


def over(baseline: str) -> Value:
    """Times as fast as a baseline."""
    return lambda row: row["speedup"].get(baseline)


def share(row: Row) -> float | None:
    return row["share_of_limit"]


def relative(row: Row) -> float | None:
    return row["time_over_default_block"]


def seconds(row: Row) -> float:
    return row["seconds"]["median"]


def covering(part: str, dtype: str, block: str, tokens: Callable[[int], bool], sparsity: float, isa: str = "") -> Any:
    """Selects rows; `isa` is "" for the best there is."""
    wanted = (part, dtype, block, sparsity, isa)
    return lambda r: (r["part"], r["dtype"], r["block"], r["sparsity"], r["isa_cap"]) == wanted and tokens(r["tokens"])


def block_name(dtype: str) -> str:
    return "{}x{}".format(*DEFAULT_BLOCKS[dtype])


def targets() -> Iterator[Target]:
    """The whole table."""
    for title, dtypes, tokens, bounds in (
        ("M >= 128", ("f32",), range(128, 1 << 20), (4.3, 9.5, 18, 29)),
        ("M >= 128", ("bf16",), range(128, 1 << 20), (2.3, 5.2, 9, 14)),
        ("M >= 128, quantizing included", ("int8",), range(128, 1 << 20), (2.3, 4.3, 5.8, 6.5)),
        ("M = 16", tuple(DEFAULT_BLOCKS), (16,), (3.2, 7, 10, 14)),
        ("M = 1, cold", tuple(DEFAULT_BLOCKS), (1,), (4, 9, 18, 30)),
    ):
        for dtype in dtypes:
            block = block_name(dtype)
            for sparsity, bound in zip(SPARSITIES, bounds, strict=True):
                if dtype == "int8" and tokens == (1,):
                    bound = min(bound, 11)
                yield Target(
                    f"{dtype} {block}, {title}, x {OWN_DENSE[dtype]}",
                    sparsity,
                    covering("targets", dtype, block, tokens.__contains__, sparsity),
                    over(OWN_DENSE[dtype]),
                    bound,
                )
    yield from share_targets()
    yield from block_targets()


def share_targets() -> Iterator[Target]:
    for sparsity, bound in ((0.5, 0.80), (0.9, 0.65)):
        covers = covering("targets", "f32", "8x1", range(128, 1 << 20).__contains__, sparsity)
        yield Target("f32 8x1, M >= 128, share of FMA peak", sparsity, covers, share, bound, form="{:.0%}")
    for dtype in DEFAULT_BLOCKS:
        for sparsity in (0.5, 0.8):
            covers = covering("targets", dtype, block_name(dtype), (1).__eq__, sparsity)
            title = f"{dtype} {block_name(dtype)}, M = 1, cold, share of read bandwidth"
            yield Target(title, sparsity, covers, share, 0.85, form="{:.0%}")


def block_targets() -> Iterator[Target]:
    unstructured = covering("blocks", "f32", "1x1", (128).__eq__, 0.9)
    yield Target("f32 1x1, M = 128, x torch bf16", 0.9, unstructured, over("torch bf16"), 1)
    two_threads: Callable[[Row], bool] = lambda row: row["threads"] == 2 and unstructured(row)  # noqa: E731
    yield Target("f32 1x1, M = 128, ms", 0.9, two_threads, lambda r: 1e3 * seconds(r), 0.62, False, "{:.2f}")
    for block, bound in (("4x1", 1.25), ("16x16", 1.0), ("32x32", 1.0)):
        for sparsity in (0.5, 0.9):
            covers = covering("blocks", "f32", block, range(128, 1 << 20).__contains__, sparsity)
            yield Target(f"f32 {block}, M >= 128, time over 8x1", sparsity, covers, relative, bound, False, "{:.2f}")
    avx2 = covering("blocks", "f32", "8x1", range(128, 1 << 20).__contains__, 0.9, "avx2")
    yield Target("f32 8x1 on AVX2, M >= 128, x torch fp32", 0.9, avx2, over("torch fp32"), 8)


def judge(results: list[Row]) -> list[Row]:
    """One row for each target and number of threads that `results` has cells for."""
    judged = []
    candidates = [row for row in results if row["dtype"]]
    for target in targets():
        for threads in sorted({row["threads"] for row in candidates}):
            covered = [row for row in candidates if row["threads"] == threads and target.covers(row)]
            values = [value for row in covered if (value := target.value(row)) is not None]
            if values:
                judged.append(
                    {
                        "title": target.title,
                        "sparsity": target.sparsity,
                        "threads": threads,
                        "cells": len(values),
                        "min": min(values),
                        "max": max(values),
                        "target": target.bound,
                        "at_least": target.at_least,
                        "form": target.form,
                        "reached": target.reached(values),
                    }
                )
    return judged
