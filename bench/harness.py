"""What the benchmarks share: dense baselines, the machine's limits, and the record they leave."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import cycle
from math import floor, log10
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenlp import BlockSparse, native
from sparsenlp.measure import Timing, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # cases.py serves tests and benchmarks

Step = Callable[[], Any]

COLD_BYTES = 64 << 20
"""Weights that rotate are cold when together they take this much, twice the largest cache they may meet."""

OWN_DENSE = {"f32": "torch fp32", "bf16": "torch bf16", "int8": "torch int8"}
"""The baseline that works in the same dtype, by name of the kernel's dtype."""


def rotating(calls: list[Step]) -> Step:
    """One function that runs the next of `calls` each time, so that their weights are cold when there are many."""
    ring: Iterator[Step] = cycle(calls)
    return lambda: next(ring)()


def warmed(steps: Mapping[str, Step], pause: float = 0.0) -> dict[str, Step]:
    """The steps, each after an untimed "warm: ..." call of its own.

    Else a step would find in the caches what the step before it left, and the order would decide: weights
    are hot now unless they rotate, and so are the code and x.

    pause  seconds to wait before the warm call, for threads of the step before to stop spinning
    """

    def warm(step: Step) -> None:
        if pause:
            time.sleep(pause)
        step()

    pairs = (((f"warm: {name}", partial(warm, step)), (name, step)) for name, step in steps.items())
    return dict(call for pair in pairs for call in pair)


def copies_when_cold(nbytes: int, cold: bool = True) -> int:
    """How many weights of this size have to rotate to be cold; 1 if they need not be."""
    return COLD_BYTES // max(nbytes, 1) + 1 if cold else 1


def cold_copies(weight: BlockSparse, cold: bool = True) -> list[BlockSparse]:
    """As many copies of `weight` as together exceed the caches; only `weight` if they need not."""
    if not cold:
        return [weight]
    return [deepcopy(weight) for _ in range(copies_when_cold(weight.nbytes))]


def dense_baselines(weight: Tensor, bias: Tensor, x: Tensor, cold: bool = False) -> dict[str, Step]:
    """The dense layers of torch for weight (N, K), bias (N,) and x (M, K), all float32.

    cold  rotates among copies of the weight, in each layer's own dtype, that together exceed the caches
    """
    builders: dict[str, tuple[Callable[..., Step | None], int]] = {
        "torch fp32": (linear_fp32, 4),
        "torch bf16": (linear_bf16, 2),
        "oneDNN fp32": (packed_fp32, 4),
        "torch int8": (dynamic_int8_step, 1),
    }
    steps = {}
    for name, (build, item_bytes) in builders.items():
        calls = [build(weight, bias, x) for _ in range(copies_when_cold(weight.numel() * item_bytes, cold))]
        if present := [call for call in calls if call is not None]:
            steps[name] = rotating(present) if cold else present[0]
    return steps


def linear_fp32(weight: Tensor, bias: Tensor, x: Tensor) -> Step:
    """F.linear on a copy of the weight."""
    return partial(F.linear, x, weight.clone(), bias)


def linear_bf16(weight: Tensor, bias: Tensor, x: Tensor) -> Step:
    """F.linear in bfloat16."""
    return partial(F.linear, x.bfloat16(), weight.bfloat16(), bias.bfloat16())


def packed_fp32(weight: Tensor, bias: Tensor, x: Tensor) -> Step | None:
    """oneDNN's layer on a prepacked weight, the fastest dense fp32 torch has; None where it is missing."""
    if not torch.backends.mkldnn.is_available():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def dynamic_int8_step(weight: Tensor, bias: Tensor, x: Tensor) -> Step | None:
    """A call of `dynamic_int8`."""
    layer = dynamic_int8(weight, bias)
    return partial(layer, x) if layer is not None else None


def dynamic_int8(weight: Tensor, bias: Tensor) -> nn.Module | None:
    """torch's dynamically quantized linear layer; None where no engine for it was built."""
    if torch.backends.quantized.engine == "none":
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
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
LIMIT_STEPS = ("limit: read", "limit: fma")


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


def limit_steps() -> dict[str, Step]:
    """The machine's limits as steps of `interleave`, for `limits` to evaluate."""
    fma = fma_limit()
    return {"limit: read": read_limit()[0]} | ({"limit: fma": fma[0]} if fma else {})


def limits(timings: dict[str, Timing], threads: int) -> dict[str, float]:
    """Take the limits out of `timings`: bytes per second read, float32 FLOP/s (if known) of all threads."""
    found = {"read_bytes": READ_BYTES / timings.pop("limit: read").median}
    fma = fma_limit()
    if fma and "limit: fma" in timings:
        found["fma_flops"] = threads * fma[1] / timings.pop("limit: fma").median
    return found


def dot_product_factor(dtype: str) -> int:
    """The peak of a dtype ("f32", "bf16", "int8") over the float32 FMA peak, at best.

    Instructions that multiply pairs of bf16 or four int8 values do 2 and 4 times the products of an FMA
    each, and as many of them run per cycle where the vector units are 256 bits wide or better. That is
    from the instruction's width, not measured. 1 where the kernel in use has no such instruction.
    """
    kernels = native.kernels().get(f"bsr_linear.{'i8' if dtype == 'int8' else dtype}", [])
    in_force = native.isas()[native.isas().index(native.isa() or "scalar") :] if native.available else []
    best = next((isa for isa in kernels if isa in in_force), "")
    return {"bf16": 2, "int8": 4}.get(dtype, 1) if best.endswith(("_bf16", "_vnni", "_dot")) else 1


def print_table(lines: list[dict[str, Any]]) -> None:
    """Markdown; a column for every name that a line has."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for line in lines:
        print("| " + " | ".join(str(line.get(name, "")) for name in columns) + " |")


def write_record(path: Path, **content: Any) -> None:
    """A JSON file that says what ran, where, and what came out; floats to 5 digits, a list's items one to a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "machine": machine(), **content}
    lines = [f"{json.dumps(name)}: {_json(value)}" for name, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _json(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(_rounded(item)) for item in value) + "\n]"
    return json.dumps(_rounded(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and value:
        return round(value, 4 - floor(log10(abs(value))))
    return value
