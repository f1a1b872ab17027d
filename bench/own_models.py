"""The models of this project: what 80 % zeros cost each, and how much faster they make it.

    python bench/own_models.py [--quick] [--wordnet PATH] [--only textcnn lstm-lm] [--untimed | --timed]

Trains each model on its task as `sparsenlp train` does, prunes it as `sparsenlp prune` does, judges it dense, with
zeros, and with sparse layers, and keeps all that under --records: a re-run does only what is missing. Then each is
converted and timed, beside its dense form in eager fp32 and bf16 and in dynamic int8, interleaved in one process,
whole forward passes without padding (an encoder-decoder reads and predicts as many tokens). One seed. Accuracies do
not depend on the machine's load; latencies do.

Writes own_models.json and prints a table and whether every model is faster than torch in fp32. Needs the packages of
sparsenlp/data/demo.py and pronunciations.py and WordNet's data.noun; a model whose texts are absent is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import write_record
from rich.console import Console
from rich.table import Table

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.benchmark import Setting, bench
from sparsenlp.classifiers import load_model, save_model
from sparsenlp.demo.records import write_json
from sparsenlp.measure import machine, machine_line, ratio, use_threads
from sparsenlp.prune import finalize_, sparsity_of
from sparsenlp.recipe import Data, Recipe, prepare, train_new
from sparsenlp.train import FinetuneConfig

Row = dict[str, Any]

SPARSITY = 0.8
BATCHES = (1, 32)
BASELINES = ("eager fp32", "eager bf16", "dynamic int8")
TARGET = 1.0
"""Times as fast as torch in fp32, at least."""
NUMBERS = ("accuracy", "exact", "perplexity")
FLOORS = ("majority", "majority", "unigram")
"""Of a quality: the main number, and what a model reaches that does not look at its input."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model, its texts and how it is trained; the rest as the commands do by default.

    data            as in a recipe
    epochs, recovery   of training and of recovery
    tokens          of each text that is timed
    """

    model: str
    data: Mapping[str, Any]
    epochs: int = 5
    recovery: int = 1
    tokens: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)


REVIEWS = {"task": "rotten_tomatoes"}
SIBLINGS = {"task": "sibling_definitions", "count": 16_000}
CELLS: dict[str, Cell] = {
    "textcnn": Cell(model="textcnn", data=REVIEWS),
    "birnn": Cell(model="birnn", data=REVIEWS),
    "selfattention": Cell(model="selfattention", data=REVIEWS),
    "matcher, vectors": Cell(model="matcher", data=SIBLINGS, epochs=2),
    "matcher, words": Cell(model="matcher", data=SIBLINGS, epochs=2, options={"comparison": "words"}),
    "lstm-lm": Cell(
        model="lstm-lm",
        data=REVIEWS,
        epochs=8,
        recovery=2,
        options={"embedding_size": 256, "hidden_size": 256, "dropout": 0.5, "tie_word_embeddings": True},
    ),
    "seq2seq": Cell(
        model="seq2seq",
        data={"task": "pronunciations", "count": 16_000, "max_length": 24},
        recovery=3,
        tokens=8,
        options={"hidden_size": 256},
    ),
}


def main() -> int:
    arguments = parse_arguments()
    cells = quick_cells(arguments.records) if arguments.quick else CELLS
    chosen = {name: cells[name] for name in arguments.only or cells}
    if not arguments.timed:
        for name, cell in chosen.items():
            if result_of(arguments.records, name, cell) is None:
                train(name, cell, arguments.records, arguments.wordnet)
    done = {name: cell for name, cell in chosen.items() if result_of(arguments.records, name, cell) is not None}
    rows = []
    for name, cell in done.items():
        row = {"model": name, **(result_of(arguments.records, name, cell) or {})}
        if not arguments.untimed:
            print(f"timing {name} ...", file=sys.stderr, flush=True)
            folder = arguments.records / name
            row["latency"] = measure(folder, cell, arguments.threads, arguments.seconds, arguments.quick)
        rows.append(row)
    if not rows:
        return 1
    show(rows)
    if not arguments.untimed:
        targets = judge(rows)
        show_targets(targets, arguments.threads)
        missing = [name for name in cells if name not in done]
        record = {"threads": arguments.threads, "missing": missing, "targets": targets, "results": rows}
        write_record(arguments.output / "own_models.json", **record)
    return 0


def train(name: str, cell: Cell, records: Path, wordnet: Path | None) -> None:
    """The dense and the pruned model in folders of their own, and a record of how good they are."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    folder, start = records / name, time.perf_counter()
    data = cell.data | ({"path": str(wordnet)} if wordnet is not None and cell.model == "matcher" else {})
    finetuning = FinetuneConfig(epochs=cell.epochs, learning_rate=2e-3)
    dense, pruned = folder / "dense", folder / "pruned"
    try:
        with use_threads(1):
            train_new(cell.model, Data(**data), dense, finetuning, cell.options)
            trained = time.perf_counter()
            recipe = {"model": str(dense), "data": data, "prune": {"sparsity": SPARSITY}}
            job = prepare(Recipe.of(recipe | {"recover": {"epochs": cell.recovery}}), pruned)
            task, model, tokenizer = job.task, copy.deepcopy(job.model), job.task.tokenizer
            reference = task.outputs(job.model)
            task.recover(model, job.model, job.recipe, None, folder / "recover.safetensors")  # type: ignore[attr-defined]
            finalize_(model)
            row = {"dense": quality(task.judge(reference)), "sparsity": sparsity_of(model)}
            row["pruned"] = quality(task.judge(task.outputs(model), reference))
            row["seconds"] = {"train": trained - start, "recover": time.perf_counter() - trained}
            save_model(model, pruned, tokenizer)
            sparsify_(model, SparsifyConfig(min_sparsity=0.0, measure="off"))
            row["converted"] = quality(task.judge(task.outputs(model), reference))
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"own_models: {name} is left out: {error}", file=sys.stderr)
        return
    (folder / "recover.safetensors").unlink()
    write_json(folder / "result.json", {"cell": repr(cell), "result": row})


def result_of(records: Path, name: str, cell: Cell) -> Row | None:
    """What `train` kept, None if there is none or it was another cell's."""
    file = records / name / "result.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record["result"] if record["cell"] == repr(cell) else None


def quality(judged: Any) -> Row:
    return {key: value for key, value in judged.as_dict().items() if value is not None}


def measure(folder: Path, cell: Cell, threads: int, seconds: float, quick: bool = False) -> list[Row]:
    """For each batch size the seconds of every way to run it, and times as fast as torch fp32 and the best dense.

    quick   convert without measuring
    """
    dense, model = (load_model(str(folder / name)) for name in ("dense", "pruned"))
    settings = [Setting(batch, cell.tokens) for batch in BATCHES]
    tokens = tuple(setting.batch * setting.tokens for setting in settings)
    how = "off" if quick else SparsifyConfig.measure
    plan = sparsify_(model, SparsifyConfig(token_counts=tokens, threads=threads, measure=how))
    report = bench(dense, {"sparse": model}, settings, BASELINES, threads, seconds)
    ways = {row.name.removesuffix(", eager fp32"): row.timings for row in report.rows}
    rows = []
    for setting in settings:
        times = {name: timings[setting] for name, timings in ways.items() if setting in timings}
        best = report.best_dense(setting)
        assert best is not None
        over = {"fp32": ratio(times[BASELINES[0]], times["sparse"]), "best": ratio(times[best.name], times["sparse"])}
        rows.append(
            {
                "batch": setting.batch,
                "tokens": setting.tokens,
                "seconds": {name: timing.as_dict() for name, timing in times.items()},
                "best_dense": best.name,
                "speedup": {name: each.as_dict() for name, each in over.items()},
                "sparse_layers": list(plan.converted),
            }
        )
    return rows


def judge(rows: list[Row]) -> list[Row]:
    """A row for each model and batch size."""
    return [
        {
            "title": f"{row['model']}, {cell['batch']} x {cell['tokens']}, x torch fp32",
            "value": cell["speedup"]["fp32"]["median"],
            "target": TARGET,
            "reached": cell["speedup"]["fp32"]["p20"] > TARGET,
        }
        for row in rows
        for cell in row["latency"]
    ]


def show(rows: list[Row]) -> None:
    console = Console(width=160)
    table = Table(title=f"{SPARSITY:.0%} zeros; ms, medians; in brackets x torch fp32, x the best dense way")
    titles = ("model", "metric", "without input", "dense", "zeros", "pruned", "sparse layers")
    for title in (*titles, *(f"torch fp32, batch {b}" for b in BATCHES), *(f"sparse, batch {b}" for b in BATCHES)):
        table.add_column(title, justify="left" if title in titles[:2] else "right")
    for row in rows:
        metric, floor = next((n, f) for n, f in zip(NUMBERS, FLOORS, strict=True) if n in row["dense"])
        form = "{:.1f}" if metric == "perplexity" else "{:.1%}"
        numbers = [row["dense"][floor], *(row[kind][metric] for kind in ("dense", "pruned", "converted"))]
        none, dense, pruned, converted = map(form.format, numbers)
        cells = row.get("latency", [])
        times = [f"{1e3 * cell['seconds'][BASELINES[0]]['median']:.2f}" for cell in cells]
        for cell in cells:
            fp32, best = (cell["speedup"][name]["median"] for name in ("fp32", "best"))
            times.append(f"{1e3 * cell['seconds']['sparse']['median']:.2f} ({fp32:.1f}x, {best:.1f}x)")
        table.add_row(row["model"], metric, none, dense, f"{row['sparsity']:.1%}", pruned, converted, *times)
    console.print(table)


def show_targets(targets: list[Row], threads: int) -> None:
    table = Table(title="targets: faster than torch fp32 in at least 80 % of the rounds")
    for title in ("what", "value", "target", ""):
        table.add_column(title, justify="left" if title == "what" else "right")
    for row in targets:
        reached = "reached" if row["reached"] else "missed"
        table.add_row(row["title"], f"{row['value']:.2f}", f"> {row['target']:g}", reached)
    console = Console(width=120)
    console.print(table)
    console.print(machine_line({**machine(), "threads": threads}), highlight=False)


def quick_cells(records: Path) -> dict[str, Cell]:
    """Tiny models of every kind that learn which kind of word a text is made of, to see that it runs."""
    import tiny_bert  # found through harness

    records.mkdir(parents=True, exist_ok=True)
    data = {"train": str(tiny_bert.write_table(records / "texts.csv", count=400))}
    pairs = data | {"text_pair_column": "text"}
    answers = data | {"text_pair_column": "label"}
    small = {"embedding_size": 16, "hidden_size": 32}
    return {
        "textcnn": Cell(model="textcnn", data=data, tokens=8, options={"embedding_size": 16, "filters": 16}),
        "matcher, words": Cell(model="matcher", data=pairs, tokens=8, options=small | {"comparison": "words"}),
        "lstm-lm": Cell(model="lstm-lm", data=data, recovery=4, tokens=8, options=small),
        "seq2seq": Cell(model="seq2seq", data=answers, tokens=8, options=small),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("bench/results"), help="folder for the JSON")
    add("--records", type=Path, default=Path("runs/own_models"), help="folder for what is trained")
    add("--quick", action="store_true", help="tiny models, in seconds, to see that it runs")
    add("--only", nargs="+", choices=CELLS, help="some of the models")
    add("--untimed", action="store_true", help="train and judge only")
    add("--timed", action="store_true", help="time what is trained only")
    add("--wordnet", type=Path, help="data.noun, where it is not where Debian has it")
    add("--threads", type=int, default=1, help="of timing")
    add("--seconds", type=float, default=3.0, help="of timing for each model and batch size")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
