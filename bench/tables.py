"""What bench/bsr_linear.py prints: the targets first, the cells with --verbose."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scaling import exponents

from sparsenlp.measure import machine, machine_line

Row = dict[str, Any]
WIDTH = 190  # where a table would be cut otherwise


def show(record: dict[str, list[Row]], verbose: bool = False) -> None:
    """Print the parts that `record` has."""
    console = Console(width=WIDTH)
    rows = [row for part in record.values() for row in part]
    counts = sorted({row["threads"] for row in rows})
    console.print(machine_line({**machine(), "threads": " and ".join(map(str, counts))}), highlight=False)
    results = [row for row in record["results"] if row["dtype"]]
    for threads in sorted({row["threads"] for row in results}):
        console.print(limit_line([row["limits"] for row in results if row["threads"] == threads], threads))
    if record["targets"]:
        console.print(targets_table(record["targets"]))
    for fit in exponents(record["scaling"]):
        console.print(
            f"{fit['dtype']}, {fit['threads']} threads: time grows as {fit['axis']} ** {fit['exponent']:.2f}; "
            f"at worst {fit['worst']:.2f} times the cost of the largest size for each of the {fit['axis']}"
        )
    for threads in sorted({row["threads"] for row in record["real"]}):
        console.print(real_line([row for row in record["real"] if row["threads"] == threads], threads))
    if verbose:
        for part in ("targets", "blocks"):
            if cells := [row for row in results if row["part"] == part]:
                console.print(cells_table(part, cells))
        if record["real"]:
            console.print(real_table(record["real"]))


def limit_line(limits: list[dict[str, float]], threads: int) -> str:
    """The machine's limits as they were while it was measured: from the least to the most."""
    texts = []
    for name, unit in (("fma_flops", "GFLOP/s fp32 FMA"), ("read_bytes", "GB/s read from memory")):
        values = [limit[name] / 1e9 for limit in limits if name in limit]
        texts += [f"{min(values):.0f} to {max(values):.0f} {unit}"] if values else []
    return f"limits on {threads} threads, measured among the rest: {', '.join(texts)}"


def targets_table(targets: list[Row]) -> Table:
    """Least and most over the cells that a target covers, beside it."""
    reached = sum(row["reached"] for row in targets)
    table = Table(title=f"targets: {reached} of {len(targets)} reached by every cell (medians, interleaved)")
    table.add_column("what")
    for title in ("sparsity", "threads", "cells", "min", "max", "target", "reached"):
        table.add_column(title, justify="right")
    for row in targets:
        low, high, bound = (row["form"].format(row[key]) for key in ("min", "max", "target"))
        sign = "≥" if row["at_least"] else "≤"
        cells = (f"{row['sparsity']:.0%}", str(row["threads"]), str(row["cells"]), low, high, f"{sign} {bound}")
        table.add_row(row["title"], *cells, "yes" if row["reached"] else "no")
    return table


def cells_table(part: str, cells: list[Row]) -> Table:
    """Every sparse layer of a part with its ratios to all rivals."""
    table = Table(title=f"{part}: median time; ratio of times, interleaved; M = 1 with cold weights")
    rivals = list(dict.fromkeys(name for row in cells for name in row["speedup"]))
    titles = ("threads", "N x K", "M", "sparsity", "layer", "us", "spread", *(f"x {r}" for r in rivals))
    for title in (*titles, "time over 8 x 32 bit", "share of limit"):
        table.add_column(title, justify="right")
    for row in cells:
        seconds, share, speedup = row["seconds"], row["share_of_limit"], row["speedup"]
        table.add_row(
            str(row["threads"]),
            "x".join(map(str, row["shape"])),
            str(row["tokens"]),
            f"{row['sparsity']:.0%}",
            row["name"],
            f"{seconds['median'] * 1e6:.0f}",
            f"{(seconds['p80'] - seconds['p20']) / seconds['median']:.0%}",
            *(f"{speedup[rival]:.1f}" if rival in speedup else "" for rival in rivals),
            f"{row['time_over_default_block']:.2f}",
            f"{share:.0%} {row['bound']}" if share is not None else "-",
        )
    return table


def real_line(rows: list[Row], threads: int) -> str:
    """How uneven rows change the time."""
    over = [row["time_over_uniform"] for row in rows]
    dense = [row["speedup"][row["own_dense"]] for row in rows]
    return (
        f"really pruned layers, {threads} threads: {np.median(over):.2f} times the time of a uniform mask of the same "
        f"density ({min(over):.2f} to {max(over):.2f}), {np.median(dense):.1f} times as fast as {rows[0]['own_dense']}"
    )


def real_table(rows: list[Row]) -> Table:
    """Each layer of the model: its own zeros beside uniform ones."""
    table = Table(title="layers of a pruned model: their own zeros beside uniform ones of the same density")
    table.add_column("layer")
    titles = ("threads", "N x K", "M", "density", "density of rows", "real us", "uniform us", "real / uniform")
    for title in (*titles, "x own dense", "x best dense"):
        table.add_column(title, justify="right")
    for row in rows:
        low, high = row["row_density"]["min"], row["row_density"]["max"]
        table.add_row(
            row["layer"],
            str(row["threads"]),
            "x".join(map(str, row["shape"])),
            str(row["tokens"]),
            f"{row['density']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['seconds']['median'] * 1e6:.0f}",
            f"{row['uniform_seconds']['median'] * 1e6:.0f}",
            f"{row['time_over_uniform']:.2f}",
            f"{row['speedup'][row['own_dense']]:.1f}",
            f"{row['speedup'][row['best_dense']]:.1f}",
        )
    return table
