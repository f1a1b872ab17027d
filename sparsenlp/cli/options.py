"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DATA = (
    "Training texts: CSV, TSV or JSONL; or rotten_tomatoes, supersense, for pairs word_definitions or "
    "sibling_definitions, for seq2seq pronunciations."
)
TextColumn = Annotated[str, typer.Option(help="Column with the text.")]
LabelColumn = Annotated[str, typer.Option(help="Column with the class.")]
TextPairColumn = Annotated[
    str | None, typer.Option(help="Column with a second text, for matching tasks.", show_default=False)
]
MaxLength = Annotated[int, typer.Option(min=2, help="Longer texts are cut to this many tokens.")]
Count = Annotated[
    int | None, typer.Option(min=1, help="Training texts of a packaged task. (default: all)", show_default=False)
]
WordNet = Annotated[
    Path | None,
    typer.Option(help="WordNet's data.noun, where it is not where Debian has it.", show_default=False),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per batch.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: torch's)", show_default=False)]


def data_section(data: str) -> dict[str, Any]:
    """--data as a recipe says it: a file to train on, or the packaged task of that name."""
    from ..recipe.config import LABELLED_TASKS, PAIR_TASKS

    return {"task": data} if data in (*LABELLED_TASKS, *PAIR_TASKS) and not Path(data).exists() else {"train": data}
