"""What all verbs share: one line per error, exit codes, notes, tables."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ..interrupt import Terminated, terminable

BAD_INPUT, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
TABLE_WIDTH = 160
"""Characters that a table may take where the output is no terminal."""

_BAD_INPUT_ERRORS = (
    ValueError,
    ModuleNotFoundError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_EXPECTED_ERRORS = (*_BAD_INPUT_ERRORS, OSError, RuntimeError, FloatingPointError)


class CommandLine(TyperGroup):
    """Ends with one line on standard error; exit code 2: bad input, 1: a failure, 130: Ctrl-C, 143: SIGTERM."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        wants_help = not args
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if wants_help or not _is_usage_error(error):
                raise
            _fail(error, ctx)

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable(), warnings_as_notes():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            _print_line(str(error) or "stopped")
            raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("traceback") and not _is_usage_error(error):
                raise
            _fail(error, ctx)


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C or SIGTERM within the `with` block tells how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)("stopped; run the same command again to go on from there") from None


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """A UserWarning within the `with` block is a line for the user, each text once; others go where they went."""
    seen: set[str] = set()
    show = warnings.showwarning

    def shown(message: Any, category: Any, *where: Any, **options: Any) -> None:
        if category is not UserWarning:
            show(message, category, *where, **options)
        elif str(message) not in seen:
            seen.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = shown
        yield


def note(text: str) -> None:
    """A line for the user that is no result: to standard error."""
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


def say(text: str = "") -> None:
    """A line of the result: to standard output."""
    Console(highlight=False).print(Text(text), soft_wrap=True)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def print_table(cells: Sequence[Sequence[str]], title: str) -> None:
    """The first row is the header; the first column goes to the left, the others to the right."""
    say(title)
    header, *rows = cells
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=TABLE_WIDTH)
    console.print(table)


def _fail(error: Exception, ctx: Any) -> NoReturn:
    text = " ".join((str(error) or type(error).__name__).split())
    if _is_usage_error(error):
        context = getattr(error, "ctx", None) or ctx
        text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        _print_line(f"{text} (see {context.command_path} --help)")
        raise typer.Exit(BAD_INPUT)
    if not isinstance(error, _EXPECTED_ERRORS):
        text = f"unexpected {type(error).__name__}: {text}; sparsenlp --traceback ... shows where it arose"
    _print_line(text)
    raise typer.Exit(BAD_INPUT if isinstance(error, _BAD_INPUT_ERRORS) else FAILED) from None


def _is_usage_error(error: Exception) -> bool:
    """Whether it is click's, which typer carries along in some versions and imports in others."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _print_line(text: str) -> None:
    print(f"sparsenlp: {text}", file=sys.stderr)
