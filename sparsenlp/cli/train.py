"""sparsenlp train"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..measure import use_threads
from .console import note, print_table, resumable, say
from .evaluate import quality_cells, quality_title
from .options import DATA, Count, LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads, WordNet, data_section


def train(
    output: Annotated[Path, typer.Argument(help="Directory for the trained model.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="textcnn, birnn, selfattention, or matcher for pairs of texts; lstm-lm, or seq2seq, which answers "
            "--text-column with --text-pair-column.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help=DATA,
            show_default=False,
        ),
    ],
    test: Annotated[
        Path | None, typer.Option(help="Test texts. (default: a tenth of --data)", show_default=False)
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    text_pair_column: TextPairColumn = None,
    wordnet: WordNet = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Word vectors to begin with: a text file of GloVe or word2vec.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the model's configuration, as cell=gru; repeatable.", show_default=False),
    ] = None,
    count: Count = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per training step.")] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Its peak.")] = 2e-3,
    max_length: MaxLength = 256,
    seed: Annotated[int, typer.Option(help="Of the split, the weights, the batches and dropout.")] = 0,
    threads: Threads = None,
) -> None:
    """Train a small text classifier, language model or encoder-decoder from scratch, with a vocabulary of its own.

    What comes out is an ordinary transformers directory, which AutoModelForSequenceClassification, AutoModelForCausalLM
    or AutoModelForSeq2SeqLM loads after `import sparsenlp`, and the other commands take.
    After Ctrl-C the same command goes on where it stopped.

    \b
    sparsenlp train out --model textcnn --data rotten_tomatoes
    sparsenlp train out --model birnn --option cell=gru --data train.csv --test test.csv --embeddings glove.300d.txt
    sparsenlp train out --model matcher --data sibling_definitions
    sparsenlp train out --model matcher --data pairs.tsv --text-column question --text-pair-column answer
    sparsenlp train out --model lstm-lm --data texts.csv
    sparsenlp train out --model seq2seq --data pronunciations
    sparsenlp train out --model seq2seq --data words.tsv --text-column word --text-pair-column phonemes
    sparsenlp prune out pruned --data rotten_tomatoes --sparsity 0.8
    """
    from ..recipe import Data, train_new
    from ..sequences import PREDICTORS
    from ..train import FinetuneConfig

    config = FinetuneConfig(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    options = dict(map(_option, option or ()))
    section = data_section(data)
    if "train" in section:
        section |= {"text_column": text_column, "text_pair_column": text_pair_column}
        section |= {} if model in PREDICTORS else {"label_column": label_column}
    section |= {name: str(path) for name, path in (("test", test), ("path", wordnet)) if path is not None}
    source = Data(**section, count=count, max_length=max_length)
    with use_threads(threads), resumable():
        quality = train_new(model, source, output, config, options, embeddings, note)
    if quality is not None:
        print_table(quality_cells({model: quality}), quality_title(quality))
    say(f"saved: {output}")
    texts = {
        "data": data,
        "test": test,
        "text-column": text_column if "train" in section and text_column != "text" else None,
        "label-column": label_column if "label_column" in section and label_column != "label" else None,
        "text-pair-column": text_pair_column if "train" in section else None,
        "wordnet": wordnet,
        "count": count,
        "max-length": max_length if max_length != 256 else None,
        "seed": seed or None,
    }
    said = [part for name, value in texts.items() if value is not None for part in (f"--{name}", str(value))]
    where = f"./{output}" if str(output).startswith("-") else str(output)
    say("next: " + shlex.join(["sparsenlp", "prune", where, f"{where}-sparse", *said]))


def _option(text: str) -> tuple[str, Any]:
    """ "cell=gru" as ("cell", "gru"); numbers, true, false and lists as in JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option: expected name=value, got {text}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
