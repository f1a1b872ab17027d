"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

TextColumn = Annotated[str, typer.Option(help="Column with the text.")]
LabelColumn = Annotated[str, typer.Option(help="Column with the class.")]
TextPairColumn = Annotated[
    str | None, typer.Option(help="Column with a second text, for matching tasks.", show_default=False)
]
MaxLength = Annotated[int, typer.Option(min=2, help="Longer texts are cut to this many tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per batch.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: torch's)", show_default=False)]
