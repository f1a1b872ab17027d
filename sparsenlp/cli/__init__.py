"""The console script `sparsenlp`: parses, calls the library, and draws what comes back."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from . import bench, demo, evaluate, info, prune, train
from .console import CommandLine

__all__ = ["app"]

app = typer.Typer(
    cls=CommandLine,
    name="sparsenlp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsenlp {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="On an error, show where in the code it arose.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune NLP models into patterns the hardware likes, and really run them faster.

    \b
    sparsenlp demo --quick     a real model, pruned and timed here in minutes
    sparsenlp info             what this installation can do
    sparsenlp train --help     a small model from scratch
    sparsenlp prune --help     how to prune your own model
    """


app.command("info")(info.info)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("prune")(prune.prune)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
