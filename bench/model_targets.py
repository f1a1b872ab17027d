"""What whole models are meant to reach, checked against what bench/end_to_end.py measured.

Bounds are for 2 threads; the same are printed for other numbers of threads. A bound on time is a ratio to another
engine in the same run; what that engine is missing for is said in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

LARGER_SETTINGS = ((16, 128), (1, 384))
"""(batch, tokens) at which the ratios of batch 1 and 128 tokens hold within MARGIN."""

MARGIN = 1.15
LARGEST_OVERHEAD = 0.03
LARGEST_MEMORY = 0.35


@dataclass(frozen=True)
class Target:
    """Our time over that of a rival is at most `bound`.

    precision  of ours, or "any" for the fastest
    rival      name of an engine, or "dense" and a precision (or "any"): the fastest that gains nothing from zeros
    """

    model: str
    batch: int
    tokens: int
    precision: str
    zeros: float
    rival: str
    bound: float

    @property
    def title(self) -> str:
        rival = f"best {self.rival}" if self.rival.startswith("dense") else self.rival
        ours = "best of ours" if self.precision == "any" else self.precision
        return f"{self.model} {self.batch} x {self.tokens}, {ours} {self.zeros:.0%}, time over {rival}"


def targets() -> Iterator[Target]:
    """Every bound on time."""
    for (batch, tokens), margin in (((1, 128), 1.0), *((larger, MARGIN) for larger in LARGER_SETTINGS)):
        for precision, zeros, rival, bound in (
            ("fp32", 0.9, "deepsparse fp32 90%", 0.5),
            ("fp32", 0.9, "dense fp32", 0.2),
            ("fp32", 0.8, "deepsparse fp32 80%", 0.55),
            ("bf16", 0.9, "deepsparse int8 90%", 0.6),
            ("bf16", 0.9, "dense bf16", 0.25),
            ("int8", 0.9, "deepsparse int8 90%", 0.55),
            ("int8", 0.9, "dense int8", 0.35),
        ):
            yield Target("BERT-base", batch, tokens, precision, zeros, rival, round(bound * margin, 4))
    yield Target("MiniLM-L6", 1, 32, "any", 0.9, "dense any", 0.2)


def judge(results: list[Row]) -> list[Row]:
    """A row for each target and number of threads that was to be measured; `reached` is None without its rival."""
    judged = []
    for target in targets():
        key = (target.model, target.batch, target.tokens, False)
        for threads in sorted({row["threads"] for row in results}, reverse=True):
            cell = [r for r in results if (r["model"], r["batch"], r["tokens"], r["ragged"]) == key]
            cell = [row for row in cell if row["threads"] == threads]
            if any(row["ours"] and row["zeros"] == target.zeros for row in cell):
                judged.append(judge_cell(target, cell) | {"threads": threads})
    return judged


def judge_cell(target: Target, cell: list[Row]) -> Row:
    ours = [row for row in cell if row["ours"] and row["zeros"] == target.zeros]
    ours = [row for row in ours if target.precision in (row["precision"], "any")]
    own = min((row for row in ours if "seconds" in row), key=lambda row: row["seconds"]["median"], default=None)
    kind, _, precision = target.rival.partition(" ")
    name = cell[0]["best_dense"].get(precision) if kind == "dense" else target.rival
    rival = next((row for row in cell if row["name"] == name and "seconds" in row), None)
    value = own["time_over"][rival["name"]] if own is not None and rival is not None else None
    return {
        "title": target.title,
        "ours": 1e3 * own["seconds"]["median"] if own is not None else None,
        "rival": 1e3 * rival["seconds"]["median"] if rival is not None else None,
        "against": rival["name"] if rival is not None else f"{target.rival}: not timed",
        "value": value,
        "target": target.bound,
        "reached": False if own is None and ours else None if value is None else value <= target.bound,
    }


def judge_overhead(breakdowns: list[Row]) -> list[Row]:
    """Of the time of calls without arithmetic, for each model that was taken apart."""
    return [
        {
            "title": f"{row['model']} 1 x 128, {row['precision']} {row['zeros']:.0%}, share of dispatch",
            "ours": 1e3 * row["dispatch"],
            "rival": 1e3 * row["forward"],
            "against": "the forward pass",
            "value": row["dispatch"] / row["forward"],
            "target": LARGEST_OVERHEAD,
            "reached": row["dispatch"] <= LARGEST_OVERHEAD * row["forward"],
            "threads": row["threads"],
        }
        for row in breakdowns
    ]


def judge_memory(footprints: list[Row]) -> list[Row]:
    """Of the peaks of memory (MB, without what imports take) against that of dense fp32."""
    dense = next((row for row in footprints if not row["ours"]), None)
    judged = []
    for row in footprints:
        if dense is not None and row["ours"]:
            ours, rival = (r["peak"] - r["base"] for r in (row, dense))
            judged.append(
                {
                    "title": f"{row['model']} 1 x 128, {row['precision']} {row['zeros']:.0%}, peak MB over dense",
                    "ours": ours / 1e6,
                    "rival": rival / 1e6,
                    "against": "torch eager fp32",
                    "value": ours / rival,
                    "target": LARGEST_MEMORY,
                    "reached": ours / rival <= LARGEST_MEMORY,
                    "threads": row["threads"],
                }
            )
    return judged
