"""The order of the stages, and the results when all are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..benchmark import row_names
from .children import CONFIG_FILE, OnEvent, do_stages, run_children
from .config import DemoConfig, check_packages, percent
from .records import is_done, result_of, seconds_of, write_json, write_text
from .stages import eager, sparse_name, stages_of
from .table import markdown

RESULTS_FILE, MARKDOWN_FILE = "results.json", "results.md"

RunGroups = Callable[[Path, Sequence[Sequence[str]], int, OnEvent], None]
"""(directory, groups of stage names that may run at the same time, threads, on_event)"""


def run_demo(
    directory: Path, config: DemoConfig, on_event: OnEvent, run_groups: RunGroups = run_children
) -> dict[str, Any]:
    """Do what is not done yet, and write results.json and results.md into `directory`.

    run_groups  `run_children`, each group in a fresh process, or `run_here`
    returns     the results as JSON data

    Raises ModuleNotFoundError for absent packages, NotADirectoryError, RuntimeError if a stage fails, and
    KeyboardInterrupt on Ctrl-C, after which the same call goes on where it stopped.
    """
    check_packages(config)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"demo: expected a directory, got a file: {directory}")
    write_json(directory / CONFIG_FILE, config.as_dict())
    stages = stages_of(config)
    for groups in schedule(config):
        waiting = [names for names in groups if not all(is_done(directory, stages[name]) for name in names)]
        if waiting:
            run_groups(directory, waiting, config.threads, on_event)
    results = collect(directory, config)
    write_json(directory / RESULTS_FILE, results)
    write_text(directory / MARKDOWN_FILE, markdown(results))
    return results


def run_here(directory: Path, groups: Sequence[Sequence[str]], threads: int, on_event: OnEvent) -> None:
    """All groups in this process, one after another; for tests and debuggers."""
    for names in groups:
        do_stages(directory, names, on_event)


def schedule(config: DemoConfig) -> list[list[list[str]]]:
    """Stage names: steps one after another, each with groups that run at the same time.

    Pruning to each target takes one process, as many as there are threads; what is timed runs alone.
    """
    names = [percent(target) for target in config.targets]
    prune = [[f"prune-{name}"] for name in names]
    judge = ["judge-dense", *(f"judge-{name}" for name in names)]
    steps = [[["data", "dense"]]]
    steps += [prune[i : i + config.threads] for i in range(0, len(prune), config.threads)]
    return [*steps, [[f"convert-{name}" for name in names]], [judge], [["latency"]]]


def collect(directory: Path, config: DemoConfig) -> dict[str, Any]:
    """All results, from the records."""
    latency = result_of(directory, "latency")
    rows = {row["name"]: row["seconds"] for row in latency["rows"]}
    dense = result_of(directory, "judge-dense")
    converted = {percent(target): result_of(directory, f"convert-{percent(target)}") for target in config.targets}
    sizes = next(iter(converted.values()))
    variants = []
    for name in config.baselines:
        full = name.endswith("fp32")
        variants.append(
            {
                "name": name,
                "quality": dense[eager(name)],
                "sparsity": 0.0,
                "weight_cosine": 1.0 if full else None,
                "bytes": sizes["bytes"]["dense"] if full else None,
                "layer_bytes": sizes["layer_bytes"]["dense"] if full else None,
                "latency": rows[name],
            }
        )
    for name, result in converted.items():
        quality = result_of(directory, f"judge-{name}")
        weight_cosine = quality.pop("weight_cosine")
        for row in row_names(sparse_name(name), config.baselines):
            variants.append(
                {
                    "name": row,
                    "quality": quality,
                    "sparsity": result["sparsity"],
                    "weight_cosine": weight_cosine,
                    "bytes": result["bytes"]["sparse"],
                    "layer_bytes": result["layer_bytes"]["sparse"],
                    "latency": rows[row],
                    "converted": result["converted"],
                    "layers": result["layers"],
                }
            )
    return {
        "config": config.as_dict(),
        "subset": config.is_subset,
        "data": result_of(directory, "data"),
        "settings": [str(setting) for setting in config.settings],
        "variants": variants,
        "machine": latency["machine"],
        "spread": latency["spread"],
        "verdicts": latency["verdicts"],
        "seconds": {name: seconds_of(directory, name) for name in stages_of(config)},
    }
