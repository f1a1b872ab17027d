"""sparsenlp bench"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import native
from ..measure import machine_line
from .console import note, print_json, print_table, say
from .options import Threads

if TYPE_CHECKING:
    from torch import nn

    from ..benchmark import LatencyReport, Setting
    from ..cost.explain import Explanation


def bench(
    model: Annotated[str, typer.Argument(help="Sparse checkpoint, as prune writes it.", show_default=False)],
    dense: Annotated[
        str | None,
        typer.Option(
            help="Dense model for the baselines. (default: MODEL with its zeros written out)", show_default=False
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeatable. (default: 1, 16)")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens in each text; repeatable. (default: 32, 128)")
    ] = None,
    threads: Threads = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Dense baseline to run; repeatable. (default: all)", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time spent on each batch and length, beside 5 rounds.")] = 5.0,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Layer by layer instead: what the cost model predicts, what is measured, and why."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Latency of a sparse checkpoint against the best ways to run the dense model on this machine.

    All run in one process in turn, after their results have been compared. The baselines are eager and
    compiled, in fp32 and bf16, and dynamic int8; the ratio is to the fastest of them.

    \b
    sparsenlp bench out --batch 1 --batch 16 --tokens 32 --tokens 128 --threads 2
    sparsenlp bench out --explain
    """
    from ..benchmark import BASELINES, Setting, check, dense_twin, row_names
    from ..benchmark import bench as run_bench
    from ..classifiers import load_model
    from ..layers.compressed_linear import CompressedLinear
    from ..train.progress import progress_bar

    sparse = load_model(model)
    settings = [Setting(b, t) for b in batch or (1, 16) for t in tokens or (32, 128)]
    if explain:
        if dense is not None or baseline:
            raise ValueError("explain: expected neither --dense nor --baseline, as only layers are timed")
        _explain(sparse, settings, threads, seconds, json)
        return
    reference = dense_twin(sparse) if dense is None else load_model(dense)
    chosen = tuple(baseline or BASELINES)
    check(reference, settings, chosen)
    count = sum(isinstance(layer, CompressedLinear) for layer in sparse.modules())
    if not count:
        note("the model has no sparse layer: only the dense ways to run it are timed")
    elif not native.available:
        note(f"{native.why_unavailable}: sparse layers run on the reference, which is not fast")
    rows = {"sparse": sparse} if count else {}
    steps = len(settings) * (len(chosen) + len(rows) * len(row_names("", chosen)) + 1)
    with progress_bar("Latency", steps, quiet=json) as advance:
        report = run_bench(
            reference,
            rows,
            settings,
            chosen,
            threads,
            seconds,
            lambda done, total, what: advance(what) if done else None,
        )
    if json:
        print_json(report.as_dict())
        return
    print_report(report)


def _explain(model: nn.Module, settings: list[Setting], threads: int | None, seconds: float, json: bool) -> None:
    from ..cost.explain import explain

    explanation = explain(model, sorted({s.batch * s.tokens for s in settings}), threads, seconds)
    if json:
        print_json(explanation.as_dict())
        return
    title = (
        "microseconds, predicted then measured, weights warm; tokens = batch x tokens; shares of the sparse prediction"
    )
    print_table(explained_cells(explanation), title)
    for line in explanation.summary():
        say(line)
    say(machine_line(explanation.machine))


def explained_cells(explanation: Explanation) -> list[list[str]]:
    """One row per layer and number of tokens, with the share of the predicted sparse time that each part takes."""
    parts = list(explanation.layers[0].parts)
    header = ["layers", "density", "tokens", "sparse us", "measured", "error"]
    cells = [[*header, "dense us", "measured", "error", *parts]]
    for layer in explanation.layers:
        cell = [f"{len(layer.names)} of {layer.work.rows}x{layer.work.columns}, {layer.kind}"]
        cell += [f"{layer.density:.1%}", str(layer.work.tokens)]
        cell += [
            f"{1e6 * layer.predicted_sparse:.1f}",
            f"{1e6 * layer.measured_sparse:.1f}",
            f"{layer.sparse_error:+.0%}",
        ]
        cell += [f"{1e6 * layer.predicted_dense:.1f}", f"{1e6 * layer.measured_dense:.1f}", f"{layer.dense_error:+.0%}"]
        cells.append([*cell, *(f"{layer.parts.get(part, 0.0) / layer.predicted_sparse:.0%}" for part in parts)])
    return cells


def print_report(report: LatencyReport) -> None:
    """The table, what it was measured on, and what follows from it."""
    print_table(latency_cells(report), "milliseconds (times as fast as the best dense), batch x tokens")
    for row in report.rows:
        for setting, reason in row.missing.items():
            say(f"{row.name} at {setting}: cannot run: {reason}")
    for row in report.rows:
        if row.sparse:
            say(report.verdict(row))
    say(
        f"medians of interleaved runs, largest spread (p80 - p20) {report.spread:.0%}; "
        "texts without padding; difference: of the logits from fp32, dense"
    )
    say(machine_line(report.machine))


def latency_cells(report: LatencyReport) -> list[list[str]]:
    """One row per way to run the model, one column per setting, and the largest difference of its logits."""
    cells = [["", *map(str, report.settings), "spread", "difference"]]
    for row in report.rows:
        texts = []
        for setting in report.settings:
            speedup = report.speedup(row, setting)
            if setting not in row.timings:
                texts.append("-")
            elif speedup is None:
                texts.append(f"{1e3 * row.timings[setting].median:.2f}")
            else:
                texts.append(f"{1e3 * row.timings[setting].median:.2f} ({speedup.median:.2f}x)")
        spread = max((t.spread for t in row.timings.values()), default=None)
        difference = max(row.differences.values(), default=None)
        texts.append("-" if spread is None else f"{spread:.0%}")
        cells.append([row.name, *texts, "-" if difference is None else f"{difference:.1e}"])
    return cells
