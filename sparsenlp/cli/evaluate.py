"""sparsenlp eval"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..measure import use_threads
from ..trained_texts import DUPLICATES, hashes_of, read_trained_texts, told_runs
from .console import note, print_json, print_table
from .options import BatchSize, LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import TextDataset, TokenizedDataset
    from ..recipe.tasks import Judgement

Columns = tuple[str, str, str | None]
"""Names of the columns with the text, the label, and the second text."""
Hashes = np.ndarray
Reading = tuple[Sequence[Callable[["nn.Module"], Any]], Callable[..., "Judgement"], Hashes]
"""(what each model says of the texts, what compares it with the labels and with a reference, `hashes_of` the texts)"""


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
    allow_training_texts: Annotated[
        bool, typer.Option("--allow-training-texts", help="Judge by texts that a model was trained on, too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Accuracy of a classifier, beside that of always choosing the most frequent class.

    With --against also: how often both models agree, the KL divergence of what they predict, and the
    cosine similarity of their logits. Of lstm-lm the perplexity, of seq2seq how many answers are exact.
    Models of `train` and `prune` remember what they were trained on: texts of which that is more than one in a
    hundred are refused, as figures on them tell nothing of others.

    \b
    sparsenlp eval out --data test.csv --against bert-finetuned
    sparsenlp eval out --data words.tsv --text-column word --text-pair-column phonemes
    """
    from ..classifiers import load_config, load_model
    from ..sequences import PREDICTORS

    names = [model] if against is None else [model, against]
    configs = [load_config(name) for name in names]
    predicts = [config.model_type in PREDICTORS for config in configs]
    if len({*predicts}) > 1:
        raise ValueError(f"against: expected two classifiers or two models of tokens, got {model} and {against}")
    columns = (text_column, label_column, text_pair_column)
    read = _read_predictors if predicts[0] else _read_classifiers
    outputs, compare, texts = read(names, configs, data, columns, max_length, batch_size)
    trained_on = _check_unseen(names, texts, allow_training_texts)
    models = [load_model(name) for name in names]
    with use_threads(threads):
        found, *reference = [of(each) for of, each in zip(outputs, models, strict=True)]
    quality = compare(found, reference=reference[0] if reference else None)
    rows: dict[str, Judgement] = {model: quality}
    if against is not None:
        rows[against] = compare(reference[0])
    if json:
        about = {"model": model, "against": against, "data": str(data)}
        print_json(about | quality.as_dict() | _dense(rows, against) | trained_on)
        return
    print_table(quality_cells(rows), f"{quality_title(quality)}, {data}")


def _check_unseen(names: Sequence[str], texts: Hashes, allowed: bool) -> dict[str, int]:
    """{"training_texts": how many of the texts a model was trained on}, the most of any; {} where nothing is known.

    Raises ValueError for more than duplicates would explain, unless they are allowed.
    """
    counts: dict[str, int] = {}
    for name in names:
        known = read_trained_texts(name)
        if known is None:
            continue
        count = int(known.known(texts).sum())
        counts["training_texts"] = max(count, counts.get("training_texts", 0))
        if known.share(texts) > DUPLICATES and not allowed:
            raise ValueError(
                f"data: expected texts that {name} was not trained on, got {count} of {len(texts)} that it was "
                f"({told_runs(known)}); --allow-training-texts judges by them all the same"
            )
        if count:
            note(f"warning: {name} was trained on {count} of the {len(texts)} texts")
    return counts


def _read_classifiers(
    names: Sequence[str], configs: Sequence[Any], data: Path, columns: Columns, max_length: int, batch_size: int
) -> Reading:
    """What gives the logits of each model, and what compares them; each reads the texts with its own tokenizer."""
    from ..classifiers import judge, load_tokenizer, match_padding_, max_tokens
    from ..data import tokenize
    from ..recipe.tasks import cut_texts
    from ..train import predict

    readings: list[tuple[Any, TokenizedDataset]] = []
    labels: list[Tensor] = []
    for name, config in zip(names, configs, strict=True):
        texts = load_texts(data, name, config, *columns)
        tokenizer = load_tokenizer(name)
        tokens = tokenize(texts, tokenizer, min(max_length, max_tokens(config, tokenizer) or max_length))
        if tokens.cut and (not labels or cut_texts(tokens, "texts") != cut_texts(readings[0][1], "texts")):
            note(cut_texts(tokens, "texts"))
        readings.append((tokenizer, tokens))
        hashes = hashes_of(texts.texts, texts.text_pairs)
        labels.append(tokens.labels)
    if len(labels) > 1 and not labels[0].equal(labels[1]):
        raise ValueError(f"against: expected classes in the order of {names[0]}, got another in {names[1]}")

    def logits(tokenizer: Any, tokens: TokenizedDataset, model: nn.Module) -> Any:
        match_padding_(model, tokenizer)
        return predict(model, tokens, batch_size)

    return [partial(logits, *reading) for reading in readings], partial(judge, labels=labels[0]), hashes


def _read_predictors(
    names: Sequence[str], configs: Sequence[Any], data: Path, columns: Columns, max_length: int, batch_size: int
) -> Reading:
    """The same for models that predict tokens, which have to be the same ones for both."""
    from ..classifiers import load_tokenizer
    from ..recipe import Data
    from ..recipe.tasks import token_prediction, token_texts

    tokenizers = [load_tokenizer(name) for name in names]
    if len({config.model_type for config in configs}) > 1:
        raise ValueError(f"against: expected another {configs[0].model_type}, got {configs[1].model_type}")
    if any(each.get_vocab() != tokenizers[0].get_vocab() for each in tokenizers):
        raise ValueError(f"against: expected the tokens of {names[0]}, got another vocabulary in {names[1]}")
    text_column, _, text_pair_column = columns
    source = Data(train=str(data), test=str(data), text_column=text_column, text_pair_column=text_pair_column)
    texts = token_texts(source, configs[0].is_encoder_decoder, seed=0)
    task = token_prediction(tokenizers[0], *texts, max_length, seed=0)
    hashes = hashes_of(texts[1].texts, texts[1].targets)
    return [partial(task.outputs, batch_size=batch_size)] * len(names), task.judge, hashes


def load_texts(
    path: Path, name: str, config: Any, text_column: str, label_column: str, text_pair_column: str | None
) -> TextDataset:
    """Read a file with the labels encoded as the classes of the model of that name.

    Raises ValueError for a label it does not have, and for a model that has no trained head for classes.
    """
    from ..data import load_table
    from ..data.labels import is_generic
    from ..heads import CLASSES, check_head, choose_head, head_kind, label_names_of

    check_head(config)
    columns = (text_column, label_column, text_pair_column)
    names = label_names_of(config)
    if head_kind(config) == CLASSES and not is_generic(names):
        return load_table(path, *columns, names)
    texts = load_table(path, *columns)
    head = choose_head(config, texts.label_names)
    if not head.trained:
        raise ValueError(
            f"model: expected a trained classifier of these labels, got {name}: {head.why}; fine-tune it first"
        )
    for remark in filter(None, (head.why, head.remarks)):
        note(remark)
    return texts.with_classes(head.names)


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
