"""bsr_linear against torch's dense layers: time, FLOP/s and share of the machine's limit.

    python bench/bsr_linear.py [--quick] [--output bench/results]

For each number of threads, tokens M and sparsity, all candidates run interleaved in this process and
the result of each is checked before it is timed. M = 1 runs on weights that come from memory: sets of
them rotate, 64 MB at least. Writes bsr_linear.json and bsr_linear.png and prints a table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from harness import csr, dense_baselines, fma_limit, read_limit, rotating, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsenlp import BlockSparse
from sparsenlp.measure import Timing, interleave, machine, machine_line, ratio, use_threads
from sparsenlp.ops import bsr_linear

from cases import BsrLinearCase  # isort: skip  (found through harness)

COLD_BYTES = 64 << 20
CSR_TOKENS = 128  # torch's CSR is timed here only: it is far behind, and slow to wait for


@dataclass(frozen=True)
class Sweep:
    shapes: tuple[tuple[int, int], ...] = ((3072, 768),)  # (N, K)
    blocks: tuple[tuple[int, int], ...] = ((8, 1), (16, 1), (4, 1), (8, 8), (32, 32))
    tokens: tuple[int, ...] = (1, 16, 128, 512)
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.5


QUICK = Sweep(blocks=((8, 1),), tokens=(1, 128), sparsities=(0.5, 0.9), threads=(1,), seconds=0.2)


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
                    for sparsity in sweep.sparsities
                    for row in measure(shape, tokens, sparsity, threads, sweep)
                ]
    show(results)
    write_record(arguments.output / "bsr_linear.json", results=results)
    plot(results, arguments.output / "bsr_linear.png")


def measure(shape: tuple[int, int], tokens: int, sparsity: float, threads: int, sweep: Sweep) -> list[dict]:
    """One cell of the sweep: a row for each candidate."""
    rows, columns = shape
    cases = {
        block: BsrLinearCase((tokens,), rows, columns, block, density=1 - sparsity, seed=7) for block in sweep.blocks
    }
    first = cases[sweep.blocks[0]]
    x, bias = first.x(), first.bias_vector()
    assert bias is not None
    copies = COLD_BYTES // (rows * columns * 4) + 1 if tokens == 1 else 1
    dense = [torch.randn(rows, columns) / columns**0.5 for _ in range(copies)]
    per_copy = [dense_baselines(weight, bias, x) for weight in dense]
    steps = {name: rotating([baselines[name] for baselines in per_copy]) for name in per_copy[0]}
    weights = {}
    for block, case in cases.items():
        weights[block] = cold_copies(case.weight(), tokens)
        steps[f"{block[0]}x{block[1]}"] = rotating([partial(bsr_linear, x, weight, bias) for weight in weights[block]])
        check(steps, block, case, x, bias)
    if tokens == CSR_TOKENS:
        steps["torch CSR"] = csr(weights[sweep.blocks[0]][0].to_dense(), bias, x)
    fma, (read, read_bytes) = fma_limit(), read_limit()
    limit_steps = {"limit: read": read} | ({"limit: fma": fma[0]} if fma else {})
    timings = interleave(steps | limit_steps, sweep.seconds)
    limits = {"read_bytes": read_bytes / timings.pop("limit: read").median}
    if fma:
        limits["fma_flops"] = threads * fma[1] / timings.pop("limit: fma").median
    baselines = [name for name in timings if name.startswith(("torch", "oneDNN"))]
    return [
        row(name, timing, timings, baselines)
        | {"threads": threads, "shape": list(shape), "tokens": tokens, "sparsity": sparsity}
        | ({} if name in baselines else rates(name, timing, weights, tokens, limits))
        for name, timing in timings.items()
    ]


def cold_copies(weight: BlockSparse, tokens: int) -> list[BlockSparse]:
    """For M = 1 as many copies as together exceed the caches, else just the one."""
    if tokens > 1:
        return [weight]
    copies = COLD_BYTES // max(weight.nbytes, 1) + 1
    return [
        BlockSparse(weight.crow_indices.clone(), weight.col_indices.clone(), weight.values.clone(), weight.shape)
        for _ in range(copies)
    ]


def check(steps: dict, block: tuple[int, int], case: BsrLinearCase, x: Tensor, bias: Tensor) -> None:
    """A wrong result is never timed."""
    expected = torch.nn.functional.linear(x.double(), case.weight().to_dense().double(), bias.double())
    torch.testing.assert_close(steps[f"{block[0]}x{block[1]}"]().double(), expected, **case.tolerance)


def row(name: str, timing: Timing, timings: dict[str, Timing], baselines: list[str]) -> dict:
    best = min(baselines, key=lambda baseline: timings[baseline].median)
    return {
        "name": name,
        "seconds": timing.as_dict(),
        "speedup": {baseline: ratio(timings[baseline], timing).median for baseline in baselines},
        "best_dense": best,
    }


def rates(name: str, timing: Timing, weights: dict, tokens: int, limits: dict[str, float]) -> dict:
    """FLOP/s on stored weights, bytes of weights and indices per second, and the share of the limit that binds.

    That is memory for one token on cold weights, else the FMA units.
    """
    weight = next(copies[0] for (n, k), copies in weights.items() if f"{n}x{k}" == name)
    flops, moved = 2 * tokens * weight.values.numel() / timing.median, weight.nbytes / timing.median
    if tokens == 1:
        share = moved / limits["read_bytes"]
    else:
        share = flops / limits["fma_flops"] if "fma_flops" in limits else None
    bound = "bandwidth" if tokens == 1 else "fma"
    return {"flops": flops, "bytes_per_second": moved, "limits": limits, "bound": bound, "share_of_limit": share}


def show(results: list[dict]) -> None:
    console = Console(width=150)
    counts = sorted({result["threads"] for result in results})
    console.print(machine_line({**machine(), "threads": " and ".join(map(str, counts))}), highlight=False)
    for threads in counts:
        console.print(limit_line([r["limits"] for r in results if r["threads"] == threads and "limits" in r], threads))
    table = Table(title="float32, median time; ratio of times, interleaved; M = 1 with cold weights")
    baselines = list(results[0]["speedup"])
    for title in ("threads", "N x K", "M", "sparsity", "block", "us", "spread", *(f"x {b}" for b in baselines)):
        table.add_column(title, justify="right")
    table.add_column("share of limit", justify="right")
    for result in results:
        if "flops" not in result:
            continue
        seconds, share = result["seconds"], result["share_of_limit"]
        table.add_row(
            str(result["threads"]),
            "x".join(map(str, result["shape"])),
            str(result["tokens"]),
            f"{result['sparsity']:.0%}",
            result["name"],
            f"{seconds['median'] * 1e6:.0f}",
            f"{(seconds['p80'] - seconds['p20']) / seconds['median']:.0%}",
            *(f"{result['speedup'][baseline]:.1f}" for baseline in baselines),
            f"{share:.0%} {result['bound']}" if share else "-",
        )
    console.print(table)


def limit_line(limits: list[dict[str, float]], threads: int) -> str:
    """The machine's limits as they were while it was measured: from the least to the most."""
    texts = []
    for name, unit in (("fma_flops", "GFLOP/s fp32 FMA"), ("read_bytes", "GB/s read from memory")):
        values = [limit[name] / 1e9 for limit in limits if name in limit]
        texts += [f"{min(values):.0f} to {max(values):.0f} {unit}"] if values else []
    return f"limits on {threads} threads, measured among the rest: {', '.join(texts)}"


def plot(results: list[dict], path: Path) -> None:
    """Speed-up over each dense baseline against sparsity, one panel per number of tokens, most threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(result["threads"] for result in results)
    rows = [r for r in results if r["threads"] == threads and "flops" in r]
    tokens = sorted({r["tokens"] for r in rows})
    block = rows[0]["name"]
    figure, axes = plt.subplots(1, len(tokens), figsize=(3.6 * len(tokens), 3.6), sharey=True, squeeze=False)
    for axis, m in zip(axes[0], tokens, strict=True):
        cells = [r for r in rows if r["tokens"] == m and r["name"] == block]
        x = [100 * r["sparsity"] for r in cells]
        for baseline in [b for b in cells[0]["speedup"] if b != "torch CSR"]:
            axis.plot(x, [r["speedup"][baseline] for r in cells], marker="o", label=f"over {baseline}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"M = {m}" + (" (cold weights)" if m == 1 else ""), xlabel="sparsity, %", yscale="log")
        axis.set_yticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times faster than dense")
    axes[0][-1].legend(fontsize=8)
    rows_, columns = cells[0]["shape"]
    here = {**machine(), "threads": threads}
    figure.suptitle(
        f"bsr_linear fp32, {block} blocks, {columns} -> {rows_}, {threads} threads\n{machine_line(here)}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
