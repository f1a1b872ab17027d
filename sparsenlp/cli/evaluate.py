"""sparsenlp eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..measure import use_threads
from .console import note, print_json, print_table
from .options import BatchSize, LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads

if TYPE_CHECKING:
    from ..classifiers import Quality
    from ..data import TextDataset


def evaluate(
    model: Annotated[str, typer.Argument(help="Model directory, dense or sparse, or hub id.", show_default=False)],
    data: Annotated[Path, typer.Option(help="CSV, TSV or JSONL file.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="A model to compare with, usually the dense one.", show_default=False)
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    text_pair_column: TextPairColumn = None,
    batch_size: BatchSize = 64,
    max_length: MaxLength = 256,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Accuracy of a classifier, beside that of always choosing the most frequent class.

    With --against also: how often both models agree, the KL divergence of what they predict, and the
    cosine similarity of their logits.

    \b
    sparsenlp eval out --data test.csv --against bert-finetuned
    """
    from ..classifiers import judge, load_config, load_model, load_tokenizer, max_tokens
    from ..data import tokenize
    from ..train import predict

    config, tokenizer = load_config(model), load_tokenizer(model)
    texts = load_texts(data, config, text_column, label_column, text_pair_column)
    tokens = tokenize(texts, tokenizer, min(max_length, max_tokens(config, tokenizer) or max_length))
    models = [load_model(name) for name in (model, against) if name is not None]
    with use_threads(threads):
        logits, *reference = [predict(each, tokens, batch_size) for each in models]
    quality = judge(logits, tokens.labels, *reference)
    rows = {model: quality}
    if against is not None:
        rows[against] = judge(reference[0], tokens.labels)
    if json:
        print_json({"model": model, "against": against, "data": str(data), **quality.as_dict()} | _dense(rows, against))
        return
    print_table(quality_cells(rows), f"{quality.examples} examples of {data}")


def load_texts(
    path: Path, config: Any, text_column: str, label_column: str, text_pair_column: str | None
) -> TextDataset:
    """Read a file with the labels encoded as the model's classes. Raises ValueError for a label it does not have."""
    from ..classifiers import has_generic_names, label_names_of
    from ..data import load_table

    names = label_names_of(config)
    texts = load_table(path, text_column, label_column, text_pair_column)
    if set(texts.label_names) <= set(names) or not has_generic_names(config):
        return load_table(path, text_column, label_column, text_pair_column, names)
    if len(texts.label_names) > len(names):
        raise ValueError(f"labels: expected at most the model's {len(names)} classes, got {len(texts.label_names)}")
    note(f"the model's classes have no names; taken to be {', '.join(texts.label_names)}, in this order")
    return texts


def quality_cells(rows: dict[str, Quality]) -> list[list[str]]:
    """A table with one row per model; the comparison columns stand where a row has them."""
    cells = [["model", "accuracy", "majority class", "agreement", "KL", "cosine of logits"]]
    for name, q in rows.items():
        compared = ["-"] * 3 if q.agreement is None else [f"{q.agreement:.1%}", f"{q.kl:.3f}", f"{q.cosine:.4f}"]
        cells.append([name, f"{q.accuracy:.1%}", f"{q.majority:.1%}", *compared])
    return cells


def _dense(rows: dict[str, Quality], against: str | None) -> dict[str, Any]:
    return {} if against is None else {"against_accuracy": rows[against].accuracy}
