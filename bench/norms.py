"""What the benchmarks of ops that move memory share: the sweep, the comparison with torch, the table and the record."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Step, read_limit, write_record
from rich.console import Console
from rich.table import Table

from sparsenlp.measure import interleave, machine, machine_line, ratio, use_threads

SHAPES = ((32, 384), (128, 768), (2048, 768))  # tokens M, hidden H
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Cell = Callable[[int, int, torch.dtype], tuple[dict[str, Step], int]]


def main(op: str, description: str | None, cell: Cell) -> None:
    """Parse the command line, measure every shape, dtype and number of threads, and print and record the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="one shape, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, default 1 2")
    arguments = parser.parse_args()
    shapes, seconds = (SHAPES[:1], 0.2) if arguments.quick else (SHAPES, 2.0)
    results = []
    with torch.inference_mode():
        for threads in arguments.threads:
            with use_threads(threads):
                results += [measure(op, cell, shape, dtype, threads, seconds) for shape in shapes for dtype in DTYPES]
    show(op, results)
    write_record(arguments.output / f"{op}.json", results=results)


def measure(op: str, cell: Cell, shape: tuple[int, int], dtype: str, threads: int, seconds: float) -> dict:
    """One cell of the sweep: times of both, their ratio, and bytes per second beside what the machine reads."""
    steps, moved = cell(*shape, DTYPES[dtype])
    read, read_bytes = read_limit()
    timings = interleave({**steps, "limit": read}, seconds)
    rate = moved / timings[op].median
    return {
        "shape": list(shape),
        "dtype": dtype,
        "threads": threads,
        "seconds": {name: timings[name].as_dict() for name in steps},
        "speedup": ratio(timings["torch"], timings[op]).as_dict(),
        "bytes_per_second": rate,
        "share_of_read_bandwidth": rate * timings["limit"].median / read_bytes,
    }


def show(op: str, results: list[dict]) -> None:
    console = Console(width=120)
    counts = sorted({result["threads"] for result in results})
    console.print(machine_line({**machine(), "threads": " and ".join(map(str, counts))}), highlight=False)
    table = Table(title=f"{op}, median time; ratio of times, interleaved")
    for title in ("threads", "M x H", "dtype", "torch us", "us", "GB/s", "x torch", "p20 to p80", "of bandwidth"):
        table.add_column(title, justify="right")
    for result in results:
        seconds, speedup = result["seconds"], result["speedup"]
        table.add_row(
            str(result["threads"]),
            "x".join(map(str, result["shape"])),
            result["dtype"],
            f"{seconds['torch']['median'] * 1e6:.1f}",
            f"{seconds[op]['median'] * 1e6:.1f}",
            f"{result['bytes_per_second'] / 1e9:.1f}",
            f"{speedup['median']:.2f}",
            f"{speedup['p20']:.2f} to {speedup['p80']:.2f}",
            f"{result['share_of_read_bandwidth']:.0%}",
        )
    console.print(table)
