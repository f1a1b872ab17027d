"""What pruning costs in accuracy, and what it gains in time: criteria x patterns x sparsities on two tasks.

    python bench/accuracy.py [--full | --quick] [--jobs 2] [--wordnet PATH]
    python bench/accuracy.py --only "rotten_tomatoes/8x1-*/0"     # some cells, by name
    python bench/accuracy.py --list                               # the names

Fine-tunes MiniLM-L6 on rotten_tomatoes and on WordNet supersenses, prunes it with the default recipe (gradual
masks, Taylor scores, distillation) to several sparsities, and does the same to its rivals: unstructured masks, whole
layers dropped, one sparsity for all layers. Each task, method and seed is a cell, about five minutes on one core;
--full adds other criteria and patterns. Cells are kept under --records: a re-run does only what is missing, and one
that is interrupted leaves all cells but that one. Then all models of a task and seed are converted and timed in turn.

Writes accuracy.json after every cell and accuracy.png at the end. Accuracies do not depend on the machine's load, as
latencies do, but a little on its CPU, which decides the order of sums ("training_cpu"). Needs the packages of
sparsenlp/data/demo.py, and for supersense WordNet's data.noun.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import accuracy_latency
import accuracy_tables
import harness
from accuracy_cells import TASKS, Allocated, Cell, Dense, Layers, Method, Pruned, Row, Setup, Workbench, run_cell
from accuracy_records import Records
from accuracy_targets import RECIPE, UNIFORM, UNSTRUCTURED, judge, on_common_seeds, summarize

from sparsenlp.benchmark import Setting
from sparsenlp.data import minilm_directory
from sparsenlp.measure import use_threads
from sparsenlp.train import FinetuneConfig, RecoveryConfig

SETTINGS = (Setting(1, 32), Setting(16, 64))


def pruned(family: str, *sparsities: float) -> list[Method]:
    pattern, criterion, scope = family.split("-")
    return [Pruned(pattern, criterion, scope, sparsity) for sparsity in sparsities]


METHODS: dict[str, list[Method]] = {
    "recipe": [Dense(), *pruned(RECIPE, 0.9, 0.8, 0.95)],
    "rivals": [
        *pruned(UNSTRUCTURED, 0.9, 0.8, 0.95),
        *(Layers(kept) for kept in (3, 2, 1)),
        *pruned(RECIPE, 0.5, 0.7),
        *pruned(UNIFORM, 0.8, 0.9),
        Allocated("5x faster"),
        Allocated("8x faster"),
    ],
    "menu": [
        *pruned("8x1-magnitude-local", 0.8, 0.9),
        *pruned("8x1-wanda-row", 0.9),
        *pruned("8x1-fisher-global", 0.9),
        *pruned("8x1-random-local", 0.9),
        *pruned("4x1-taylor-global", 0.8, 0.9),
        *pruned("16x1-taylor-global", 0.9),
        *pruned("8x8-taylor-global", 0.9),
        *pruned("2:4-taylor-local", 0.5),
    ],
}
"""In the order in which they are done, for all tasks and seeds in turn; "menu" is --full."""

QUICK_METHODS: dict[str, list[Method]] = {
    "recipe": [Dense(), *pruned(RECIPE, 0.9, 0.5)],
    "rivals": [*pruned(UNSTRUCTURED, 0.8), Layers(1), *pruned(UNIFORM, 0.8), Allocated("sparsity 0.8")],
}


def main() -> int:
    arguments = parse_arguments()
    tasks, skipped = available(arguments)
    methods = QUICK_METHODS if arguments.quick else METHODS
    parts = [part for part in methods if part != "menu" or arguments.full]
    cells = list(plan([methods[part] for part in parts], tasks, arguments.seeds))
    chosen = [cell for cell in cells if fnmatch(cell.name, arguments.only)]
    if arguments.list:
        print(*(cell.name for cell in chosen), sep="\n")
        return 0
    records = Records(arguments.records, make_setup(arguments))
    every = list(plan(list(methods.values()), tasks, arguments.seeds))

    def write() -> Row:
        record = collect(records, every, cells, arguments.seeds, skipped)
        harness.write_record(arguments.output / "accuracy.json", **record)
        return record

    try:
        for _ in train(records, chosen, arguments.jobs):
            write()
        if not arguments.untimed:
            for _ in measure(records, every, arguments):
                write()
    except KeyboardInterrupt:
        print("accuracy: stopped; the same command goes on from here", file=sys.stderr)
    record = write()
    if not record["results"]:
        return 1
    accuracy_tables.show(record)
    accuracy_tables.draw(record, arguments.output / "accuracy.png")
    return 0


def available(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(tasks that can be done, a line for each that cannot). Exits where the model is absent."""
    if arguments.quick:
        return [TASKS[0]], []
    tasks, skipped = [], []
    setup = Setup(wordnet=arguments.wordnet)
    try:
        minilm_directory()
        for task in arguments.task:
            try:
                setup.load(task, 0)
                tasks.append(task)
            except FileNotFoundError as error:
                skipped.append(f"{task}: skipped; {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"accuracy: {error}; --quick runs without")
    for line in skipped:
        print(line, file=sys.stderr)
    return tasks, skipped


def make_setup(arguments: argparse.Namespace) -> Setup:
    """The real one, or for --quick a model of two tiny layers that learns which kind of word a text is made of."""
    setup = Setup(wordnet=arguments.wordnet, threads=arguments.threads)
    if not arguments.quick:
        return setup
    tiny = arguments.records / "tiny"
    if not (tiny / "texts.csv").is_file():
        import tiny_bert  # found through harness

        tiny.mkdir(parents=True, exist_ok=True)
        tiny_bert.save_tiny_bert(tiny, head=False)
        tiny_bert.write_table(tiny / "texts.csv", count=96)
    short: dict[str, Any] = {"epochs": 3, "batch_size": 8, "bf16": False}
    return replace(
        setup,
        tiny=tiny,
        finetuning=FinetuneConfig(learning_rate=1e-3, **short),
        recovery=RecoveryConfig(learning_rate=1e-3, update_every=2, **short),
        setting=Setting(2, 8),
    )


def plan(parts: Sequence[Sequence[Method]], tasks: Sequence[str], seeds: int) -> Iterator[Cell]:
    """All cells: part by part, in each the tasks one after another, and of each the seeds."""
    for methods in parts:
        for task in tasks:
            for seed in range(seeds):
                yield from (Cell(task, method, seed) for method in methods)


def train(records: Records, chosen: Sequence[Cell], jobs: int) -> Iterator[Cell]:
    """Do what is missing of the chosen cells and of the dense models that they need; yields each when it is done.

    With several jobs the cells that measure time come last, one after another.
    """
    needed = dict.fromkeys(each for cell in chosen for each in (cell.dense, cell))
    missing = [cell for cell in needed if records.result(cell) is None]
    together = [cell for cell in missing if jobs > 1 and not cell.is_timed]
    yield from train_together(records, together, jobs)
    for cell in missing:
        if cell not in together:
            do(cell, records)
            yield cell


def train_together(records: Records, cells: Sequence[Cell], jobs: int) -> Iterator[Cell]:
    """Several at a time, each in a process of its own; what starts from a dense model waits until that is there."""
    waiting = list(cells)
    running: dict[Future[None], Cell] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            ready = [cell for cell in waiting if cell.is_dense or records.result(cell.dense) is not None]
            for cell in ready[: jobs - len(running)]:
                waiting.remove(cell)
                running[pool.submit(do, cell, records)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)


def do(cell: Cell, records: Records) -> None:
    """Train and judge a cell on one thread, and keep what came out."""
    print(f"{cell.name} ...", file=sys.stderr, flush=True)
    with use_threads(1):
        bench = Workbench(cell, records.setup)
        before = bench.fresh if cell.is_dense else records.model(cell.dense, bench)
        untouched = {name: tensor.clone() for name, tensor in before.state_dict().items()}
        model, result = run_cell(cell, bench, before)
        records.keep(cell, model, untouched, result)
    text = f"accuracy {result['accuracy']:.1%}, KL {result['kl']:.3f}, {result['seconds']:.0f} s"
    print(f"{cell.name}: {text}", file=sys.stderr, flush=True)


def measure(records: Records, cells: Sequence[Cell], arguments: argparse.Namespace) -> Iterator[Cell]:
    """Time what is done and has no latency yet, all of a task and seed in turn; yields each when that is kept."""
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        if records.result(cell) is not None and records.latency(cell) is None:
            groups.setdefault(cell.dense, []).append(cell)
    settings = (Setting(1, 8), Setting(2, 8)) if arguments.quick else SETTINGS
    for dense, missing in groups.items():
        print(f"timing {len(missing)} models of {dense.task}, seed {dense.seed} ...", file=sys.stderr, flush=True)
        bench = Workbench(dense, records.setup)
        models = {cell.name: records.model(cell, bench) for cell in dict.fromkeys((dense, *missing))}
        found = accuracy_latency.measure(
            models, dense.name, settings, arguments.threads, arguments.seconds, arguments.quick
        )
        for cell in missing:
            records.keep_latency(cell, found[cell.name])
            yield cell


def collect(
    records: Records, every: Sequence[Cell], planned: Sequence[Cell], seeds: int, skipped: Sequence[str]
) -> Row:
    """All that is done of `every` cell, in order, its summary and targets, and what is missing of the planned ones.

    "compared" is the summary of the seeds that all models of a task have, on which they are compared and drawn.
    """
    results = []
    for cell in every:
        result = records.result(cell)
        if result is not None:
            results.append({**result, "latency": records.latency(cell)})
    missing = [cell.name for cell in planned if records.result(cell) is None]
    summary, compared = summarize(results), summarize(on_common_seeds(results))
    models = Counter(cell.method.family for cell in planned if (cell.task, cell.seed) == (planned[0].task, 0))
    return {
        "complete": not missing and not skipped,
        "planned": len(planned),
        "missing": missing,
        "skipped": list(skipped),
        "targets": judge(summary, seeds, models, compared),
        "summary": summary,
        "compared": compared,
        "results": results,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("bench/results"), help="folder for the JSON and the plot")
    add("--records", type=Path, default=Path("runs/accuracy"), help="folder for what is done, some GB")
    add("--full", action="store_true", help="other criteria and patterns, too")
    add("--quick", action="store_true", help="a tiny model, in seconds, to see that it runs")
    add("--list", action="store_true", help="print the names of the cells, and do nothing")
    add("--only", default="*", metavar="PATTERN", help='cells to train, e.g. "*/dense/*"; the dense models they need')
    add("--untimed", action="store_true", help="train only")
    add("--task", nargs="+", choices=TASKS, default=TASKS)
    add("--seeds", type=int, default=3, help="so many of each")
    add("--jobs", type=int, default=1, help="cells at a time, each in a process with one thread")
    add("--wordnet", type=Path, help="data.noun, where it is not where Debian has it")
    add("--threads", type=int, default=2, help="of timing")
    add("--seconds", type=float, default=20.0, help="of timing for each input of a task and seed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
