"""Whole encoders: ours against the dense ways to run them, and other engines; latency, throughput, memory, targets.

    python bench/end_to_end.py [--peers] [--full | --quick]
    python bench/end_to_end.py --model BERT-base --batch 4 --tokens 64 --zeros 0.8 0.95 uneven --ragged
    python bench/end_to_end.py --model DIR    # a model that sparsenlp wrote, with its own zeros

Without options it measures what the targets are about: BERT-base at 90 and 80 % zeros, and MiniLM-L6. --full
sweeps models, batches, lengths and zeros, for hours. Blocks are 8x1 in fp32, 8x2 in bf16 and 8x4 in int8.

Each group is one model, input and number of threads. Every engine runs the same masked model (its dense weights
with zeros), must find its hidden states, and is then visited in turn with the others, several calls at a time:
the caches are warm, as in a server. Other engines run in processes of their own (see bench/model_peers.py for how
to install them; --peers uses those that are there). Writes end_to_end.json and end_to_end.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import encoders
import harness
import model_peers
import model_tables
import torch
from breakdown import breakdown, dispatch
from encoders import BLOCKS, MODELS, Setting
from footprint import AVAILABLE as FOOTPRINT_AVAILABLE
from footprint import footprint
from model_latency import Group, Zeros, measure, say
from model_targets import judge, judge_memory, judge_overhead

from sparsenlp import CheckpointError, save_pretrained
from sparsenlp.benchmark import BASELINES
from sparsenlp.classifiers import silent_transformers
from sparsenlp.measure import use_threads

Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What is measured. `seconds` is for each group.

    detail  the model whose breakdown and memory are taken, at 90 % zeros and 1 x 128; None for none
    """

    models: tuple[str, ...] = ("BERT-base",)
    batches: tuple[int, ...] = (1,)
    tokens: tuple[int, ...] = (128,)
    zeros: tuple[Zeros, ...] = (0.9,)
    ragged: tuple[bool, ...] = (False,)
    threads: tuple[int, ...] = (2,)
    precisions: tuple[str, ...] = tuple(BLOCKS)
    baselines: tuple[str, ...] = tuple(BASELINES)
    seconds: float = 30.0
    detail: str | None = None

    def groups(self) -> list[Group]:
        return [
            Group(
                model,
                Setting(batch, tokens, ragged),
                self.zeros if model in MODELS else ("own",),
                threads,
                self.precisions,
                self.baselines,
            )
            for threads in self.threads
            for model in self.models
            for batch in self.batches
            for tokens in self.tokens
            for ragged in (self.ragged if batch > 1 else (False,))
        ]


TARGETS = Sweep(zeros=(0.8, 0.9), detail="BERT-base")
FULL = Sweep(
    models=("BERT-base", "MiniLM-L6"),
    batches=(1, 4, 16, 32),
    tokens=(16, 64, 128, 384, 512),
    zeros=(0.0, 0.5, 0.8, 0.9, 0.95, "uneven"),
    ragged=(False, True),
    detail="BERT-base",
)
QUICK = Sweep(
    models=("tiny",),
    batches=(2,),
    tokens=(16,),
    threads=(1,),
    precisions=("fp32", "int8"),
    baselines=("eager fp32", "dynamic int8"),
    seconds=0.2,
    detail="tiny",
)


def target_groups(sweep: Sweep) -> list[Group]:
    """What the targets cover: all of it with the first number of threads, batch 1 with others."""
    first = sweep.threads[0]
    cells = [("BERT-base", 1, 128), ("MiniLM-L6", 1, 32), ("BERT-base", 1, 384), ("BERT-base", 16, 128)]
    return [
        Group(model, Setting(batch, tokens), sweep.zeros, threads, sweep.precisions, sweep.baselines)
        for threads in sweep.threads
        for model, batch, tokens in (cells if threads == first else cells[:2])
    ]


def main() -> None:
    arguments = parse_arguments()
    sweep, groups = plan(arguments)
    record: dict[str, Any] = {"targets": [], "results": [], "breakdowns": [], "footprints": [], "peers": {}}
    try:
        if arguments.peers:
            record["peers"] = model_peers.versions()
            for sentence in model_peers.missing(record["peers"]):
                print(sentence)
        for group in groups:
            record["results"] += measure(group, sweep.seconds, record["peers"])
    except (CheckpointError, ModuleNotFoundError, model_peers.PeerError, ValueError) as error:
        sys.exit(f"bench: {error}")
    if sweep.detail is not None:
        record["breakdowns"], record["footprints"] = details(sweep.detail, sweep)
    overhead, memory = judge_overhead(record["breakdowns"]), judge_memory(record["footprints"])
    record["targets"] = judge(record["results"]) + overhead + memory
    model_tables.show(record)
    harness.write_record(arguments.output / "end_to_end.json", **record)
    model_tables.draw(record["results"], arguments.output / "end_to_end.png")
    if wrong := [row["name"] for row in record["results"] if row["ours"] and row["missing"]]:
        sys.exit(f"bench: expected the masked model's results, got others from {', '.join(wrong)}")


def plan(arguments: argparse.Namespace) -> tuple[Sweep, list[Group]]:
    """The sweep that the options ask for, and its groups."""
    chosen = {
        "models": arguments.model,
        "batches": arguments.batch,
        "tokens": arguments.tokens,
        "zeros": arguments.zeros,
        "ragged": (True,) if arguments.ragged else None,
    }
    chosen = {name: tuple(value) for name, value in chosen.items() if value}
    if arguments.quick:
        sweep = QUICK
    elif arguments.full:
        sweep = FULL
    else:
        sweep = Sweep() if chosen else TARGETS
    common = {"threads": arguments.threads, "precisions": arguments.precision, "baselines": arguments.baseline}
    chosen |= {name: tuple(value) for name, value in common.items() if value}
    if arguments.seconds is not None:
        chosen["seconds"] = arguments.seconds
    is_targets = sweep is TARGETS
    sweep = replace(sweep, **chosen)
    if is_targets and not arguments.threads:
        sweep = replace(sweep, threads=(2, 1))
    return sweep, target_groups(sweep) if is_targets else sweep.groups()


def details(model: str, sweep: Sweep) -> tuple[list[Row], list[Row]]:
    """(breakdowns, footprints) of a model at 90 % zeros and 1 x 128 in each precision."""
    setting, zeros = Setting(1, 128), 0.9
    dense = encoders.load(model)
    inputs = encoders.make_inputs(dense, setting)
    breakdowns, footprints = [], []
    about = {"model": model, "batch": 1, "tokens": 128, "ragged": False, "threads": sweep.threads[0], "zeros": zeros}
    with use_threads(sweep.threads[0]) as threads, tempfile.TemporaryDirectory() as folder:
        if FOOTPRINT_AVAILABLE:
            with silent_transformers():
                dense.save_pretrained(folder)  # type: ignore[operator]
            footprints.append(about | {"name": "dense fp32", "ours": False, **footprint(folder, None, inputs, threads)})
        for precision in sweep.precisions:
            say(f"{model}: memory and breakdown, {precision}")
            own = about | {"precision": precision, "name": f"sparsenlp {precision} {zeros:.0%}", "ours": True}
            reference = encoders.masked(dense, zeros, BLOCKS[precision])
            ours = encoders.sparse(reference, precision)
            if FOOTPRINT_AVAILABLE:
                with tempfile.TemporaryDirectory() as directory, silent_transformers():
                    save_pretrained(ours, directory)
                    footprints.append(own | footprint(directory, precision, inputs, threads))
            hollow = encoders.sparse(encoders.masked(encoders.hollow(dense), zeros, BLOCKS[precision]), precision)
            with torch.inference_mode():
                fused, hollow = (encoders.fused(model, precision) for model in (ours, hollow))
                breakdowns.append(own | breakdown(fused, inputs) | dispatch(fused, inputs, hollow))
    return breakdowns, footprints


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("bench/results"), help="folder for the JSON and the plot")
    add("--full", action="store_true", help="every model, batch, length and sparsity")
    add("--quick", action="store_true", help="a tiny model, in seconds, to see that it runs")
    add("--peers", action="store_true", help="other engines too, where installed")
    add("--model", nargs="+", help=f"{', '.join(MODELS)}, or the directory of a sparse model")
    add("--batch", type=int, nargs="+", help="sequences at a time")
    add("--tokens", type=int, nargs="+", help="tokens of a sequence")
    add("--zeros", type=parse_zeros, nargs="+", help='fractions, or "uneven": from 60 to 99 %% by layer')
    add("--ragged", action="store_true", help="sequences of different lengths, padded (batch > 1)")
    add("--precision", choices=tuple(BLOCKS), nargs="+", help="of ours")
    add("--baseline", choices=tuple(BASELINES), nargs="+", help="dense ways of torch")
    add("--threads", type=int, nargs="+", help="numbers of threads, default 2; targets: 2 and 1")
    add("--seconds", type=float, help="of timing for each group")
    return parser.parse_args()


def parse_zeros(text: str) -> Zeros:
    if text == "uneven":
        return text
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'expected a fraction from 0 to below 1, or "uneven", got {text}')
    return value


if __name__ == "__main__":
    main()
