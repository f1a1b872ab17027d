"""What pruned classifiers are meant to reach, checked against what bench/accuracy.py measured.

"At equal latency" compares two families, each a line of models from slow to fast: the value of ours, between two
of its models on the logarithm of time, at the time of each of the rival's models. Time is over the dense model's,
the geometric mean of all settings. KL to the dense model is less noisy than accuracy, so both are judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import exp, log
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]

RECIPE, UNSTRUCTURED, LAYERS = "8x1-taylor-global", "unstructured-taylor-global", "layers"
UNIFORM, ALLOCATED = "8x1-taylor-local", "8x1-allocated"

MOST_POINTS_LOST = {
    ("rotten_tomatoes", f"{RECIPE}-80"): 0.7,
    ("rotten_tomatoes", f"{RECIPE}-90"): 1.2,
    ("rotten_tomatoes", f"{RECIPE}-95"): 4.0,
    ("supersense", f"{RECIPE}-90"): 3.0,
}
MOST_CPU_SECONDS = {("rotten_tomatoes", f"{RECIPE}-90"): 8 * 60.0}
RIVALS = (
    (RECIPE, UNSTRUCTURED, ("kl", "accuracy")),
    (RECIPE, LAYERS, ("kl", "accuracy")),
    (ALLOCATED, UNIFORM, ("kl",)),
)


def summarize(results: Sequence[Row]) -> list[Row]:
    """A row for each task and label, with mean and spread (standard deviation, None for one seed) over its seeds.

    lost   points of accuracy below the dense model of the same seed
    time   over the dense model's, None where no latency was measured
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results:
        groups.setdefault((row["task"], row["label"]), []).append(row)
    dense = {(row["task"], row["seed"]): row["accuracy"] for row in results if row["family"] == "dense"}
    rows = []
    for (task, label), cells in groups.items():
        lost = [100 * (dense[task, cell["seed"]] - cell["accuracy"]) for cell in cells]
        times = [relative_time(cell["latency"]) for cell in cells if cell["latency"]]
        rows.append(
            {
                "task": task,
                "label": label,
                "family": cells[0]["family"],
                "seeds": [cell["seed"] for cell in cells],
                "majority": fmean(cell["majority"] for cell in cells),
                "sparsity": fmean(cell["sparsity"] for cell in cells),
                **{
                    key: spread([cell[key] for cell in cells]) for key in ("accuracy", "agreement", "kl", "cpu_seconds")
                },
                "lost": spread(lost),
                "time": spread(times) if times else None,
                "most_cpu_seconds": max(cell["cpu_seconds"] for cell in cells),
            }
        )
    return rows


def on_common_seeds(results: Sequence[Row]) -> list[Row]:
    """Those whose seed every model of their task has: a seed also draws the test texts, which may be easier or not.

    All of a task where its models have no seed in common.
    """
    seeds: dict[str, dict[str, set[int]]] = {}
    for row in results:
        seeds.setdefault(row["task"], {}).setdefault(row["label"], set()).add(row["seed"])
    common = {task: set.intersection(*own.values()) for task, own in seeds.items()}
    return [row for row in results if not common[row["task"]] or row["seed"] in common[row["task"]]]


def spread(values: Sequence[float]) -> Row:
    return {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else None}


def relative_time(latency: Row) -> float:
    """Geometric mean over the settings of the time over the dense model's."""
    return exp(fmean(log(cell["over_dense"]["median"]) for cell in latency["settings"].values()))


def judge(
    summary: Sequence[Row], seeds: int, models: Mapping[str, int], compared: Sequence[Row] | None = None
) -> list[Row]:
    """A row for each target.

    compared the summary that rivals are compared on, that of their common seeds; None for `summary`
    seeds    how many of each model there are to be
    models   family -> how many models of it there are to be for each task
    returns  rows whose `reached` is None where cells or latencies are missing
    """
    rows = {(row["task"], row["label"]): row for row in summary}
    judged = []
    for (task, label), bound in MOST_POINTS_LOST.items():
        row = rows.get((task, label))
        value = row["lost"]["mean"] if row else None
        judged.append(_at_most(f"{task} {label}, points lost", value, bound, row, seeds))
    for (task, label), bound in MOST_CPU_SECONDS.items():
        row = rows.get((task, label))
        value = row["most_cpu_seconds"] if row else None
        judged.append(_at_most(f"{task} {label}, CPU seconds of the recipe, longest", value, bound, row, seeds))
    for task in dict.fromkeys(task for task, _ in MOST_POINTS_LOST):
        for ours, rival, keys in RIVALS:
            judged += [_against(compared or summary, task, ours, rival, key, seeds, models) for key in keys]
    return judged


def _at_most(title: str, value: float | None, bound: float, row: Row | None, seeds: int) -> Row:
    enough = row is not None and len(row["seeds"]) >= seeds
    count = len(row["seeds"]) if row is not None else 0
    reached = value <= bound if enough and value is not None else None
    return {"title": title, "value": value, "target": f"≤ {bound:g}", "reached": reached, "note": f"seeds: {count}"}


def _against(
    summary: Sequence[Row], task: str, ours: str, rival: str, key: str, seeds: int, models: Mapping[str, int]
) -> Row:
    """The least advantage of ours over the rival's models, in nats of KL or points of accuracy."""
    sign = -1.0 if key == "kl" else 100.0
    line = [(row["time"]["mean"], row[key]["mean"]) for row in _timed(summary, task, ours)]
    gains = []
    for row in _timed(summary, task, rival):
        value = at_time(line, row["time"]["mean"])
        if value is not None:
            gains.append((sign * (value - row[key]["mean"]), row["label"], row["time"]["mean"]))
    rows = {family: [*_timed(summary, task, family)] for family in (ours, rival)}
    complete = all(len(found) >= models.get(family, 0) for family, found in rows.items())
    complete = complete and all(len(row["seeds"]) >= seeds for found in rows.values() for row in found)
    least = min(gains, default=None)
    note = "not comparable yet" if least is None else f"against {least[1]} at {least[2]:.2f} of the dense model's time"
    unit = "nats of KL" if key == "kl" else "points"
    return {
        "title": f"{task}, {ours} over {rival} at equal latency, least gain in {unit}",
        "value": least[0] if least else None,
        "target": "> 0",
        "reached": least[0] > 0 if complete and least else None,
        "note": f"{note}, {len(gains)} of the rival's models",
    }


def _timed(summary: Sequence[Row], task: str, family: str) -> Iterator[Row]:
    return (row for row in summary if row["task"] == task and row["family"] == family and row["time"] is not None)


def at_time(line: Sequence[tuple[float, float]], time: float) -> float | None:
    """Value of a line of (time, value) at a time, between neighbours on the logarithm of time.

    Beyond its slowest model that one counts, which is faster still; before its fastest there is none.
    """
    points = sorted(line)
    if not points or time < points[0][0]:
        return None
    for (t0, v0), (t1, v1) in pairwise(points):
        if time <= t1:
            share = log(time / t0) / log(t1 / t0)
            return v0 + share * (v1 - v0)
    return points[-1][1]
