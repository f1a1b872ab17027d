"""SparseConv1d, and a TextCNN of them, at 90 % sparsity against torch in float32 and bfloat16.

    python bench/sparse_conv1d.py [--quick] [--threads 1 2] [--output bench/results]

Convolutions read what an embedding leaves: 300 channels, last in memory. torch's have the same zeros; "unfold" is its
linear layer on copied windows. torch has no dynamic int8 convolution, so int8 stands beside the same baselines. The
TextCNN is whole: word ids, embedding, kernels of 3, 4 and 5 words, ReLU, the maximum over time, a linear layer. All
run interleaved in this process on warm weights; the result is checked before it is timed. Writes sparse_conv1d.json
and prints tables and what was meant to be reached.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Step, write_record
from layer_parts import Cell, Shape, measure, show
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsenlp import SparseConv1d
from sparsenlp.layers.sparse_conv1d import filter_matrix
from sparsenlp.measure import use_threads
from sparsenlp.ops.sparse_conv1d import windows

DTYPES = {"f32": (torch.float32, 1), "bf16": (torch.bfloat16, 2), "int8": (torch.float32, 4)}  # of x, inputs of a block
CHANNELS, KERNELS, SPARSITY = 300, (3, 4, 5), 0.9
WORDS, CLASSES = 10_000, 2
TARGET = 3.0  # the whole TextCNN, x torch fp32, our fastest dtype in the worst shape
LAYERS: list[Shape] = [  # sequences, words, filters, kernel
    (batch, length, *filters) for batch in (1, 32) for length in (32, 128) for filters in ((100, 3), (256, 5))
]
MODELS: list[Shape] = [  # sequences, words, filters of each kernel
    (batch, length, filters) for batch in (1, 32) for length in (32, 64, 128) for filters in (100, 256)
]


class TextCNN(nn.Module):
    """Word ids (B, L) -> scores (B, CLASSES). The convolutions may have the ReLU in them."""

    def __init__(self, convolutions: list[nn.Module], filters: int, relu: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, CHANNELS)
        self.convolutions = nn.ModuleList(convolutions)
        self.classifier = nn.Linear(len(convolutions) * filters, CLASSES)
        self.relu = relu

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        found = [convolution(x).amax(dim=2) for convolution in self.convolutions]
        pooled = torch.cat(found, dim=1)  # the maximum of ReLUs is the ReLU of the maximum
        return self.classifier(pooled.relu() if self.relu else pooled)


def pruned(filters: int, kernel: int, block: tuple[int, int]) -> nn.Conv1d:
    """torch's convolution with SPARSITY of its blocks zero, the same ones each time."""
    torch.manual_seed(kernel)
    conv = nn.Conv1d(CHANNELS, filters, kernel)
    n, k = block
    keep = torch.rand(filters // n, CHANNELS // k, kernel) >= SPARSITY
    with torch.no_grad():
        conv.weight *= keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    return conv


def sparse_of(conv: nn.Conv1d, block: tuple[int, int], dtype: str, activation: str = "none") -> SparseConv1d:
    sparse = SparseConv1d.from_dense(deepcopy(conv), block, activation=activation)
    return sparse.quantize() if dtype == "int8" else sparse.to(DTYPES[dtype][0])


def block_of(filters: int, dtype: str) -> tuple[int, int]:
    return 8 if filters % 8 == 0 else 4, DTYPES[dtype][1]


def layer_cell(shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions of stored weights)"""
    batch, length, filters, kernel = shape
    block, element = block_of(filters, dtype), DTYPES[dtype][0]
    conv = pruned(filters, kernel, block)
    sparse = sparse_of(conv, block, dtype)
    x = torch.randn(batch, length, CHANNELS).transpose(1, 2)
    torch.testing.assert_close(sparse(x.to(element)).float(), conv(x), rtol=0.1, atol=0.05)
    half, matrix = deepcopy(conv).bfloat16(), filter_matrix(conv.weight)
    steps = {
        "torch fp32": partial(conv, x),
        "torch bf16": partial(half, x.bfloat16()),
        "unfold": lambda: F.linear(windows(x.transpose(1, 2), kernel, 1, (0, 0), 1).flatten(2), matrix, conv.bias),
        "sparse_conv1d": partial(sparse, x.to(element)),
    }
    return steps, 2 * batch * (length - kernel + 1) * sparse.filters.values.numel()


def model_cell(shape: Shape, dtype: str) -> tuple[dict[str, Step], int]:
    """(the steps to compare, multiplications and additions of stored weights of the convolutions)"""
    batch, length, filters = shape
    block = block_of(filters, dtype)
    dense = TextCNN([pruned(filters, kernel, block) for kernel in KERNELS], filters)
    convolutions = [sparse_of(conv, block, dtype, "relu") for conv in dense.convolutions]  # type: ignore[arg-type]
    sparse = TextCNN([*convolutions], filters, relu=False)
    sparse.embedding, sparse.classifier = deepcopy(dense.embedding), deepcopy(dense.classifier)
    sparse = sparse.to(DTYPES[dtype][0]).eval()
    ids = torch.randint(WORDS, (batch, length))
    torch.testing.assert_close(sparse(ids).float(), dense(ids), rtol=0.1, atol=0.05)
    half = deepcopy(dense).bfloat16()
    steps = {"torch fp32": partial(dense, ids), "torch bf16": partial(half, ids), "textcnn": partial(sparse, ids)}
    stored = ((length - k + 1) * c.filters.values.numel() for k, c in zip(KERNELS, convolutions, strict=True))
    return steps, 2 * batch * sum(stored)


def judge(results: list[dict]) -> list[dict]:
    """A row for each batch size and number of threads: our fastest dtype, in the worst shape."""
    judged = []
    for batch, threads in sorted({(row["shape"][0], row["threads"]) for row in results}):
        best: dict[Shape, float] = {}
        for row in results:
            if (row["shape"][0], row["threads"]) == (batch, threads):
                shape = tuple(row["shape"])
                best[shape] = max(best.get(shape, 0.0), row["speedup"]["torch fp32"]["median"])
        worst = min(best.values())
        judged.append({"batch": batch, "threads": threads, "cells": len(best), "worst": worst, "target": TARGET})
    return judged


def show_targets(judged: list[dict]) -> None:
    table = Table(title="target: whole TextCNN at 90 %, x torch fp32, our fastest dtype in the worst shape")
    for title in ("batch", "threads", "cells", "at least", "worst", ""):
        table.add_column(title, justify="right")
    for row in judged:
        numbers = (str(row[name]) for name in ("batch", "threads", "cells"))
        reached = "reached" if row["worst"] >= row["target"] else "missed"
        table.add_row(*numbers, f"{row['target']:g}", f"{row['worst']:.1f}", reached)
    Console(width=140).print(table)


def name_of(shape: Shape) -> str:
    """Sequences x words, filters x kernel."""
    batch, length, filters, *kernel = shape
    return f"{batch} x {length}, {filters} x {','.join(map(str, kernel or KERNELS))}"


def main() -> None:
    """Parse the command line, measure every shape, dtype and number of threads, and print and record the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="one shape each, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, default 1 2")
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {}
    parts: list[tuple[str, list[Shape], Cell]] = [
        ("sparse_conv1d", LAYERS, layer_cell),
        ("textcnn", MODELS, model_cell),
    ]
    for name, shapes, cell in parts:
        measured, seconds = (shapes[:1], 0.1) if arguments.quick else (shapes, 1.0)
        found[name] = []
        with torch.inference_mode():
            for threads in arguments.threads:
                with use_threads(threads):
                    rows = (measure(name, cell, s, dtype, threads, seconds) for s in measured for dtype in DTYPES)
                    found[name] += rows
        show(name, {shape: name_of(shape) for shape in measured}, found[name])
    judged = judge(found["textcnn"])
    show_targets(judged)
    write_record(arguments.output / "sparse_conv1d.json", **found, targets=judged)


if __name__ == "__main__":
    main()
