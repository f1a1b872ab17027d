"""What bench/accuracy.py prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accuracy_targets import ALLOCATED, LAYERS, RECIPE, UNIFORM, UNSTRUCTURED
from rich.console import Console
from rich.table import Table

from sparsenlp.measure import machine_line

Row = dict[str, Any]

COLORS = {RECIPE: "#c44e52", UNSTRUCTURED: "#4c72b0", LAYERS: "#8c8c8c", UNIFORM: "#dd8452", ALLOCATED: "#55a868"}
"""Of the families that are compared; others are black."""

WORDS = {True: "yes", False: "NO", None: "open"}


def show(record: dict[str, Any]) -> None:
    """Print a table for each task, then the targets, and what is missing."""
    console = Console(width=170)
    for task in dict.fromkeys(row["task"] for row in record["summary"]):
        console.print(task_table(task, record))
    console.print(targets_table(record["targets"]))
    if record["missing"]:
        count, planned = len(record["missing"]), record["planned"]
        console.print(f"partial: {count} of {planned} cells are missing, {record['missing'][0]} first", highlight=False)
    for reason in record["skipped"]:
        console.print(reason, highlight=False)


def task_table(task: str, record: dict[str, Any]) -> Table:
    """The cells of a task, mean ± spread over the seeds."""
    rows = [row for row in record["summary"] if row["task"] == task]
    majority = next(row["majority"] for row in rows)
    what = f"{task}: accuracy on test texts, mean ± standard deviation of the seeds"
    table = Table(title=f"{what}; always the majority: {majority:.1%}")
    table.add_column("model")
    latency = settings_of(record["results"])
    titles = ("seeds", "zeros", "accuracy %", "points lost", "agreement %", "KL to dense", "CPU seconds")
    for text in (*titles, *(f"{setting}, ms" for setting in latency), "time over dense"):
        table.add_column(text, justify="right")
    for row in rows:
        cells = [cell for cell in record["results"] if (cell["task"], cell["label"]) == (task, row["label"])]
        table.add_row(
            row["label"],
            str(len(row["seeds"])),
            f"{row['sparsity']:.1%}",
            plus_minus(row["accuracy"], 100, 1),
            plus_minus(row["lost"], 1, 1),
            plus_minus(row["agreement"], 100, 1),
            plus_minus(row["kl"], 1, 3),
            f"{row['cpu_seconds']['mean']:.0f}",
            *(milliseconds(cells, setting) for setting in latency),
            plus_minus(row["time"], 1, 2) if row["time"] else "-",
        )
    return table


def targets_table(targets: list[Row]) -> Table:
    reached = sum(row["reached"] is True for row in targets)
    table = Table(title=f"targets: {reached} of {len(targets)} reached")
    table.add_column("what")
    for text in ("measured", "target", "reached"):
        table.add_column(text, justify="right")
    table.add_column("note")
    for row in targets:
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        table.add_row(row["title"], value, row["target"], WORDS[row["reached"]], row["note"])
    return table


def plus_minus(value: Row, scale: float, digits: int) -> str:
    text = f"{scale * value['mean']:.{digits}f}"
    return text if value["spread"] is None else f"{text} ± {scale * value['spread']:.{digits}f}"


def settings_of(results: list[Row]) -> list[str]:
    """Inputs that latency was measured for."""
    return list(dict.fromkeys(setting for row in results if row["latency"] for setting in row["latency"]["settings"]))


def milliseconds(cells: list[Row], setting: str) -> str:
    """Mean over the seeds, "-" where none was measured."""
    found = [cell["latency"]["settings"][setting]["seconds"]["median"] for cell in cells if cell["latency"]]
    return f"{1e3 * sum(found) / len(found):.2f}" if found else "-"


def draw(record: dict[str, Any], path: Path) -> bool:
    """Accuracy and KL against time, a row of panels for each task; False where no latency was measured."""
    timed = [row for row in record["compared"] if row["time"] is not None]
    if not timed:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in timed))
    figure, axes = plt.subplots(len(tasks), 2, figsize=(11, 4.2 * len(tasks)), squeeze=False, layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        cells = [cell for cell in timed if cell["task"] == task]
        panel(row[0], cells, "accuracy", 100, "accuracy, %")
        panel(row[1], [cell for cell in cells if cell["family"] != "dense"], "kl", 1, "KL to the dense model, nats")
        row[0].set_title(task, fontsize=9)
    axes[0][0].legend(fontsize=7)
    latency = next(row["latency"] for row in record["results"] if row["latency"])
    settings = ", ".join(latency["settings"])
    seeds = max(len(row["seeds"]) for row in timed)
    partial = "; partial" if record["missing"] else ""
    figure.suptitle(
        f"pruned MiniLM-L6, fp32: mean and standard deviation over the seeds that all have ({seeds}){partial}; "
        f"time: {settings} tokens, geometric mean\n{machine_line(latency['machine'])}",
        fontsize=8,
        wrap=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def panel(axis: Any, cells: list[Row], key: str, scale: float, label: str) -> None:
    """A line for each family, its models named by what follows the family in their label."""
    for family in dict.fromkeys(cell["family"] for cell in cells):
        line = sorted((cell for cell in cells if cell["family"] == family), key=lambda cell: cell["time"]["mean"])
        x = [cell["time"]["mean"] for cell in line]
        y = [scale * cell[key]["mean"] for cell in line]
        errors = [scale * (cell[key]["spread"] or 0.0) for cell in line]
        color = COLORS.get(family, "black")
        axis.errorbar(x, y, yerr=errors, marker="o", markersize=4, linewidth=1, capsize=2, color=color, label=family)
        for cell, *at in zip(line, x, y, strict=True):
            known = family in COLORS
            text = cell["label"].removeprefix(family).strip("-") if known else cell["label"]
            axis.annotate(text, at, xytext=(3, 3), textcoords="offset points", fontsize=6)
    axis.set(xscale="log", xlabel="time over the dense model's", ylabel=label)
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.5, 1) if tick >= 0.5 * min(c["time"]["mean"] for c in cells)]
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
