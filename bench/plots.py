"""The plots of bench/bsr_linear.py; each is for the most threads and the first shape that were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from harness import OWN_DENSE

from sparsenlp.measure import machine, machine_line

Row = dict[str, Any]


def draw(record: dict[str, list[Row]], folder: Path) -> None:
    """Write bsr_linear_{speedup,break_even,scaling}.png, as far as `record` has the rows for them."""
    import matplotlib

    matplotlib.use("Agg")
    if cells := _largest_setup([r for r in record["results"] if r["dtype"] and r["part"] == "targets"]):
        _save(heat_map(cells), cells, folder / "bsr_linear_speedup.png")
        _save(break_even(cells), cells, folder / "bsr_linear_break_even.png")
    if points := _largest_setup(record["scaling"]):
        _save(scaling(points), points, folder / "bsr_linear_scaling.png")


def heat_map(cells: list[Row]) -> Any:
    """Speed-up over torch's dense layer of the same dtype: sparsity x tokens, one panel for each dtype."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    tokens, sparsities = (sorted({row[key] for row in cells}) for key in ("tokens", "sparsity"))
    own = {(r["dtype"], r["tokens"], r["sparsity"]): r["speedup"].get(OWN_DENSE[r["dtype"]], np.nan) for r in cells}
    figure, axes = plt.subplots(1, len(OWN_DENSE), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (dtype, baseline) in zip(axes, OWN_DENSE.items(), strict=True):
        grid = np.array([[own[dtype, m, sparsity] for sparsity in sparsities] for m in tokens])
        image = axis.imshow(grid, norm=LogNorm(1, 30), cmap="viridis", aspect="auto", origin="lower")
        for (i, j), value in np.ndenumerate(grid):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 12 else "black")
        block = next(row["block"] for row in cells if row["dtype"] == dtype)
        axis.set(title=f"{dtype} {block}, times as fast as {baseline}", xlabel="zeros, %")
        axis.title.set_fontsize(9)
        axis.set_xticks(range(len(sparsities)), [f"{100 * sparsity:.0f}" for sparsity in sparsities])
        axis.set_yticks(range(len(tokens)), [f"{m}" + (" (cold)" if m == 1 else "") for m in tokens])
    axes[0].set_ylabel("tokens M")
    bar = figure.colorbar(image, ax=axes)
    bar.set_ticks([1, 2, 5, 10, 20], labels=["1", "2", "5", "10", "20"])
    return figure


def break_even(cells: list[Row]) -> Any:
    """Speed-up over the best dense layer of any dtype against sparsity, one panel for each number of tokens."""
    import matplotlib.pyplot as plt

    tokens = sorted({row["tokens"] for row in cells})
    figure, axes = plt.subplots(
        1, len(tokens), figsize=(3 * len(tokens), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, m in zip(axes[0], tokens, strict=True):
        for dtype in OWN_DENSE:
            line = [row for row in cells if row["tokens"] == m and row["dtype"] == dtype]
            x, y = [100 * row["sparsity"] for row in line], [row["speedup"][row["best_dense"]] for row in line]
            axis.plot(x, y, marker="o", label=f"{dtype} {line[0]['block']}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"M = {m}" + (" (cold weights)" if m == 1 else ""), xlabel="zeros, %", yscale="log")
        axis.set_yticks([0.5, 1, 2, 5, 10, 20], labels=["0.5", "1", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times as fast as the best dense layer")
    axes[0][0].legend(fontsize=8)
    return figure


def scaling(points: list[Row]) -> Any:
    """Time against tokens (with a line of slope 1), few tokens, and nonzeros."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    labels = {"tokens": "tokens M, 90 % zeros", "few tokens": "tokens M, 90 % zeros", "nonzeros": "nonzeros, M = 128"}
    for axis, (kind, label) in zip(axes, labels.items(), strict=True):
        key = "nonzeros" if kind == "nonzeros" else "tokens"
        for dtype in OWN_DENSE:
            line = sorted((r for r in points if (r["axis"], r["dtype"]) == (kind, dtype)), key=lambda r: r[key])
            x, y = [row[key] for row in line], [1e6 * row["seconds"]["median"] for row in line]
            (drawn,) = axis.plot(x, y, marker=".", label=dtype)
            if kind == "tokens":
                guide = [y[-1] * size / x[-1] for size in x]
                axis.plot(x, guide, linestyle=":", linewidth=1, color=drawn.get_color())
        axis.set(xlabel=label, ylabel="us")
        if kind == "tokens":
            axis.set(xscale="log", yscale="log")
            axis.set_title("dotted: proportional to M", fontsize=9)
        else:
            axis.set(xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _largest_setup(rows: list[Row]) -> list[Row]:
    """The rows with the most threads and the first shape."""
    threads = max((row["threads"] for row in rows), default=0)
    return [row for row in rows if row["threads"] == threads and row["shape"] == rows[0]["shape"]]


def _save(figure: Any, rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs, inputs = rows[0]["shape"]
    here = machine_line({**machine(), "threads": rows[0]["threads"]})
    figure.suptitle(f"bsr_linear, {inputs} -> {outputs}\n{here}", fontsize=8)
    figure.savefig(path, dpi=130)
