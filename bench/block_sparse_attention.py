"""block_sparse_attention against torch's attention, dense and masked, and compiled FlexAttention on the same blocks.

    python bench/block_sparse_attention.py [--quick] [--threads 1 2] [--output bench/results]

12 heads x 64: a sliding window over sequences of several lengths, one token that decodes, and all keys. All engines
take the same queries, keys and values and run interleaved in this process; the result is checked before it is timed.
Operations are those of the blocks that are stored. Memory is what a call, forward and backward, adds to the peak of a
process of its own. Writes block_sparse_attention.json, and prints a table and what was meant to be reached.
"""

from __future__ import annotations

import argparse
import multiprocessing
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Step, write_record
from layer_parts import Shape, measure, show
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparsenlp.formats import BlockMask
from sparsenlp.measure import use_threads
from sparsenlp.ops import block_sparse_attention

from cases import TOLERANCES, normal  # isort: skip  (found through harness)

OP = "block_sparse_attention"
HEADS, WIDTH, BLOCK = 12, 64, 64
SHAPES = {  # queries, keys, keys that a query attends to on its left and right
    (512, 512, 64, 0): "512, 1/4",
    (1024, 1024, 128, 0): "1024, 1/5",
    (2048, 2048, 256, 0): "2048, 1/7",
    (4096, 4096, 512, 0): "4096, 1/7",
    (1024, 1024, 1024, 1024): "1024, all",
    (1, 4096, 512, 0): "1 of 4096, 1/7",
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (4096, 8192, 16384, 32768)  # of which memory is shown


def flex_mask(queries: int, keys: int, left: int, right: int) -> FlexMask:
    """The same window for FlexAttention, in blocks of the same size."""

    def window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query + keys - queries - left) & (key <= query + keys - queries + right)

    return create_block_mask(window, None, None, queries, keys, device="cpu", BLOCK_SIZE=BLOCK)


def cell(shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions)"""
    queries, keys, left, right = shape
    lengths = (queries, keys, keys)
    query, key, value = (normal(i, 1, HEADS, n, WIDTH).to(DTYPES[dtype]) for i, n in enumerate(lengths))
    mask = BlockMask.sliding_window(queries, left, right, keys, (BLOCK, BLOCK))
    dense = mask.to_dense()[0]
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), dense)
    steps = {
        "torch": partial(F.scaled_dot_product_attention, query, key, value),
        "torch, mask": partial(F.scaled_dot_product_attention, query, key, value, dense),
        OP: partial(block_sparse_attention, query, key, value, mask),
    }
    if queries > 1:  # FlexAttention decodes on GPUs alone
        torch.compiler.reset()  # one cell's graphs count towards the limit of the next one's
        compiled = torch.compile(flex_attention, dynamic=False)
        flex = partial(compiled, query, key, value, block_mask=flex_mask(*shape))
        torch.testing.assert_close(flex().double(), expected, rtol=2e-2, atol=2e-2)
        steps["FlexAttention"] = flex
    torch.testing.assert_close(steps[OP]().double(), expected, **TOLERANCES[OP, DTYPES[dtype]])
    return steps, 4 * HEADS * WIDTH * min(BLOCK, queries) * BLOCK * mask.nnz_blocks


def judge(results: list[dict]) -> list[dict]:
    """A row for each cell and target: at least 1.6 times FlexAttention, within 1.3 of the density times dense attention
    and, where all keys count, no slower than it."""
    judged = []
    for result in results:
        queries, keys, left, right = result["shape"]
        density = BlockMask.sliding_window(queries, left, right, keys, (BLOCK, BLOCK)).density
        faster = {name: speedup["median"] for name, speedup in result["speedup"].items()}
        rows = []
        if density == 1:
            rows.append(("times as fast as dense attention", faster["torch"], 1.0, True))
        elif queries > 1:
            rows.append(("times as fast as FlexAttention", faster["FlexAttention"], 1.6, True))
            rows.append(("time over density x dense attention", 1 / (density * faster["torch"]), 1.3, False))
        cell = {name: result[name] for name in ("threads", "shape", "dtype")}
        for title, value, bound, at_least in rows:
            reached = value >= bound if at_least else value <= bound
            row = {"title": title, "value": value, "target": bound, "at_least": at_least, "reached": reached}
            judged.append(cell | row)
    return judged


def show_targets(judged: list[dict]) -> None:
    table = Table(title="targets")
    for title in ("threads", "shape", "dtype", "what", "target", "measured", ""):
        table.add_column(title, justify="left" if title == "what" else "right")
    for row in judged:
        bound = f"{'>=' if row['at_least'] else '<='} {row['target']:g}"
        result = (row["title"], bound, f"{row['value']:.2f}", "reached" if row["reached"] else "missed")
        table.add_row(str(row["threads"]), SHAPES[tuple(row["shape"])], row["dtype"], *result)
    Console(width=140).print(table)


def peak_bytes(length: int) -> int:
    """What one call forward and backward adds to the peak of this process; for a process of its own."""
    query, key, value = (normal(i, 1, 1, length, WIDTH).requires_grad_() for i in range(3))
    mask = BlockMask.sliding_window(length, 256, 0, block=(BLOCK, BLOCK))
    before = peak_of_process()
    y = block_sparse_attention(query, key, value, mask)
    assert isinstance(y, Tensor)
    y.sum().backward()
    return peak_of_process() - before


def peak_of_process() -> int:
    """In bytes. Not getrusage's, which a process takes over from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_memory(lengths: tuple[int, ...]) -> list[dict]:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return [{"length": n, "bytes": peak} for n, peak in zip(lengths, pool.map(peak_bytes, lengths, 1), strict=True)]


def show_memory(memory: list[dict]) -> None:
    table = Table(title="memory at the peak, one head, forward and backward")
    for title in ("length", "MB", "bytes a token"):
        table.add_column(title, justify="right")
    for row in memory:
        table.add_row(str(row["length"]), f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / row['length']:.0f}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="one shape, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, default 1 2")
    arguments = parser.parse_args()
    shapes, seconds = ([*SHAPES][:1], 0.2) if arguments.quick else ([*SHAPES], 2.0)
    results = []
    with torch.inference_mode():
        for threads in arguments.threads:
            with use_threads(threads):
                cells = [(shape, dtype) for shape in shapes for dtype in DTYPES]
                results += [measure(OP, cell, shape, dtype, threads, seconds) for shape, dtype in cells]
    memory = measure_memory(LENGTHS[:1] if arguments.quick else LENGTHS)
    judged = judge(results)
    show(OP, SHAPES, results)
    show_targets(judged)
    show_memory(memory)
    write_record(arguments.output / f"{OP}.json", results=results, targets=judged, memory=memory)


if __name__ == "__main__":
    main()
