"""A progress bar with the time left, on a terminal's standard error only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield advance(note): one step further, with a short note beside the bar. Silent if quiet or not a terminal."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    with progress:
        bar = progress.add_task(title, total=total, completed=done, note="")
        yield lambda note: progress.update(bar, advance=1, note=note)
