"""What bench/end_to_end.py prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsenlp.measure import machine, machine_line

Row = dict[str, Any]
WIDTH = 170  # where a table would be cut otherwise

PRECISION_COLORS = {"fp32": "#4c72b0", "bf16": "#55a868", "int8": "#c44e52"}


def show(record: dict[str, Any]) -> None:
    """Print what was measured, part by part; the targets come last."""
    console = Console(width=WIDTH)
    for group in groups(record["results"]):
        console.print(latency_table(group))
        for row in group:
            if row["missing"]:
                console.print(f"{row['name']}: not timed: {row['missing']}", highlight=False)
    if record["breakdowns"]:
        console.print(breakdown_table(record["breakdowns"]))
    if record["footprints"]:
        console.print(footprint_table(record["footprints"]))
    if record["targets"]:
        console.print(targets_table(record["targets"]))
    threads = sorted({row["threads"] for row in record["results"]})
    console.print(machine_line({**machine(), "threads": " and ".join(map(str, threads))}), highlight=False)


def groups(results: list[Row]) -> list[list[Row]]:
    """The rows of each model, input and number of threads."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in results:
        key = tuple(row[name] for name in ("model", "batch", "tokens", "ragged", "threads"))
        found.setdefault(key, []).append(row)
    return list(found.values())


def title(row: Row) -> str:
    ragged = " ragged" if row["ragged"] else ""
    return f"{row['model']}, {row['batch']} x {row['tokens']}{ragged}, {row['threads']} threads"


def latency_table(group: list[Row]) -> Table:
    """Every engine of a group, the fastest first."""
    best = group[0]["best_dense"]
    table = Table(title=f"{title(group[0])}: milliseconds of a forward pass, engines in turn")
    table.add_column("engine")
    titles = ("zeros", "median", "p20", "p80", "p99", "calls", "sequences/s", "x best dense of its precision")
    for text in (*titles, "x best dense", "error", "cosine"):
        table.add_column(text, justify="right")
    for row in sorted((r for r in group if "seconds" in r), key=lambda r: r["seconds"]["median"]):
        seconds, over = row["seconds"], row.get("time_over", {})
        ratios = [f"{1 / over[name]:.2f}" if name in over else "" for name in _names(best, row["precision"])]
        table.add_row(
            row["name"],
            f"{row['sparsity']:.1%}" if row["zeros"] is not None else "",
            *(f"{1e3 * seconds[key]:.2f}" for key in ("median", "p20", "p80", "p99")),
            str(seconds["calls"]),
            f"{row['sequences_per_second']:.1f}",
            *ratios,
            f"{row['deviation']['error']:.1e}",
            f"{row['deviation']['cosine']:.5f}",
            style="bold" if row["ours"] else None,
        )
    return table


def _names(best: dict[str, str], precision: str) -> list[str]:
    """The best dense engines of a precision and of all; "" where none was timed."""
    return [best.get(precision, ""), best.get("any", "")]


def breakdown_table(breakdowns: list[Row]) -> Table:
    """Each part in each precision; those that take less than 0.5 % everywhere in one line."""
    table = Table(title=f"where the time goes, ms under the profiler: {title(breakdowns[0])}")
    table.add_column("place")
    table.add_column("what")
    columns = [{(place, kind): seconds for place, kind, seconds in row["parts"]} for row in breakdowns]
    wholes = [row["whole"] for row in breakdowns]
    for row in breakdowns:
        table.add_column(f"{row['precision']} {row['zeros']:.0%}", justify="right")
    shown = [
        part
        for part in dict.fromkeys(part for column in columns for part in column)
        if any(column.get(part, 0.0) >= 0.005 * whole for column, whole in zip(columns, wholes, strict=True))
    ]
    rest = [w - sum(c.get(part, 0.0) for part in shown) for c, w in zip(columns, wholes, strict=True)]
    lines = [(*part, [column.get(part, 0.0) for column in columns]) for part in sorted(shown)]
    for place, kind, values in [*lines, ("all", "smaller parts", rest), ("all", "sum", wholes)]:
        shares = zip(values, wholes, strict=True)
        cells = (f"{1e3 * seconds:.3f} ({seconds / whole:.1%})" for seconds, whole in shares)
        table.add_row(place, kind, *cells, style="bold" if kind == "sum" else None)
    return table


def footprint_table(footprints: list[Row]) -> Table:
    """Loading and memory."""
    table = Table(title=f"{title(footprints[0])}: a process that loads the model and runs it")
    for text in ("model", "load s", "peak of the model MB", "resident with it MB", "file MB"):
        table.add_column(text, justify="left" if text == "model" else "right")
    for row in footprints:
        megabytes = (row["peak"] - row["base"], row["peak"], row["bytes"])
        table.add_row(row["name"], f"{row['seconds']:.2f}", *(f"{size / 1e6:.0f}" for size in megabytes))
    return table


def targets_table(targets: list[Row]) -> Table:
    """Every target with what was measured beside it."""
    reached = sum(row["reached"] is True for row in targets)
    table = Table(title=f"targets: {reached} of {len(targets)} reached (ms or MB; medians of ratios, engines in turn)")
    table.add_column("what")
    for text in ("threads", "ours", "rival"):
        table.add_column(text, justify="right")
    table.add_column("against")
    for text in ("ratio", "target", "reached"):
        table.add_column(text, justify="right")
    words = {True: "yes", False: "no", None: "-"}
    for row in targets:
        values = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("ours", "rival"))
        ratio = "-" if row["value"] is None else f"{row['value']:.3f}"
        cells = (row["against"], ratio, f"≤ {row['target']:.3f}", words[row["reached"]])
        table.add_row(row["title"], str(row["threads"]), *values, *cells)
    return table


def draw(results: list[Row], path: Path) -> None:
    """Bars of the latency of every engine, ours hatched, a panel for each group with the most threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    threads = max(row["threads"] for row in results)
    shown = [group for group in groups(results) if group[0]["threads"] == threads][:6]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 5.2), squeeze=False, layout="constrained")
    for axis, group in zip(axes[0], shown, strict=True):
        timed = sorted((r for r in group if "seconds" in r), key=lambda r: r["seconds"]["median"], reverse=True)
        for y, row in enumerate(timed):
            seconds = row["seconds"]
            low, high = seconds["median"] - seconds["p20"], seconds["p80"] - seconds["median"]
            axis.barh(
                y,
                1e3 * seconds["median"],
                xerr=[[1e3 * low], [1e3 * high]],
                color=PRECISION_COLORS[row["precision"]],
                hatch="//" if row["ours"] else None,
                edgecolor="black" if row["ours"] else "none",
            )
            axis.text(1e3 * seconds["p80"], y, f" {1e3 * seconds['median']:.1f}", va="center", fontsize=7)
        axis.set_yticks(range(len(timed)), [row["name"] for row in timed], fontsize=7)
        axis.set(xscale="log", xlabel="ms")
        axis.set_title(title(group[0]), fontsize=9)
    handles = [Patch(color=color, label=precision) for precision, color in PRECISION_COLORS.items()]
    axes[0][0].legend(handles=[*handles, Patch(facecolor="white", hatch="//", label="sparsenlp")], fontsize=7)
    here = machine_line({**machine(), "threads": threads})
    figure.suptitle(f"latency of a forward pass: medians, bars from p20 to p80\n{here}", fontsize=8, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
