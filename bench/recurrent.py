"""What the benchmarks of sparse_lstm and sparse_gru share: the sweep, torch's layers beside ours, and the targets."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from harness import Step, write_record
from layer_parts import measure, show
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsenlp.layers.recurrent import SparseRecurrent
from sparsenlp.measure import use_threads

Shape = tuple[int, ...]  # hidden units, sequences, steps, directions, percent of zeros, whether it is a training step

DTYPES = {  # of the layer, block
    "f32": (torch.float32, (8, 1)),
    "bf16": (torch.bfloat16, (8, 2)),
    "int8": (torch.float32, (8, 4)),
}
STEPS = 128
SHAPES: list[Shape] = [
    *(
        (hidden, batch, STEPS, directions, sparsity, 0)
        for hidden in (512, 1024)
        for batch in (1, 16)
        for directions in (1, 2)
        for sparsity in (90, 50)
    ),
    *((hidden, 1, 1, 1, sparsity, 0) for hidden in (512, 1024) for sparsity in (90, 50)),
    (512, 32, STEPS, 1, 90, 1),
]


@dataclass(frozen=True)
class Target:
    """In each covered cell our fastest dtype is at least `bound` times as fast as `baseline`."""

    title: str
    baseline: str
    bound: float
    covers: Callable[[Shape], bool]


TARGETS = [
    Target("batch 1, 128 steps, 90 %", "torch bf16", 10, lambda s: s[1:3] == (1, STEPS) and s[4] == 90),
    Target("batch 1, 128 steps, 90 %", "torch int8", 8, lambda s: s[1:3] == (1, STEPS) and s[4] == 90),
    Target("batch 16, 128 steps, 90 %", "torch bf16", 4, lambda s: s[1:3] == (16, STEPS) and s[4] == 90),
    Target("streaming one step, 90 %", "torch bf16", 10, lambda s: s[2] == 1 and s[4] == 90),
    Target("batch 1, 50 %", "torch bf16", 3, lambda s: s[1] == 1 and s[4] == 50),
    Target("training step, batch 32, 90 %", "torch fp32", 1, lambda s: s[1] == 32 and s[5] == 1),
]


def name_of(shape: Shape) -> str:
    hidden, batch, steps, directions, sparsity, training = shape
    both = " bidirectional" if directions == 2 else ""
    return f"{hidden}{both}, {batch} x {steps}, {sparsity} %" + (", training" if training else "")


def main(op: str, description: str | None, layer: type[SparseRecurrent]) -> None:
    """Parse the command line, measure every shape, dtype and number of threads, and print and record the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="two small shapes, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, default 1 2")
    arguments = parser.parse_args()
    quick = [(64, 1, 8, 2, 90, 0), (64, 4, 8, 1, 90, 1)]
    shapes, seconds = (quick, 0.1) if arguments.quick else (SHAPES, 2.0)
    results = []
    for threads in arguments.threads:
        with use_threads(threads):
            for shape in shapes:
                for dtype in DTYPES:
                    if not (shape[5] and dtype == "int8"):
                        warm = shape[1] == 1  # so short that what ran before decides what is in the caches
                        results.append(measure(op, partial(cell, op, layer), shape, dtype, threads, seconds, warm))
    show(op, {shape: name_of(shape) for shape in shapes}, results)
    judged = judge(results)
    show_targets(judged)
    write_record(arguments.output / f"{op}.json", results=results, targets=judged)


def cell(op: str, layer: type[SparseRecurrent], shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions of stored weights)"""
    hidden, batch, steps, directions, sparsity, training = shape
    element, block = DTYPES[dtype]
    dense = pruned(layer.dense, hidden, directions == 2, block, sparsity / 100)
    sparse = layer.from_dense(deepcopy(dense), block)  # biases are shared, and change their dtype
    stored = sum(matrix.weight.values.numel() for matrix in sparse.children())
    sparse = sparse.quantize() if dtype == "int8" else sparse.to(element)
    x = torch.randn(steps, batch, hidden)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x.to(element))[0].float(), dense(x)[0], rtol=0.1, atol=0.05)
    half = pruned(layer.dense, hidden, directions == 2, block, sparsity / 100).bfloat16()
    layers: dict[str, tuple[nn.Module, Tensor]] = {"torch fp32": (dense, x), "torch bf16": (half, x.bfloat16())}
    int8 = None if training else dynamic_int8(dense)
    if int8 is not None:
        layers["torch int8"] = (int8, x)
    layers[op] = (sparse, x.to(element))
    run = train if training else infer
    return {name: partial(run, *pair) for name, pair in layers.items()}, 2 * steps * batch * stored * (
        3 if training else 1
    )


def pruned(kind: type[nn.RNNBase], hidden: int, both: bool, block: tuple[int, int], sparsity: float) -> nn.RNNBase:
    """torch's layer with this share of its blocks zero, the same ones each time."""
    torch.manual_seed(0)
    rnn = kind(hidden, hidden, bidirectional=both).requires_grad_(False)
    n, k = block
    for name, weight in rnn.named_parameters():
        if name.startswith("weight"):
            keep = torch.rand(weight.shape[0] // n, weight.shape[1] // k) >= sparsity
            weight *= keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    return rnn.requires_grad_()


def infer(layer: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def train(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x)[0].sum().backward()


def dynamic_int8(rnn: nn.RNNBase) -> nn.Module | None:
    """torch's dynamically quantized layer; None where no engine for it was built."""
    if torch.backends.quantized.engine == "none":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(rnn), {type(rnn)}, torch.qint8)[0]


def judge(results: list[dict]) -> list[dict]:
    """A row for each target and number of threads that `results` has cells for: the worst cell decides."""
    judged = []
    for target in TARGETS:
        for threads in sorted({row["threads"] for row in results}):
            best: dict[Shape, float] = {}
            for row in results:
                shape = tuple(row["shape"])
                if row["threads"] == threads and target.covers(shape) and target.baseline in row["speedup"]:
                    best[shape] = max(best.get(shape, 0.0), row["speedup"][target.baseline]["median"])
            if best:
                worst = min(best.values())
                name = f"{target.title}, x {target.baseline}"
                row = {"title": name, "threads": threads, "cells": len(best), "worst": worst, "target": target.bound}
                judged.append({**row, "reached": worst >= target.bound})
    return judged


def show_targets(judged: list[dict]) -> None:
    table = Table(title="targets: our fastest dtype, in the worst cell")
    for title in ("target", "threads", "cells", "at least", "worst", ""):
        table.add_column(title, justify="left" if title == "target" else "right")
    for row in judged:
        reached = "reached" if row["reached"] else "missed"
        cells = (str(row["threads"]), str(row["cells"]), f"{row['target']:g}", f"{row['worst']:.1f}", reached)
        table.add_row(row["title"], *cells)
    Console(width=140).print(table)
