"""Training a new model of our own (models.own) on the texts of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..classifiers import max_tokens, save_model
from ..data import WordVectors, tokenize
from ..heads import Head
from ..scratch import new_classifier
from ..sequences import PREDICTORS, new_encoder_decoder, new_language_model
from ..train import FinetuneConfig
from ..trained_texts import with_texts
from .config import Data
from .tasks import Classification, Judgement, Trained, labelled_texts, split_of, token_prediction, token_texts

Draft = tuple[nn.Module, WordVectors | None, Trained, int]
"""(untrained model, the word vectors it begins with, its task, training texts)"""


def train_new(
    name: str,
    source: Data,
    output: str | Path,
    config: FinetuneConfig | None = None,
    options: Mapping[str, Any] | None = None,
    embeddings: str | Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Judgement | None:
    """Build the model `name` of models.OWN for the texts of `source`, train it and save it in `output`.

    options     fields of its configuration
    embeddings  text file of word vectors to begin with
    note        called with a line for the user here and there
    returns     how good it is on the test texts; None where these are training texts, too, which `note` is told

    config.seed also draws the split and the initial weights. After an interruption the same call goes on where it
    stopped. Raises NotADirectoryError for an output that is a file, and as `new_classifier`, `new_language_model`,
    `new_encoder_decoder`, and `read_task` for the texts.
    """
    output, config = Path(output), config or FinetuneConfig()
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output: expected a directory, got a file: {output}")
    draft = _predictor if name in PREDICTORS else _classifier
    model, vectors, task, count = draft(name, source, config.seed, options, embeddings)
    tokenizer = task.tokenizer
    if task.held_out is not None:
        note(f"no --test: {task.held_out[0]} of the {task.held_out[1]} rows are held out for testing")
    note(f"vocabulary: {len(tokenizer)} words and special tokens of {count} texts")
    if vectors is not None:
        note(f"word vectors: {embeddings} has {vectors.found} of {vectors.words} words ({vectors.coverage:.1%})")
    assert task.split is not None
    for remark in (*task.remarks, *task.split.remarks(None)):
        note(remark)
    state = output / "work" / "train.safetensors"
    task.finetune(model, config, state)
    quality = task.judge(task.outputs(model))
    save_model(model, output, with_texts(tokenizer, task.split.trained))
    state.unlink()
    state.parent.rmdir()
    if withheld := task.split.withheld(None):
        note(f"test figures: not reported: {withheld}")
        return None
    return quality


def _classifier(
    name: str, source: Data, seed: int, options: Mapping[str, Any] | None, embeddings: str | Path | None
) -> Draft:
    training, testing, held_out = labelled_texts(source, seed)
    new = new_classifier(name, training, embeddings, seed, options)
    longest = min(source.max_length, max_tokens(new.model.config, new.tokenizer) or source.max_length)
    learning, judging = (tokenize(side, new.tokenizer, longest) for side in (training, testing))
    head = Head(training.label_names, trained=False)
    split = split_of(source, seed, training, testing)
    task = Classification(new.tokenizer, learning, held_out, head, None, judging, split=split)
    return new.model, new.vectors, task, len(training)


def _predictor(
    name: str, source: Data, seed: int, options: Mapping[str, Any] | None, embeddings: str | Path | None
) -> Draft:
    training, testing, held_out = token_texts(source, name == "seq2seq", seed)
    texts, targets = training.texts, training.targets
    if targets is None:
        new = new_language_model(texts, seed=seed, options=options, embeddings=embeddings)
    else:
        new = new_encoder_decoder(texts, targets, source.max_length, seed, options, embeddings)
    task = token_prediction(new.tokenizer, training, testing, held_out, source.max_length, seed)
    task = replace(task, split=split_of(source, seed, training, testing))
    return new.model, new.vectors, task, len(texts)
