"""bsr_linear against dense layers: time, speed-up, share of the machine's limit, and the targets.

    python bench/bsr_linear.py [--quick] [--only targets|blocks|scaling|real] [--peers] [--model DIR]

targets  float32, bfloat16 and int8 in the block each runs best with, three shapes, 1 to 512 tokens
blocks   other blocks, and AVX2, for 768 -> 3072
scaling  time against tokens, and against nonzeros
real     the layers of a really pruned model beside uniform masks of the same density

Each group of steps runs interleaved in this process, one group for each shape, number of tokens M and number
of threads, and each result is checked before it is timed. M = 1 runs on weights that come from memory: sets
of them rotate, 64 MB at least. Otherwise each step is warm: an untimed call of its own precedes each sample.
Writes bsr_linear.json and its plots, and prints the targets; the JSON holds the parts that ran, and no others.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import peers
import plots
import tables
import torch
from candidates import DEFAULT_BLOCKS, Candidate, in_default_blocks, in_every_block
from real_weights import measure_layers, pruned_weights
from scaling import measure_scaling
from targets import judge
from torch import Tensor

from sparsenlp import BlockSparse, CheckpointError
from sparsenlp.measure import Timing, interleave, ratio, use_threads

Row = dict[str, Any]
PARTS = ("targets", "blocks", "scaling", "real")


@dataclass(frozen=True)
class Sweep:
    """What is measured. `seconds` is for each group of steps, `layer_seconds` for a model's layer at one M."""

    shapes: tuple[tuple[int, int], ...] = ((3072, 768), (768, 3072), (768, 768))  # (N, K)
    tokens: tuple[int, ...] = (1, 16, 128, 512)
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    block_shape: tuple[int, int] = (3072, 768)
    block_tokens: tuple[int, ...] = (16, 128, 512)
    block_sparsities: tuple[float, ...] = (0.5, 0.9)
    scaling_tokens: tuple[int, ...] = (16, 17, 32, 64, 100, 128, 256, 300, 512, 1024, 2048, 4096)
    few_tokens: tuple[int, ...] = tuple(range(1, 41))
    scaling_sparsities: tuple[float, ...] = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    model_tokens: tuple[int, ...] = (16, 128, 512)
    model_layers: int | None = None  # the first of them; None for all
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 8.0
    layer_seconds: float = 0.4


QUICK = Sweep(
    shapes=((768, 768),),
    tokens=(1, 128),
    sparsities=(0.5, 0.9),
    block_shape=(768, 768),
    block_tokens=(128,),
    scaling_tokens=(16, 64),
    few_tokens=(1, 8, 9),
    scaling_sparsities=(0.5, 0.9),
    model_tokens=(16,),
    model_layers=2,
    threads=(1,),
    seconds=0.2,
    layer_seconds=0.05,
)


def main() -> None:
    arguments = parse_arguments()
    sweep = QUICK if arguments.quick else Sweep()
    if arguments.threads:
        sweep = replace(sweep, threads=tuple(arguments.threads))
    parts = {arguments.only} if arguments.only else set(PARTS)
    for sentence in peers.missing().values() if arguments.peers else ():
        print(sentence)
    try:
        weights = pruned_weights(arguments.model, sweep.model_layers) if "real" in parts else {}  # may fail, so first
    except (CheckpointError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"bench: {error}")
    record: dict[str, list[Row]] = {"targets": [], "results": [], "scaling": [], "real": []}
    with torch.inference_mode():
        for threads in sweep.threads:
            with use_threads(threads):
                if "targets" in parts:
                    record["results"] += measure_default_blocks(sweep, arguments.peers)
                if "blocks" in parts:
                    record["results"] += measure_every_block(sweep)
                if "scaling" in parts:
                    axes = (sweep.scaling_tokens, sweep.few_tokens, sweep.scaling_sparsities)
                    record["scaling"] += measure_scaling(*axes, seconds=sweep.seconds)
                record["real"] += measure_layers(weights, sweep.model_tokens, sweep.layer_seconds)
    record["targets"] = judge(record["results"])
    tables.show(record, arguments.verbose)
    harness.write_record(arguments.output / "bsr_linear.json", **record)
    plots.draw(record, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON and the plots")
    parser.add_argument("--quick", action="store_true", help="a few points, in seconds, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads, default 1 2")
    parser.add_argument("--only", choices=PARTS, help="run, and record, this part alone")
    parser.add_argument("--peers", action="store_true", help="other engines too, where installed (targets, M > 1)")
    parser.add_argument("--model", type=Path, help="directory of a sparse model; default: MiniLM, pruned here")
    parser.add_argument("--verbose", action="store_true", help="print every cell")
    return parser.parse_args()


def measure_default_blocks(sweep: Sweep, with_peers: bool) -> list[Row]:
    """The part "targets", on torch's threads."""
    candidates = in_default_blocks(sweep.sparsities)
    return [
        row | {"part": "targets"}
        for shape in sweep.shapes
        for tokens in sweep.tokens
        for row in measure_group(shape, tokens, candidates, sweep.seconds, with_peers)
    ]


def measure_every_block(sweep: Sweep) -> list[Row]:
    """The part "blocks", on torch's threads."""
    candidates = in_every_block(sweep.block_sparsities)
    return [
        row | {"part": "blocks"}
        for tokens in sweep.block_tokens
        for row in measure_group(sweep.block_shape, tokens, candidates, sweep.seconds, with_csr=tokens == 128)
    ]


def measure_group(
    shape: tuple[int, int],
    tokens: int,
    candidates: list[Candidate],
    seconds: float,
    with_peers: bool = False,
    with_csr: bool = False,
) -> list[Row]:
    """Time the candidates and the dense layers of one shape, interleaved: a row for each.

    with_peers  adds the engines of peers.py, but not for one token: cold sets of theirs take minutes to build
    with_csr    adds torch's CSR on the weights of the last float32 8x1 candidate
    """
    cold, threads = tokens == 1, torch.get_num_threads()
    generator = torch.Generator().manual_seed(7)
    dense = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    x, bias = torch.randn(tokens, shape[1], generator=generator), torch.randn(shape[0], generator=generator)
    steps = harness.dense_baselines(dense, bias, x, cold)
    if with_peers and not cold:
        steps |= peers.dense_peers(dense, bias, x, threads)
    baselines = list(steps)
    weights: dict[Candidate, BlockSparse] = {}
    for candidate in candidates:
        steps[str(candidate)], weights[candidate] = candidate.prepare(shape, tokens, cold)
    rivals = sparse_rivals(weights, bias, x, with_peers and not cold, with_csr)
    for engines in rivals.values():
        steps |= dict(engines.values())
    steps |= harness.limit_steps()
    pause = peers.SETTLE_SECONDS if with_peers else 0.0
    timings = interleave(harness.warmed(steps, pause), 2 * seconds if with_peers else seconds)
    limits = harness.limits(timings, threads)
    group = {"shape": list(shape), "tokens": tokens, "threads": threads, "limits": limits}
    best = min(baselines, key=lambda name: timings[name].median)
    rows = [
        {"name": name, "dtype": None, "seconds": timings[name].as_dict(), "best_dense": best} | group
        for name in baselines
    ]
    for candidate, weight in weights.items():
        against = {name: name for name in baselines}
        against |= {name: step_name for name, (step_name, _) in rivals.get(candidate.sparsity, {}).items()}
        row = candidate_row(candidate, timings, against) | {"best_dense": best}
        rows.append(row | rates(row, weight, tokens, limits) | group)
    return rows


def sparse_rivals(
    weights: dict[Candidate, BlockSparse], bias: Tensor, x: Tensor, with_peers: bool, with_csr: bool
) -> dict[float, dict[str, tuple[str, harness.Step]]]:
    """sparsity -> engine -> (name of its step, step), for engines that skip zeros, on the float32 8x1 weights."""
    found: dict[float, dict[str, tuple[str, harness.Step]]] = {}
    for candidate, weight in weights.items():
        if candidate == Candidate("f32", DEFAULT_BLOCKS["f32"], candidate.sparsity):
            dense, engines = weight.to_dense(), {}
            if with_peers:
                engines = peers.sparse_peers(dense, bias, x, torch.get_num_threads())
            if with_csr and candidate.sparsity == max(c.sparsity for c in weights):  # far behind: one point will do
                engines["torch CSR"] = harness.csr(dense, bias, x)
            found[candidate.sparsity] = {
                name: (f"{name} {candidate.sparsity:.0%}", step) for name, step in engines.items()
            }
    return found


def candidate_row(candidate: Candidate, timings: dict[str, Timing], against: dict[str, str]) -> Row:
    """Time and ratios; `against` has the name of each rival, dense or not, and of its step."""
    own = timings[str(candidate)]
    default = replace(candidate, block=DEFAULT_BLOCKS[candidate.dtype], isa_cap="")
    return {
        "name": f"{candidate.dtype} {candidate.block_name} {candidate.isa_cap}".strip(),
        "dtype": candidate.dtype,
        "block": candidate.block_name,
        "isa_cap": candidate.isa_cap,
        "sparsity": candidate.sparsity,
        "seconds": own.as_dict(),
        "speedup": {name: ratio(timings[step], own).median for name, step in against.items()},
        "time_over_default_block": ratio(own, timings[str(default)]).median,
    }


def rates(row: Row, weight: BlockSparse, tokens: int, limits: dict[str, float]) -> Row:
    """FLOP/s on stored weights, bytes of weights and indices per second, and the share of the limit that binds.

    That is memory for one token on cold weights, else the FMA units or, for bf16 and int8, the dot products
    (see `harness.dot_product_factor`).
    """
    seconds = row["seconds"]["median"]
    flops, moved = 2 * tokens * weight.values.numel() / seconds, weight.nbytes / seconds
    if tokens == 1:
        bound, share = "bandwidth", moved / limits["read_bytes"]
    else:
        factor = harness.dot_product_factor(row["dtype"])
        bound = "FMA" if factor == 1 else f"{factor} x FMA"
        share = flops / (factor * limits["fma_flops"]) if "fma_flops" in limits else None
    return {"flops": flops, "bytes_per_second": moved, "bound": bound, "share_of_limit": share}


if __name__ == "__main__":
    main()
