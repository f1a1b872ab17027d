"""nm_linear with 2:4 weights against torch's dense layers: time, FLOP/s and share of the machine's limit.

    python bench/nm_linear.py [--quick] [--output bench/results]

For each number of threads, shape and tokens M, all candidates run interleaved in this process and the
result of each is checked before it is timed. M = 1 runs on weights that come from memory: sets of them
rotate, 64 MB at least, and our own dense bfloat16 kernel (bsr_linear, every block stored) joins in. Writes
nm_linear.json and nm_linear.png and prints a table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from harness import Step, dense_baselines, fma_limit, read_limit, rotating, write_record
from rich.console import Console
from rich.table import Table

from sparsenlp import BlockSparse, NMLinear
from sparsenlp.formats import NM
from sparsenlp.measure import Timing, interleave, machine, machine_line, ratio, use_threads
from sparsenlp.ops import bsr_linear

from cases import NMLinearCase  # isort: skip  (found through harness)

COLD_BYTES = 64 << 20
DTYPES = {"2:4 fp32": torch.float32, "2:4 bf16": torch.bfloat16}
BASELINES = ("torch", "oneDNN", "own dense")


@dataclass(frozen=True)
class Sweep:
    shapes: tuple[tuple[int, int], ...] = ((3072, 768), (768, 3072), (768, 768))  # (N, K)
    tokens: tuple[int, ...] = (1, 16, 128, 512)
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.5


QUICK = Sweep(shapes=((768, 768),), tokens=(1, 128), threads=(1,), seconds=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="a few points, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads, default 1 2")
    arguments = parser.parse_args()
    sweep = QUICK if arguments.quick else Sweep()
    if arguments.threads:
        sweep = replace(sweep, threads=tuple(arguments.threads))
    results = []
    with torch.inference_mode():
        for threads in sweep.threads:
            with use_threads(threads):
                results += [
                    row
                    for shape in sweep.shapes
                    for tokens in sweep.tokens
                    for row in measure(shape, tokens, threads, sweep.seconds)
                ]
    show(results)
    write_record(arguments.output / "nm_linear.json", results=results)
    plot(results, arguments.output / "nm_linear.png")


def measure(shape: tuple[int, int], tokens: int, threads: int, seconds: float) -> list[dict]:
    """One cell of the sweep: a row for each candidate."""
    rows, columns = shape
    cases = {name: NMLinearCase((tokens,), rows, columns, dtype=dtype, seed=7) for name, dtype in DTYPES.items()}
    first = cases["2:4 fp32"]
    x, bias = first.x(), first.bias_vector()
    assert bias is not None
    dense = [torch.randn(rows, columns) / columns**0.5 for _ in range(copies(rows * columns * 4, tokens))]
    per_copy = [dense_baselines(weight, bias, x) for weight in dense]
    steps = {name: rotating([baselines[name] for baselines in per_copy]) for name in per_copy[0]}
    if tokens == 1:
        steps["own dense bf16"] = own_dense(dense, bias, x)
    for name, case in cases.items():
        steps[name] = sparse(case)
        torch.testing.assert_close(steps[name]().double(), case.expected(), **case.tolerance)
    fma, (read, read_bytes) = fma_limit(), read_limit()
    timings = interleave(steps | {"limit: read": read} | ({"limit: fma": fma[0]} if fma else {}), seconds)
    limits = {"read_bytes": read_bytes / timings.pop("limit: read").median}
    if fma:
        limits["fma_flops"] = threads * fma[1] / timings.pop("limit: fma").median
    baselines = [name for name in timings if name.startswith(BASELINES)]
    return [
        row(name, timing, timings, baselines)
        | {"threads": threads, "shape": list(shape), "tokens": tokens}
        | (rates(cases[name], timing, limits) if name in cases else {})
        for name, timing in timings.items()
    ]


def copies(nbytes: int, tokens: int) -> int:
    """For M = 1 as many weights as together exceed the caches, else just the one."""
    return COLD_BYTES // nbytes + 1 if tokens == 1 else 1


def sparse(case: NMLinearCase) -> Step:
    """Layers of the case's weight, each with tensors of its own."""
    weight, bias, x = case.weight(), case.bias_vector(), case.x()
    layers = [
        NMLinear.from_weight(NM(weight.values.clone(), weight.indices.clone(), weight.shape, weight.pattern), bias)
        for _ in range(copies(moved_bytes(case), case.tokens[0]))
    ]
    return rotating([partial(layer, x) for layer in layers])


def own_dense(dense: list[torch.Tensor], bias: torch.Tensor, x: torch.Tensor) -> Step:
    """The bfloat16 kernel for block-sparse weights with every 16x2 block stored, checked."""
    half, half_bias = x.bfloat16(), bias.bfloat16()
    weights = [BlockSparse.from_dense(weight.bfloat16(), (16, 2)) for weight in dense]
    weights += [weight.to(torch.bfloat16, copy=True) for weight in weights]  # half the bytes, so twice as many
    expected = torch.nn.functional.linear(half.double(), weights[0].to_dense().double(), half_bias.double())
    torch.testing.assert_close(bsr_linear(half, weights[0], half_bias).double(), expected, rtol=1.6e-2, atol=1e-2)
    return rotating([partial(bsr_linear, half, weight, half_bias) for weight in weights])


def moved_bytes(case: NMLinearCase) -> int:
    """Bytes of a 2:4 weight that a kernel reads: the values, and 2 bits for each."""
    stored = case.rows * case.columns // 2
    return stored * case.dtype.itemsize + stored // 4


def row(name: str, timing: Timing, timings: dict[str, Timing], baselines: list[str]) -> dict:
    best = min(baselines, key=lambda baseline: timings[baseline].median)
    return {
        "name": name,
        "seconds": timing.as_dict(),
        "speedup": {baseline: ratio(timings[baseline], timing).median for baseline in baselines},
        "best_dense": best,
    }


def rates(case: NMLinearCase, timing: Timing, limits: dict[str, float]) -> dict:
    """FLOP/s on stored weights, bytes of weights per second, and the share of the limit that binds.

    That is memory for one token on cold weights, else the float32 FMA units; a bfloat16 dot product may do
    twice what they do.
    """
    tokens = case.tokens[0]
    flops = tokens * case.rows * case.columns / timing.median
    moved = moved_bytes(case) / timing.median
    bound = "bandwidth" if tokens == 1 else "fma"
    limit = limits["read_bytes"] if tokens == 1 else limits.get("fma_flops")
    share = (moved if tokens == 1 else flops) / limit if limit else None
    return {"flops": flops, "bytes_per_second": moved, "limits": limits, "bound": bound, "share_of_limit": share}


def show(results: list[dict]) -> None:
    console = Console(width=170)
    counts = sorted({result["threads"] for result in results})
    console.print(machine_line({**machine(), "threads": " and ".join(map(str, counts))}), highlight=False)
    table = Table(title="2:4, median time; ratio of times, interleaved; M = 1 with cold weights")
    baselines = list(results[0]["speedup"])
    for title in ("threads", "N x K", "M", "weights", "us", "spread", *(f"x {b}" for b in baselines), "share of limit"):
        table.add_column(title, justify="right")
    for result in results:
        if "flops" not in result:
            continue
        seconds, share, speedup = result["seconds"], result["share_of_limit"], result["speedup"]
        table.add_row(
            str(result["threads"]),
            "x".join(map(str, result["shape"])),
            str(result["tokens"]),
            result["name"],
            f"{seconds['median'] * 1e6:.0f}",
            f"{(seconds['p80'] - seconds['p20']) / seconds['median']:.0%}",
            *(f"{speedup[baseline]:.2f}" if baseline in speedup else "" for baseline in baselines),
            f"{share:.0%} {result['bound']}" if share else "-",
        )
    console.print(table)


def plot(results: list[dict], path: Path) -> None:
    """Speed-up over the dense layers of the same dtype and the best of all against M, per shape, most threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(result["threads"] for result in results)
    rows = [result for result in results if result["threads"] == threads and "flops" in result]
    shapes = list(dict.fromkeys(tuple(result["shape"]) for result in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.8 * len(shapes), 3.6), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name, baseline in (("2:4 fp32", "torch fp32"), ("2:4 bf16", "torch bf16"), ("2:4 bf16", "best dense")):
            cells = [result for result in rows if tuple(result["shape"]) == shape and result["name"] == name]
            ratios = [r["speedup"][r["best_dense"] if baseline == "best dense" else baseline] for r in cells]
            axis.plot([r["tokens"] for r in cells], ratios, marker="o", label=f"{name} over {baseline}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{shape[1]} -> {shape[0]}", xlabel="tokens M (1: cold weights)", xscale="log", yscale="log")
        axis.set_yticks([0.5, 1, 2, 5, 10], labels=["0.5", "1", "2", "5", "10"])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times faster than dense")
    axes[0][-1].legend(fontsize=8)
    here = {**machine(), "threads": threads}
    figure.suptitle(f"nm_linear 2:4, {threads} threads\n{machine_line(here)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
