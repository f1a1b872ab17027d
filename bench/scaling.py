"""How the cost of bsr_linear grows: with tokens, with few tokens, and with nonzeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from candidates import DEFAULT_BLOCKS, Candidate
from harness import OWN_DENSE, warmed

from sparsenlp.measure import interleave

Row = dict[str, Any]

SHAPE = (3072, 768)  # (N, K)
SPARSITY, TOKENS = 0.9, 128  # of the points along the other axis


def measure_scaling(
    tokens: tuple[int, ...], few: tuple[int, ...], sparsities: tuple[float, ...], seconds: float
) -> list[Row]:
    """A row for each point; the points of one axis and all dtypes are interleaved, on torch's threads.

    tokens, few   numbers of tokens at 90 % zeros
    sparsities    at 128 tokens
    seconds       for each of the three axes
    """
    axes = {
        "tokens": [(m, SPARSITY) for m in tokens],
        "few tokens": [(m, SPARSITY) for m in few],
        "nonzeros": [(TOKENS, sparsity) for sparsity in sparsities],
    }
    rows: list[Row] = []
    for axis, points in axes.items():
        steps, about = {}, {}
        for dtype, block in DEFAULT_BLOCKS.items():
            for m, sparsity in points:
                step, weight = Candidate(dtype, block, sparsity).prepare(SHAPE, m)
                name = f"{dtype} {m} {sparsity}"
                steps[name] = step
                about[name] = {"axis": axis, "dtype": dtype, "tokens": m, "nonzeros": weight.values.numel()}
        timings = interleave(warmed(steps), seconds)
        extra = {"shape": list(SHAPE), "threads": torch.get_num_threads()}
        rows += [
            about[name] | extra | {"seconds": timing.as_dict()} for name, timing in timings.items() if name in about
        ]
    return rows


def exponents(rows: list[Row]) -> list[Row]:
    """How time grows along "tokens" and "nonzeros": the slope of log(time) over log(size), for each dtype.

    1 is linear; a cost beside the products, such as packing x, makes it less. worst is the highest ratio
    of time per token (or nonzero) to that of the largest size: above 1 means the small ones cost more.
    """
    found = []
    for threads in sorted({row["threads"] for row in rows}):
        for axis in ("tokens", "nonzeros"):
            for dtype in OWN_DENSE:
                key = (threads, axis, dtype)
                line = [r for r in rows if (r["threads"], r["axis"], r["dtype"]) == key]
                if len(line) > 1:
                    found.append({"axis": axis, "dtype": dtype, "threads": threads, **fit(line, axis)})
    return found


def fit(line: list[Row], axis: str) -> Mapping[str, float]:
    sizes = np.array([row[axis] for row in line], dtype=float)
    times = np.array([row["seconds"]["median"] for row in line])
    unit = times / sizes
    return {
        "exponent": float(np.polyfit(np.log(sizes), np.log(times), 1)[0]),
        "worst": float(unit.max() / unit[sizes.argmax()]),
    }
