"""What the benchmarks share: dense baselines, the machine's limits, and the record they leave."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenlp import native
from sparsenlp.measure import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # cases.py serves tests and benchmarks

Step = Callable[[], Tensor]


def rotating(calls: list[Step]) -> Step:
    """One function that runs the next of `calls` each time, so that their weights are cold when there are many."""
    ring: Iterator[Step] = cycle(calls)
    return lambda: next(ring)()


def dense_baselines(weight: Tensor, bias: Tensor, x: Tensor) -> dict[str, Step]:
    """The dense layers of torch for weight (N, K), bias (N,) and x (M, K), all float32."""
    half = [t.to(torch.bfloat16) for t in (x, weight, bias)]
    steps: dict[str, Step] = {
        "torch fp32": lambda: F.linear(x, weight, bias),
        "torch bf16": lambda: F.linear(*half),
    }
    if packed := packed_fp32(weight, bias, x):
        steps["oneDNN fp32"] = packed
    if quantized := dynamic_int8(weight, bias):
        steps["torch int8"] = lambda: quantized(x)
    return steps


def packed_fp32(weight: Tensor, bias: Tensor, x: Tensor) -> Step | None:
    """oneDNN's layer on a prepacked weight, the fastest dense fp32 torch has; None where it is missing."""
    if not torch.backends.mkldnn.is_available():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def dynamic_int8(weight: Tensor, bias: Tensor) -> nn.Module | None:
    """torch's dynamically quantized linear layer; None where no engine for it was built."""
    if torch.backends.quantized.engine == "none":
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)


def csr(weight: Tensor, bias: Tensor, x: Tensor) -> Step:
    """torch's own sparse matmul, on the same zeros."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = weight.to_sparse_csr()
    return lambda: F.linear(x, sparse, bias)


FMA_ROUNDS = 40_000  # some tenths of a millisecond
READ_BYTES = 4 << 20


def fma_limit() -> tuple[Callable[[], int], int] | None:
    """(a step of nothing but FMAs on one thread, its float32 operations); None without the extension.

    A step among the others of `interleave`: clocks drift, so the peak has to be taken at the same time.
    """
    if not native.available:
        return None
    return lambda: native.fma_peak(FMA_ROUNDS), native.fma_peak(FMA_ROUNDS)


def read_limit(slices: int = 32) -> tuple[Step, int]:
    """(a step that reads memory on torch's threads, its bytes); slices rotate, so that they are cold."""
    data = torch.ones(slices, READ_BYTES // 4)
    return rotating([row.sum for row in data]), READ_BYTES


def write_record(path: Path, **content: Any) -> None:
    """A JSON file that says what ran, where, and what came out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "machine": machine(), **content}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
