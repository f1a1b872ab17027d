"""sparsenlp demo"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..measure import machine
from .console import note, print_table, resumable, say
from .options import Threads

if TYPE_CHECKING:
    from ..demo.children import OnEvent
    from ..demo.stages import Stage


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About 3 minutes, on a subset of the data.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where everything goes. (default: runs/demo, or runs/demo-quick)", show_default=False),
    ] = None,
    targets: Annotated[
        list[float] | None,
        typer.Option(help="Sparsity to prune to; repeatable. (default: 0.8, 0.9)", show_default=False),
    ] = None,
    threads: Threads = None,
) -> None:
    """Prune a real encoder, keep its accuracy, and run it faster on this machine.

    Fine-tunes MiniLM-L6 on film reviews, prunes copies of it in 8x1 blocks while the dense model teaches
    them, converts and saves them, loads them in a fresh process, and prints one table: accuracy, size, and
    latency against the best dense baselines. About 15 minutes on two cores. What is done is not done again;
    after Ctrl-C the same command goes on where it stopped.

    \b
    sparsenlp demo
    sparsenlp demo --quick --targets 0.9
    """
    from ..demo import footer, full, run_demo, table
    from ..demo import quick as quick_config
    from ..demo.stages import stages_of

    config = (quick_config if quick else full)(tuple(targets or (0.8, 0.9)), threads or machine()["threads"])
    where = directory or Path("runs", "demo-quick" if quick else "demo")
    note(f"demo in {where}: {'about 3 minutes, on a subset' if quick else 'about 15 minutes'} on 2 cores")
    with resumable(), _display(stages_of(config)) as on_event:
        results = run_demo(where, config, on_event)
    print_table(table(results), "MiniLM-L6 on rotten_tomatoes" + (", a subset" if results["subset"] else ""))
    for line in footer(results):
        say(line)
    say(f"the same as data: {where / 'results.json'}, as markdown: {where / 'results.md'}")


@contextmanager
def _display(stages: dict[str, Stage]) -> Iterator[OnEvent]:
    """A progress bar for each stage on a terminal, else a line for each quarter of it."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
        console=console,
        disable=not console.is_terminal,
    )
    bars: dict[str, Any] = {}
    quarters: dict[str, int] = {}

    def show(event: dict[str, Any]) -> None:
        name = event["stage"]
        if name not in bars:
            bars[name] = progress.add_task(stages[name].title, total=None, words="")
        if "finished" in event:
            progress.update(bars[name], total=1, completed=1, words="")
            progress.stop_task(bars[name])
            if not console.is_terminal:
                note(f"{stages[name].title}: done")
            return
        done, total = event["done"], event["total"]
        progress.update(bars[name], total=total or None, completed=done, words=event["note"])
        quarter = 4 * done // total if total else 0
        if not console.is_terminal and quarters.get(name, 0) < quarter < 4:
            quarters[name] = quarter
            note(f"{stages[name].title}: {done} of {total}  {event['note']}")

    with progress:
        yield show
