"""sparsenlp eval"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..measure import use_threads
from .console import note, print_json, print_table
from .options import BatchSize, LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads

if TYPE_CHECKING:
    from torch import nn

    from ..data import TextDataset
    from ..recipe.tasks import Judgement


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
    cosine similarity of their logits. Of lstm-lm the perplexity, of seq2seq how many answers are exact.

    \b
    sparsenlp eval out --data test.csv --against bert-finetuned
    sparsenlp eval out --data words.tsv --text-column word --text-pair-column phonemes
    """
    from ..classifiers import judge, load_config, load_model, load_tokenizer, max_tokens
    from ..data import tokenize
    from ..recipe import Data
    from ..recipe.tasks import token_prediction, token_texts
    from ..sequences import PREDICTORS
    from ..train import predict

    config, tokenizer = load_config(model), load_tokenizer(model)
    outputs: Callable[[nn.Module], Any]
    compare: Callable[..., Judgement]
    if config.model_type in PREDICTORS:
        source = Data(train=str(data), test=str(data), text_column=text_column, text_pair_column=text_pair_column)
        columns = token_texts(source, config.is_encoder_decoder, seed=0)
        task = token_prediction(tokenizer, *columns, max_length, seed=0)
        outputs, compare = partial(task.outputs, batch_size=batch_size), task.judge
    else:
        texts = load_texts(data, config, text_column, label_column, text_pair_column)
        tokens = tokenize(texts, tokenizer, min(max_length, max_tokens(config, tokenizer) or max_length))
        outputs = partial(predict, data=tokens, batch_size=batch_size)
        compare = partial(judge, labels=tokens.labels)
    models = [load_model(name) for name in (model, against) if name is not None]
    with use_threads(threads):
        found, *reference = [outputs(each) for each in models]
    quality = compare(found, reference=reference[0] if reference else None)
    rows: dict[str, Judgement] = {model: quality}
    if against is not None:
        rows[against] = compare(reference[0])
    if json:
        print_json({"model": model, "against": against, "data": str(data), **quality.as_dict()} | _dense(rows, against))
        return
    print_table(quality_cells(rows), f"{quality_title(quality)}, {data}")


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


def quality_title(quality: Judgement) -> str:
    """What a quality is of."""
    from ..sequences import Perplexity

    return f"{quality.tokens} test tokens" if isinstance(quality, Perplexity) else f"{quality.examples} test examples"


def quality_cells(rows: Mapping[str, Any]) -> list[list[str]]:
    """A table of qualities of one kind, one row per model; the comparison columns stand where a row has them."""
    from ..sequences import Answers, Perplexity

    kind = type(next(iter(rows.values())))
    if kind is Perplexity:
        cells = [["model", "perplexity", "without context"]]
        return cells + [[name, f"{q.perplexity:.1f}", f"{q.unigram:.1f}"] for name, q in rows.items()]
    if kind is Answers:
        cells = [["model", "exact answers", "most frequent answer", "agreement"]]
        for name, q in rows.items():
            cells.append([name, f"{q.exact:.1%}", f"{q.majority:.1%}", _percent(q.agreement)])
        return cells
    cells = [["model", "accuracy", "majority class", "agreement", "KL", "cosine of logits"]]
    for name, q in rows.items():
        compared = ["-"] * 2 if q.agreement is None else [f"{q.kl:.3f}", f"{q.cosine:.4f}"]
        cells.append([name, f"{q.accuracy:.1%}", f"{q.majority:.1%}", _percent(q.agreement), *compared])
    return cells


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _dense(rows: Mapping[str, Judgement], against: str | None) -> dict[str, Any]:
    """The main number of the other model."""
    if against is None:
        return {}
    numbers = rows[against].as_dict()
    name = next(name for name in ("accuracy", "exact", "perplexity") if name in numbers)
    return {f"against_{name}": numbers[name]}
