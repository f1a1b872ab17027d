"""What the benchmarks of a layer's parts share: the sweep, the comparison with baselines, the table and the record."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Step, dot_product_factor, limit_steps, limits, write_record
from rich.console import Console
from rich.table import Table

from sparsenlp.measure import interleave, machine, machine_line, ratio, use_threads

Shape = tuple[int, ...]
Cell = Callable[[Shape, str], tuple[dict[str, Step], int]]
"""(shape, dtype) -> the steps to compare, by name, and the operations of the op's own, which has its name."""


def main(op: str, description: str | None, shapes: dict[Shape, str], dtypes: tuple[str, ...], cell: Cell) -> None:
    """Parse the command line, measure every shape, dtype and number of threads, and print and record the results.

    shapes  what to measure, and how the table names it; --quick takes the first
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="one shape, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, default 1 2")
    arguments = parser.parse_args()
    measured, seconds = (list(shapes)[:1], 0.2) if arguments.quick else (list(shapes), 2.0)
    results = []
    with torch.inference_mode():
        for threads in arguments.threads:
            with use_threads(threads):
                results += [measure(op, cell, shape, dtype, threads, seconds) for shape in measured for dtype in dtypes]
    show(op, shapes, results)
    write_record(arguments.output / f"{op}.json", results=results)


def measure(op: str, cell: Cell, shape: Shape, dtype: str, threads: int, seconds: float, warm: bool = False) -> dict:
    """One cell of the sweep: times, the ratio to each baseline, and FLOP/s beside what the machine can do.

    warm  as in `interleave`
    """
    steps, operations = cell(shape, dtype)
    timings = interleave(steps | limit_steps(), seconds, warm=warm)
    peak = limits(timings, threads).get("fma_flops")
    rate = operations / timings[op].median
    return {
        "shape": list(shape),
        "dtype": dtype,
        "threads": threads,
        "seconds": {name: timings[name].as_dict() for name in steps},
        "speedup": {name: ratio(timings[name], timings[op]).as_dict() for name in steps if name != op},
        "flops": rate,
        "share_of_peak": rate / (peak * dot_product_factor(dtype)) if peak else None,
    }


def show(op: str, shapes: dict[Shape, str], results: list[dict]) -> None:
    console = Console(width=140)
    counts = sorted({result["threads"] for result in results})
    console.print(machine_line({**machine(), "threads": " and ".join(map(str, counts))}), highlight=False)
    table = Table(title=f"{op}, median time; ratio of times, interleaved, with p20 to p80")
    baselines = list(results[0]["speedup"])
    titles = ("threads", "shape", "dtype", "us", "GFLOP/s", "of peak", *(f"x {name}" for name in baselines))
    for title in titles:
        table.add_column(title, justify="right")
    for result in results:
        ratios = (result["speedup"].get(name) for name in baselines)
        table.add_row(
            str(result["threads"]),
            shapes[tuple(result["shape"])],
            result["dtype"],
            f"{result['seconds'][op]['median'] * 1e6:.1f}",
            f"{result['flops'] / 1e9:.0f}",
            f"{result['share_of_peak']:.0%}" if result["share_of_peak"] else "",
            *(f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})" if r else "" for r in ratios),
        )
    console.print(table)
