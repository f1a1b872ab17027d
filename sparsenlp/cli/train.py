"""sparsenlp train"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..measure import use_threads
from .console import note, print_table, resumable, say
from .evaluate import quality_cells, quality_title
from .options import DATA, LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads, WordNet, data_section
from .train_sequences import train_sequence_model


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
    count: Annotated[
        int | None, typer.Option(min=1, help="Training texts of a packaged task. (default: all)", show_default=False)
    ] = None,
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
    from ..classifiers import judge, max_tokens, save_model
    from ..data import tokenize
    from ..recipe import Data
    from ..recipe.tasks import labelled_texts
    from ..scratch import new_classifier
    from ..sequences import PREDICTORS
    from ..train import FinetuneConfig, finetune, predict

    config = FinetuneConfig(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output: expected a directory, got a file: {output}")
    section = data_section(data)
    options = dict(map(_option, option or ()))
    section |= {"test": None if test is None else str(test), "count": count, "max_length": max_length}
    section["path"] = None if wordnet is None else str(wordnet)
    if "train" in section:
        section |= {"text_column": text_column, "text_pair_column": text_pair_column}
    if model in PREDICTORS:
        with use_threads(threads), resumable():
            train_sequence_model(model, Data(**section), output, config, options, embeddings)
        _say_next(output, data, text_column, text_pair_column, wordnet)
        return
    source = Data(**section, label_column=label_column if "train" in section else None)
    training, testing, held_out = labelled_texts(source, seed)
    new = new_classifier(model, training, embeddings, seed, options)
    if held_out is not None:
        note(f"no --test: {held_out[0]} of the {held_out[1]} rows are held out for testing")
    note(f"vocabulary: {len(new.tokenizer)} words and special tokens of {len(training)} texts")
    if new.vectors is not None:
        found, words = new.vectors.found, new.vectors.words
        note(f"word vectors: {embeddings} has {found} of {words} words ({new.vectors.coverage:.1%})")
    longest = min(max_length, max_tokens(new.model.config, new.tokenizer) or max_length)
    learning, judging = (tokenize(side, new.tokenizer, longest) for side in (training, testing))
    state = output / "work" / "train.safetensors"
    with use_threads(threads), resumable():
        finetune(new.model, learning, config, state)
        quality = judge(predict(new.model, judging), judging.labels)
    save_model(new.model, output, new.tokenizer)
    state.unlink()
    state.parent.rmdir()
    print_table(quality_cells({model: quality}), quality_title(quality))
    say(f"saved: {output}")
    _say_next(output, data, text_column, text_pair_column, wordnet)


def _say_next(output: Path, data: str, text: str, pair: str | None, wordnet: Path | None) -> None:
    columns = (f" --text-column {text}" if text != "text" else "") + (f" --text-pair-column {pair}" if pair else "")
    path = f" --wordnet {wordnet}" if wordnet is not None else ""
    say(f"next: sparsenlp prune {output} {output}-sparse --data {data}{columns}{path}")


def _option(text: str) -> tuple[str, Any]:
    """ "cell=gru" as ("cell", "gru"); numbers, true, false and lists as in JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option: expected name=value, got {text}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
